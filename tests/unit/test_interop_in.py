"""Encoders of other projects: what they compute here, what is resized, what is refused."""

import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers import TINY, options, same_bits, weights_of
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from hjepa_engine import load_config
from hjepa_engine.errors import CheckpointError
from hjepa_engine.export import save_encoder
from hjepa_engine.interop.building import arguments_of, build_encoder
from hjepa_engine.interop.fit import plan_weights
from hjepa_engine.interop.positions import sincos_order
from hjepa_engine.interop.reading import read_source
from hjepa_engine.masking import Masks
from hjepa_engine.models import ContextEncoder, build_modules
from hjepa_engine.models.positions import sincos_2d

#: Of the encoders below; the images are 24 x 24.
WIDTH, DEPTH, HEADS, PATCH, GRID = 16, 2, 2, 4, (6, 6)
SIZES = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
IMAGES = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def config(**changes):
    values = {**TINY, "model.depth": DEPTH, "model.num_hierarchies": 1, "data.dataset": "fake"}
    return load_config(None, options({**values, **{key.replace("__", "."): value for key, value in changes.items()}}))


def columns_first(grid, width):
    """The table of I-JEPA (arXiv:2301.08243), computed by hand: the first half of an embedding tells the column."""
    frequencies = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    table = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            table.append(np.concatenate([f(x * frequencies) for x in (column, row) for f in (np.sin, np.cos)]))
    return torch.tensor(np.array(table), dtype=torch.float32)


NORM = partial(nn.LayerNorm, eps=1e-6)


class ReferenceEncoder(nn.Module):
    """I-JEPA's encoder with Meta's names: patches, positions, blocks, norm."""

    def __init__(self, seed, positions=None):
        super().__init__()
        torch.manual_seed(seed)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.pos_embed = nn.Parameter((columns_first(GRID, WIDTH) if positions is None else positions)[None])
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, qkv_bias=True, norm_layer=NORM) for _ in range(DEPTH))
        self.norm = NORM(WIDTH)
        for parameter in self.blocks.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images, kept=None):
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        tokens = tokens if kept is None else tokens[:, kept]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class ReferencePredictor(nn.Module):
    """I-JEPA's predictor with Meta's names: context tokens and one mask token per target, as one sequence."""

    def __init__(self, width=16, depth=1):
        super().__init__()
        torch.manual_seed(7)
        self.predictor_embed = nn.Linear(WIDTH, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(columns_first(GRID, width)[None])
        self.predictor_blocks = nn.ModuleList(Block(width, HEADS, qkv_bias=True, norm_layer=NORM) for _ in range(depth))
        self.predictor_norm = NORM(width)
        self.predictor_proj = nn.Linear(width, WIDTH)

    def forward(self, tokens, context, targets):
        positions = self.predictor_pos_embed[0]
        tokens = self.predictor_embed(tokens) + positions[context]
        queries = (self.mask_token[0] + positions[targets])[None].expand(len(tokens), -1, -1)
        sequence = torch.cat([tokens, queries], dim=1)
        for block in self.predictor_blocks:
            sequence = block(sequence)
        return self.predictor_proj(self.predictor_norm(sequence)[:, len(context) :])


def meta_contents(dtype=torch.float32, **changes):
    """A checkpoint in Meta's layout, as their training loop writes it, and the modules in it."""
    made = {"encoder": ReferenceEncoder(1), "target_encoder": ReferenceEncoder(2), "predictor": ReferencePredictor()}
    contents = {
        part: {f"module.{name}": tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}
        for part, module in made.items()
    }
    optimizer = torch.optim.AdamW(made["predictor"].parameters())
    contents |= {"opt": optimizer.state_dict(), "scaler": None, "epoch": 300, "loss": 0.1, "lr": 1e-3, "world_size": 16}
    for key, change in changes.items():
        change(contents[key])
    return contents, made


def save_meta(path, dtype=torch.float32, **changes):
    contents, made = meta_contents(dtype, **changes)
    torch.save(contents, path)
    return made


def loaded(place, parts=None, **changes):
    modules = build_modules(config(**changes)).eval()
    table = plan_weights(modules, read_source(str(place)), parts).apply()
    return modules, table


def probed(place, img_size=None, num_heads=HEADS):
    source = read_source(str(place))
    return build_encoder(source, arguments_of(source, img_size, num_heads))


# Meta


def test_both_encoders_and_the_predictor_of_a_checkpoint_of_meta_compute_what_they_computed(tmp_path):
    made = save_meta(tmp_path / "jepa.pth.tar")
    modules, table = loaded(tmp_path / "jepa.pth.tar")
    kept = torch.tensor([0, 3, 7, 20, 35])
    for name, part in (("context_encoder", "encoder"), ("target_encoder", "target_encoder")):
        torch.testing.assert_close(modules[name](IMAGES), made[part](IMAGES), atol=1e-5, rtol=0)
        chosen = modules[name](IMAGES, kept.expand(3, -1))
        torch.testing.assert_close(chosen, made[part](IMAGES, kept), atol=1e-5, rtol=0)
    targets = torch.tensor([[8, 9, 14, 15], [21, 22, 27, 28]])
    masks = Masks(kept.expand(3, -1), targets.expand(3, -1, -1), (2, 2))
    tokens = made["encoder"](IMAGES, kept)
    (found,) = modules["predictor"](tokens, masks)
    for number in range(2):
        wanted = made["predictor"](tokens, kept, targets[number])
        torch.testing.assert_close(found[:, number], wanted, atol=1e-5, rtol=0)
    assert table.splitlines() == [
        f"weights from {tmp_path}/jepa.pth.tar, Meta's I-JEPA checkpoint:",
        "  context_encoder    29 of 29 tensors",
        "  target_encoder     29 of 29 tensors",
        "  predictor          19 of 19 tensors",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is_and_computed_in_float32(tmp_path, dtype):
    made = save_meta(tmp_path / "jepa.pth", dtype)["target_encoder"]
    made.load_state_dict({name: tensor.to(dtype).float() for name, tensor in made.state_dict().items()})
    modules, _ = loaded(tmp_path / "jepa.pth")
    assert modules["target_encoder"].vit.pos_embed.dtype == torch.float32
    torch.testing.assert_close(modules["target_encoder"](IMAGES), made(IMAGES), atol=1e-5, rtol=0)


def test_a_checkpoint_of_meta_is_probed_as_its_target_encoder(tmp_path):
    made = save_meta(tmp_path / "jepa.pth.tar")
    encoder = probed(tmp_path / "jepa.pth.tar")
    torch.testing.assert_close(encoder(IMAGES), made["target_encoder"](IMAGES), atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(
        CheckpointError, match=r"does not say how many attention heads its encoder has: give --model.num"
    ):
        probed(tmp_path / "jepa.pth.tar", num_heads=None)


@pytest.mark.parametrize(
    "levels",
    [{"model__num_hierarchies": 2}, {"model__num_hierarchies": None, "model__levels": "[{depth: 0}]"}],
    ids=["two levels", "pixels"],
)
def test_with_other_levels_the_predictor_of_meta_is_left_out_loudly(tmp_path, levels):
    save_meta(tmp_path / "jepa.pth.tar")
    modules = build_modules(config(**levels))
    before = weights_of(modules["predictor"])
    plan = plan_weights(modules, read_source(str(tmp_path / "jepa.pth.tar")))
    plan.apply()
    assert same_bits(weights_of(modules["predictor"]), before)
    (warning,) = plan.warnings
    assert "predictor starts with random weights: model.levels must be one level of features with pool 1" in warning
    with pytest.raises(CheckpointError, match=r"model\.levels must be one level of features with pool 1"):
        plan_weights(modules, read_source(str(tmp_path / "jepa.pth.tar")), ["predictor"])


def test_a_predictor_with_other_positions_is_left_out_loudly(tmp_path):
    save_meta(tmp_path / "jepa.pth.tar", predictor=lambda part: part["module.predictor_pos_embed"].neg_())
    plan = plan_weights(build_modules(config()), read_source(str(tmp_path / "jepa.pth.tar")))
    assert "predictor.predictor_pos_embed is not the sine-cosine table of 6 x 6 patches" in plan.warnings[0]


def test_a_number_of_heads_that_does_not_divide_is_refused_by_the_key(tmp_path):
    save_meta(tmp_path / "jepa.pth.tar")
    with pytest.raises(CheckpointError, match=r"model\.num_heads must divide the encoder's width \(16\), got 3"):
        probed(tmp_path / "jepa.pth.tar", num_heads=3)


def test_a_target_encoder_that_is_not_named_starts_as_a_copy_and_it_is_said(tmp_path):
    made = save_meta(tmp_path / "jepa.pth.tar")
    modules, table = loaded(tmp_path / "jepa.pth.tar", ["context_encoder"])
    assert same_bits(weights_of(modules["target_encoder"]), weights_of(modules["context_encoder"]))
    torch.testing.assert_close(modules["target_encoder"](IMAGES), made["encoder"](IMAGES), atol=1e-5, rtol=0)
    assert "  target_encoder     29 of 29 tensors, those of context_encoder" in table
    plan = plan_weights(build_modules(config()), read_source(str(tmp_path / "jepa.pth.tar")), ["target_encoder"])
    assert plan.warnings[-1].startswith("model.init_parts: context_encoder starts with random weights")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_tensor(tmp_path, value):
    save_meta(tmp_path / "jepa.pth.tar", target_encoder=lambda part: part["module.norm.bias"][3:5].fill_(value))
    said = r"jepa\.pth\.tar: target_encoder\.norm\.bias has 2 weights of 16 that are NaN or infinite"
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path / "jepa.pth.tar")
    with pytest.raises(CheckpointError, match=said):
        probed(tmp_path / "jepa.pth.tar")


# Own encoders


def exported(folder, break_it=lambda encoder: None, **changes):
    """The export of an encoder, as runs write it."""
    made = build_modules(config(**changes))["target_encoder"]
    break_it(made)
    save_encoder(made, folder, {"encoder": made.arguments, "stats": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    return folder


def test_own_tensors_without_a_place_are_listed_and_warned_of(tmp_path):
    source = read_source(str(exported(tmp_path / "own", model__layer_scale=0.1)))
    plan = plan_weights(build_modules(config()), source)
    assert "    dropped vit.blocks.0.ls1.gamma: it has no place here" in plan.table
    said = (
        f"{tmp_path}/own/model.safetensors: part of target_encoder has no place here, dropped: vit.blocks.0.ls1.gamma, "
    )
    assert sum(warning.startswith(said) for warning in plan.warnings) == 1
    assert not plan_weights(build_modules(config(model__layer_scale=0.1)), source).warnings[1:]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.norm_eps", 1e-3, "the layer norms add 0.001, here 1e-06: --model.norm_eps 0.001"),
        ("model.num_heads", 4, "the encoder has 4 attention heads, here model.num_heads 2"),
    ],
)
def test_own_encoders_that_would_compute_something_else_are_refused(tmp_path, key, value, said):
    changes = {key.replace(".", "__"): value}
    source = read_source(str(exported(tmp_path / "own", **changes)))
    modules = build_modules(config())
    before = weights_of(modules)
    with pytest.raises(CheckpointError) as error:
        plan_weights(modules, source)
    assert said in str(error.value) and same_bits(weights_of(modules), before)
    plan_weights(build_modules(config(**changes)), source).apply()


def test_own_weights_that_are_not_finite_are_refused_by_the_tensor(tmp_path):
    place = exported(tmp_path / "own", lambda encoder: encoder.vit.norm.weight.data[0].fill_(float("nan")))
    source = read_source(str(place))
    for load in (lambda: plan_weights(build_modules(config()), source), lambda: probed(place)):
        with pytest.raises(
            CheckpointError, match=r"encoder\.vit\.norm\.weight has 1 weights of 16 that are NaN or inf"
        ):
            load()


# Other sizes


def test_patches_and_images_of_another_size_are_interpolated_and_it_is_said(tmp_path):
    save_meta(tmp_path / "jepa.pth.tar")
    modules, table = loaded(tmp_path / "jepa.pth.tar", data__image_size=64, model__patch_size=8)
    assert "    resized target_encoder.patch_embed.proj.weight: 4 x 4 to 8 x 8 pixels" in table
    assert "    resized target_encoder.pos_embed: 6 x 6 to 8 x 8 patches" in table
    # A sine-cosine table is computed for the new grid, in the order of its file.
    torch.testing.assert_close(modules["target_encoder"].vit.pos_embed[0], columns_first((8, 8), WIDTH))
    learned, _ = loaded(tmp_path / "jepa.pth.tar", data__image_size="[16, 32]", model__pos_embed="learned")
    table = columns_first(GRID, WIDTH).T.reshape(1, WIDTH, 6, 6)
    wanted = F.interpolate(table, (4, 8), mode="bicubic", antialias=True).reshape(WIDTH, 32).T
    torch.testing.assert_close(learned["context_encoder"].vit.pos_embed[0], wanted)


def test_an_encoder_for_larger_images_keeps_positions_that_are_not_its_own(tmp_path):
    positions = torch.randn(36, WIDTH)
    torch.save({"encoder": ReferenceEncoder(1, positions).state_dict()}, tmp_path / "jepa.pth")
    modules, _ = loaded(tmp_path / "jepa.pth")
    encoder = modules["target_encoder"]
    assert same_bits({"": encoder.vit.pos_embed[0]}, {"": positions})
    encoder.set_img_size(48)
    wanted = F.interpolate(positions.T.reshape(1, WIDTH, 6, 6), (12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder.vit.pos_embed[0], wanted.reshape(WIDTH, 144).T)
    own = ContextEncoder("vit_tiny_patch16_224", 24, **SIZES)
    own.set_img_size(48)
    torch.testing.assert_close(own.vit.pos_embed[0], sincos_2d((12, 12), WIDTH))


def test_the_order_of_a_sine_cosine_table_is_found():
    own = sincos_2d((3, 5), 8)
    assert sincos_order(own, (3, 5)) == "own" and sincos_order(own.half(), (3, 5)) == "own"
    assert sincos_order(torch.cat([own[:, 4:], own[:, :4]], 1), (3, 5)) == "other"
    assert sincos_order(own, (5, 3)) is None and sincos_order(own + 0.1, (3, 5)) is None
    assert sincos_order(columns_first((4, 6), 8), (4, 6)) is not None


# What is refused


def drop(name):
    return lambda part: part.pop(f"module.{name}")


def replace(name, value):
    return lambda part: part.update({f"module.{name}": value})


WRONG = {
    "a missing block": (
        {"target_encoder": lambda part: [part.pop(name) for name in list(part) if "blocks.1." in name]},
        "target_encoder.blocks.1.norm1.weight is missing; its encoder has model.embed_dim 16, model.depth 1, model.patch",
    ),
    "no positions": ({"target_encoder": drop("pos_embed")}, "target_encoder.pos_embed is missing"),
    "no positions of the context encoder": ({"encoder": drop("pos_embed")}, "encoder.pos_embed is missing; "),
    "another width": (
        {"encoder": replace("norm.weight", torch.ones(24))},
        "encoder.norm.weight is (24,), here (16,); ",
    ),
    "another channel": (
        {"encoder": replace("patch_embed.proj.weight", torch.ones(16, 4, 4, 4))},
        "encoder.patch_embed.proj.weight is (16, 4, 4, 4), here (16, 3, 4, 4); ",
    ),
    "one block too many": (
        {"encoder": replace("blocks.2.norm1.weight", torch.ones(16))},
        "encoder.blocks.2.norm1.weight has no place here; ",
    ),
    "not a tensor": (
        {"encoder": replace("norm.weight", "x")},
        "encoder.module.norm.weight is of type str, not a tensor; ",
    ),
    "whole numbers": (
        {"encoder": replace("norm.bias", torch.ones(16).int())},
        "encoder.module.norm.bias holds torch.int32",
    ),
    "an oblong": (
        {"target_encoder": replace("pos_embed", torch.ones(1, 35, 16))},
        "must be of a square, got 35 patches",
    ),
    "a wider predictor": (
        {"predictor": replace("predictor_proj.weight", torch.ones(16, 20))},
        "is (16, 20), here (16, 16); its predictor has model.predictor.width 16, model.predictor.depth 1",
    ),
    "no mask token": ({"predictor": drop("mask_token")}, "predictor.mask_token is missing; "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_of_meta_is_refused_by_the_key_and_nothing_changes(tmp_path, name):
    changes, said = WRONG[name]
    save_meta(tmp_path / "jepa.pth.tar", **changes)
    modules = build_modules(config())
    before = weights_of(modules)
    with pytest.raises(CheckpointError) as error:
        plan_weights(modules, read_source(str(tmp_path / "jepa.pth.tar")))
    assert str(error.value).startswith(f"{tmp_path}/jepa.pth.tar: ") and said in str(error.value)
    assert "\n" not in str(error.value) and same_bits(weights_of(modules), before)


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    contents, _ = meta_contents()
    for number, legacy in enumerate((False, True)):
        path = tmp_path / f"{number}.pth"
        evil = {**contents, "epoch": Evil(tmp_path / "canary")}
        torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError) as error:
            read_source(str(path))
        assert str(error.value) == f"{path}: holds code, posix.mkdir, which is not run: weights alone are read"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=r"holds code, posix\.mkdir|is no file of torch\.save"):
        read_source(str(path))
    assert not (tmp_path / "canary").exists()


def unreadable(folder):
    """Files and folders that hold no weights, and what is said of them."""
    save_meta(folder / "whole.pth.tar")
    (folder / "cut.pth.tar").write_bytes((folder / "whole.pth.tar").read_bytes()[:-2000])
    (folder / "text.pth").write_text("hello")
    (folder / "text.safetensors").write_text("hello, here is no header")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"weights": torch.ones(2)}, folder / "other.pth")
    (folder / "prose.pth").write_text("i am text, no weights")
    (folder / "nothing.pth").touch()
    (folder / "plain.pth").write_bytes(pickle.dumps({"weight": torch.ones(2)}))
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, folder / "model.pt2")
    torch.save({"encoder": "abc", "target_encoder": {"pos_embed": torch.ones(1, 4, 8)}}, folder / "word.pth")
    for name, file in (("undescribed", "model.safetensors"), ("shards", "model-00001-of-00002.safetensors")):
        (folder / name).mkdir()
        save_file({"embeddings.position_embeddings": torch.ones(1, 4, 8)}, folder / name / file)
    (folder / "shards" / "model.safetensors.index.json").write_text("{}")
    (folder / "empty").mkdir()
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_text("x")
    for name, description in (("bert", {"model_type": "bert"}), ("resnet", {"architecture": "resnet18"})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(description))
    return {
        "cut.pth.tar": "is no file of torch.save, or is damaged; accepted are",
        "text.pth": "is no file of torch.save, or is damaged; accepted are",
        "prose.pth": "is no file of torch.save, or is damaged; accepted are",
        "nothing.pth": "is no file of torch.save, or is damaged; accepted are",
        "plain.pth": "is no file of torch.save, or is damaged; accepted are",
        "model.pt2": "is a program of torch.export, not weights; accepted are",
        "word.pth": "encoder holds no weights, accepted are",
        "undescribed/config.json": "is missing: it says whose weights lie beside it",
        "shards/config.json": "is missing: it says whose weights lie beside it",
        "text.safetensors": "holds no weights: ",
        "list.pth": "it holds no weights, accepted are a run, checkpoint or export of this project, Meta's",
        "other.pth": "patch_embed.proj.weight is missing: not a plain vision transformer of timm (it has weights, ...)",
        "empty": "holds no checkpoint and no encoder, but nothing; accepted are",
        "photos": "holds no checkpoint and no encoder, but cat.jpg; accepted are",
        "nowhere": "there is no such file or folder; accepted are",
        "bert/config.json": "model_type must be ijepa, got 'bert'",
        "resnet/config.json": "architecture must be a vision transformer of timm, got 'resnet18'",
    }


def test_what_holds_no_weights_is_named_with_what_was_found(tmp_path, recwarn):
    places = unreadable(tmp_path)
    recwarn.clear()
    for name, said in places.items():
        place = tmp_path / name.removesuffix("/config.json")
        with pytest.raises(CheckpointError) as error:
            read_source(str(place))
        assert str(error.value).startswith(f"{tmp_path / name}: ") and said in str(error.value), name
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not recwarn.list


# Hugging Face


def jepa_model(seed=0, **values):
    """A model of transformers with random weights, of norms that are not 1 and biases that are not 0."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 24, "patch_size": 4, "layer_norm_eps": 1e-6}
    torch.manual_seed(seed)
    model = transformers.IJepaModel(transformers.IJepaConfig(**{**sizes, **values}), add_pooling_layer=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def save_jepa(folder, positions=None, **values):
    model = jepa_model(**values)
    if positions is not None:
        model.embeddings.position_embeddings.data = positions[None].clone()
    model.save_pretrained(folder)
    return model


def outputs(model, images):
    with torch.no_grad():
        return model(images).last_hidden_state


JEPAS = {
    "as the others": {},
    "wide and deep": {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 100},
    "small patches, one channel": {"patch_size": 3, "num_channels": 1, "image_size": 12},
    "without biases, other norms": {"qkv_bias": False, "layer_norm_eps": 1e-3},
    "transformers' own norms": {"layer_norm_eps": 1e-12},
}


@pytest.mark.parametrize("name", JEPAS)
def test_a_model_of_hugging_face_computes_here_what_it_computes_there(tmp_path, name):
    values = JEPAS[name]
    side, channels = values.get("image_size", 24), values.get("num_channels", 3)
    grid = side // values.get("patch_size", 4)
    for number, positions in enumerate((None, columns_first((grid, grid), values.get("hidden_size", 16)))):
        model = save_jepa(tmp_path / str(number), positions, **values)
        images = torch.randn(3, channels, side, side)
        source = read_source(str(tmp_path / str(number)))
        encoder = build_encoder(source, arguments_of(source))
        torch.testing.assert_close(encoder(images), outputs(model, images), atol=1e-5, rtol=0)


def test_a_run_starts_from_a_model_of_hugging_face_with_its_positions(tmp_path):
    positions = columns_first(GRID, WIDTH)
    model = save_jepa(tmp_path / "model", positions)
    modules, table = loaded(tmp_path / "model")
    for name in ("context_encoder", "target_encoder"):
        torch.testing.assert_close(modules[name](IMAGES), outputs(model, IMAGES), atol=1e-5, rtol=0)
        assert same_bits({"": modules[name].vit.pos_embed[0]}, {"": positions})
    assert "  context_encoder    29 of 29 tensors" in table and "predictor" not in table
    plan = plan_weights(build_modules(config()), read_source(str(tmp_path / "model")))
    assert plan.warnings == (f"{tmp_path}/model has no predictor: random weights",)


def test_a_model_in_several_files_is_read_by_its_index(tmp_path):
    model = jepa_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(probed(tmp_path)(IMAGES), outputs(model, IMAGES), atol=1e-5, rtol=0)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors: there is no such file, model\.safe"):
        read_source(str(tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["layernorm.bias"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map must name files beside it, got '\.\./elsewhere"):
        read_source(str(tmp_path))


def test_a_classifier_of_hugging_face_is_read_without_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = transformers.IJepaForImageClassification(jepa_model().config).eval()
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(probed(tmp_path)(IMAGES), outputs(made.ijepa, IMAGES), atol=1e-5, rtol=0)
    assert read_source(str(tmp_path)).notes == ("left out: classifier.bias, classifier.weight",)


KEY = "encoder.layer.1.attention.attention.key"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, w: w.pop(f"{KEY}.weight"), "encoder.layer.1.attention.attention.key.weight is missing"),
        (lambda c, w: w.pop("embeddings.position_embeddings"), "embeddings.position_embeddings is missing"),
        (lambda c, w: c.update(num_hidden_layers=1), "encoder.layer.1."),
        (lambda c, w: c.update(hidden_act="relu"), "config.json: hidden_act must be gelu, got 'relu'"),
        (lambda c, w: c.update(num_attention_heads=4), "the encoder has 4 attention heads, here model.num_heads 2"),
        (lambda c, w: c.update(layer_norm_eps=1e-12), "the layer norms add 1e-12, here 1e-06: --model.norm_eps 1e-12"),
        (lambda c, w: c.update(hidden_size=-1), "config.json: hidden_size must be a positive integer, got -1"),
        (
            lambda c, w: w.update({"layernorm.weight": torch.ones(24)}),
            "layernorm.weight is (24,), here (16,); its encoder",
        ),
    ],
)
def test_a_wrong_model_of_hugging_face_is_refused_by_the_key(tmp_path, change, said):
    save_jepa(tmp_path)
    description, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change(description, weights)
    (tmp_path / "config.json").write_text(json.dumps(description))
    save_file(weights, tmp_path / "model.safetensors")
    modules = build_modules(config())
    before = weights_of(modules)
    with pytest.raises(CheckpointError) as error:
        plan_weights(modules, read_source(str(tmp_path)))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert same_bits(weights_of(modules), before)


def test_hugging_faces_norms_can_be_those_of_the_run(tmp_path):
    model = save_jepa(tmp_path, layer_norm_eps=1e-3)
    modules, _ = loaded(tmp_path, model__norm_eps=1e-3)
    torch.testing.assert_close(modules["target_encoder"](IMAGES), outputs(model, IMAGES), atol=1e-5, rtol=0)


# timm


def vision_transformer(seed=0, name="vit_tiny_patch16_224", **values):
    torch.manual_seed(seed)
    tokens = {"class_token": False, "global_pool": "", "num_classes": 0}
    model = timm.create_model(name, **{"img_size": 24, **SIZES, **tokens, **values}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["safetensors", "safetensors, prefix", "pth", "pth, nested"])
def test_a_file_of_timm_computes_here_what_it_computes_there(tmp_path, kind):
    model = vision_transformer()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if kind.startswith("safetensors"):
        path = tmp_path / "vit.safetensors"
        save_file({("vit." if "prefix" in kind else "") + name: item for name, item in weights.items()}, path)
    else:
        path = tmp_path / "vit.pth"
        torch.save({"state_dict": weights, "epoch": 3} if "nested" in kind else weights, path)
    modules, _ = loaded(path)
    for encoder in (modules["context_encoder"], modules["target_encoder"], probed(path)):
        torch.testing.assert_close(encoder(IMAGES), model(IMAGES), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "length"), [({"reg_tokens": 4}, 41), ({"no_embed_class": True}, 36), ({}, 37)])
def test_tokens_beside_the_patches_are_dropped_with_their_positions_and_it_is_said(tmp_path, tokens, length):
    model = vision_transformer(class_token=True, global_pool="token", num_classes=10, **tokens)
    assert model.pos_embed.shape[1] == length
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    modules, table = loaded(tmp_path / "vit.safetensors")
    assert same_bits({"": modules["target_encoder"].vit.pos_embed}, {"": model.pos_embed[:, length - 36 :]})
    assert f"dropped, with {length - 36} positions: patch tokens differ from those of the source" in table
    assert "  left out: cls_token, " in table and "head.weight" in table


def test_layer_scale_and_missing_biases_are_built_from_the_shapes(tmp_path):
    model = vision_transformer(init_values=0.1, qkv_bias=False, mlp_ratio=3)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    torch.testing.assert_close(probed(tmp_path / "vit.safetensors")(IMAGES), model(IMAGES), atol=1e-5, rtol=0)
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias is missing; its encoder has model\.embed_dim 16"
    ):
        loaded(tmp_path / "vit.safetensors")


def test_a_name_of_timm_is_read_from_the_cache_and_never_fetched(tmp_path, monkeypatch):
    for key in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(key, raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    name = "vit_tiny_patch16_224.augreg_in21k"
    with pytest.raises(CheckpointError) as error:
        read_source(f"timm/{name}")
    fetch = f"timm.create_model('{name}', pretrained=True) fetches it"
    assert str(error.value) == f"timm/{name}: is not in the local cache, and nothing is downloaded: {fetch}"
    snapshot = cache / f"models--timm--{name}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / f"models--timm--{name}" / "refs").mkdir()
    (cache / f"models--timm--{name}" / "refs" / "main").write_text("0123")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=12).eval()
    save_file(model.state_dict(), snapshot / "model.safetensors")
    source = read_source(f"timm/{name}")
    assert source.stats == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) and source.grid == (14, 14)
    encoder = build_encoder(source, arguments_of(source, (32, 64)))
    assert encoder(torch.randn(1, 3, 32, 64)).shape == (1, 8, 192)
    for wrong in ("timm/vit_tiny_patch16_22", "timm/resnet18"):
        with pytest.raises(CheckpointError, match="timm has no vision transformer of that name"):
            read_source(wrong)
    with pytest.raises(CheckpointError, match="timm has no weights of that name"):
        read_source("timm/vit_tiny_patch16_224.nobody")
