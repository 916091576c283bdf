"""Levels, encoders, predictor, step and losses, against hand-computed numbers and a loop-written I-JEPA."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.config.schema import DataConfig, Level, LossConfig, ModelConfig, PredictorConfig
from hjepa_engine.errors import ConfigError
from hjepa_engine.levels import cell_centers, pool_target, take_tokens
from hjepa_engine.losses import LOSSES, covariance, sigreg, variance
from hjepa_engine.masking import Masks, MultiBlockMasks
from hjepa_engine.metrics.means import effective_rank
from hjepa_engine.models import ContextEncoder, Predictor, TargetEncoder, build_modules
from hjepa_engine.models.positions import sincos_2d
from hjepa_engine.optim import param_groups
from hjepa_engine.steps import hjepa_step
from hjepa_engine.steps.feature_maps import feature_map_step
from hjepa_engine.steps.probe_heads import readings_step

FINE = Level()


def config(levels=(FINE,), **model):
    """A 6 x 6 grid of gray 4 x 4 patches, width 16, two blocks."""
    sizes = {"encoder_type": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    sizes["pos_embed"] = "sincos"
    predictor = model.pop("predictor", PredictorConfig(width=8, depth=1, num_heads=2))
    return Config(
        data=DataConfig(image_size=24),
        model=ModelConfig(**{**sizes, **model}, levels=list(levels), predictor=predictor),
    )


def moved(modules, amount=0.1):
    """Every weight away from its initial value, so that no bias is 0 and no norm the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return modules


def images(count=3, channels=1, size=24):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def batch(count=3, num_targets=3, step=0):
    return {"images": images(count), "masks": MultiBlockMasks((6, 6), num_targets).sample(count, seed=0, step=step)}


# Levels


def test_tokens_are_taken_by_index_and_keep_its_shape():
    tokens = torch.arange(12.0).view(2, 3, 2)
    taken = take_tokens(tokens, torch.tensor([[[2, 0]], [[1, 1]]]))
    assert taken.tolist() == [[[[4.0, 5.0], [0.0, 1.0]]], [[[8.0, 9.0], [8.0, 9.0]]]]


def numbered_masks():
    """A 3 x 3 block in the lower right of a 4 x 5 grid whose patches are numbered row by row."""
    block = [[7, 8, 9, 12, 13, 14, 17, 18, 19]]
    return Masks(torch.tensor([[0, 1]]), torch.tensor([block]), (3, 3))


def test_cells_are_means_and_an_edge_cell_is_the_mean_of_what_it_holds():
    features = torch.arange(20.0).view(1, 20, 1)
    pooled = pool_target(features, numbered_masks(), Level(pool=2))
    # (7 + 8 + 12 + 13) / 4, (9 + 14) / 2, (17 + 18) / 2, 19
    assert pooled.tolist() == [[[[10.0], [11.5], [17.5], [19.0]]]]


def test_pool_one_is_the_block_itself_and_a_pool_beyond_the_block_its_mean():
    features = torch.arange(20.0).view(1, 20, 1)
    assert pool_target(features, numbered_masks(), Level())[0, 0, :, 0].tolist() == [7, 8, 9, 12, 13, 14, 17, 18, 19]
    assert pool_target(features, numbered_masks(), Level(pool=4)).tolist() == [[[[13.0]]]]


def test_image_level_is_the_mean_of_all_patches_hidden_or_not():
    features = torch.arange(40.0).view(2, 20, 1)
    masks = Masks(*(torch.cat([idx, idx]) for idx in numbered_masks()[:2]), (3, 3))
    assert pool_target(features, masks, Level(pool="image")).tolist() == [[[[9.5]]], [[[29.5]]]]


def test_centers_of_cells_are_the_mean_positions_of_their_patches():
    rows, columns = cell_centers(numbered_masks(), 2, grid_width=5)
    # Rows 1, 2 and 3, doubled: the first two together at 1.5, the last alone at 3. Columns 2, 3 and 4 likewise.
    assert rows.tolist() == [[[3, 6]]]
    assert columns.tolist() == [[[5, 8]]]


@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_centers_and_pooled_positions_agree(pool):
    """Pooling each patch's own place gives the center that the query is placed at, in the same order."""
    grid = (7, 9)
    masks = MultiBlockMasks(grid, 2).sample(4, 0, 1)
    places = torch.stack([torch.arange(63) // 9, torch.arange(63) % 9], dim=1).float().expand(4, -1, -1)
    means = pool_target(places, masks, Level(pool=pool))
    rows, columns = cell_centers(masks, pool, 9)
    expected = torch.stack(torch.broadcast_tensors(rows[..., :, None], columns[..., None, :]), dim=-1).flatten(2, 3) / 2
    assert torch.allclose(means, expected)


def hand_sincos(place, dim):
    angles = [place / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def hand_position(row, column, dim):
    return torch.tensor(hand_sincos(column, dim // 2) + hand_sincos(row, dim // 2))


def test_positions_are_sines_and_cosines_of_column_then_row():
    table = sincos_2d((2, 3), 8)
    for number in range(6):
        assert torch.allclose(table[number], hand_position(number // 3, number % 3, 8), atol=1e-6)


def test_queries_are_mask_token_plus_level_embedding_plus_center():
    levels = (Level(), Level(pool=2), Level(pool="image"))
    modules = moved(build_modules(config(levels)))
    predictor = modules["predictor"]
    seen = []
    predictor._predict = lambda tokens, queries, numbers: (
        seen.append(queries) or [queries[n] for n, _ in enumerate(numbers)]
    )
    # A 2 x 3 block with its corner in row 3, column 1 of the 6 x 6 grid.
    masks = Masks(torch.tensor([[0, 5]]), torch.tensor([[[19, 20, 21, 25, 26, 27]]]), (2, 3))
    predictor(torch.zeros(1, 2, 16), masks)
    (fine, coarse), (image,) = seen
    places = {
        0: [(fine, i, (3 + i // 3, 1 + i % 3)) for i in range(6)],
        1: [(coarse, 0, (3.5, 1.5)), (coarse, 1, (3.5, 3.0))],
        2: [(image, 0, (2.5, 2.5))],
    }
    assert (fine.shape[2], coarse.shape[2], image.shape[2]) == (6, 2, 1)
    for level, queries in places.items():
        for query, cell, (row, column) in queries:
            expected = predictor.mask_token + predictor.level_embed[level] + hand_position(row, column, 8)
            assert torch.allclose(query[0, 0, cell], expected, atol=1e-6)


def test_predictions_have_the_shape_of_their_targets_at_every_level():
    levels = (Level(), Level(pool=2, depth=0.5), Level(pool=4), Level(pool="image"))
    outputs = hjepa_step(build_modules(config(levels)), batch())
    for prediction, target in zip(outputs["predictions"], outputs["targets"], strict=True):
        assert prediction.shape == target.shape
    assert [tuple(t.shape[:2]) for t in outputs["targets"]] == [(3, 3), (3, 3), (3, 3), (3, 1)]


def test_target_blocks_are_predicted_independently_of_each_other():
    modules = moved(build_modules(config((Level(), Level(pool=2)))))
    drawn = batch()
    masks = drawn["masks"]
    context = modules["context_encoder"](drawn["images"], masks.context_idx)
    together = modules["predictor"](context, masks)
    alone = modules["predictor"](context, Masks(masks.context_idx, masks.target_idx[:, 1:2], masks.block))
    for whole, part in zip(together, alone, strict=True):
        assert torch.allclose(whole[:, 1:2], part, atol=1e-6)


def test_image_level_leaves_the_other_levels_predictions_alone():
    modules = moved(build_modules(config((Level(), Level(pool="image")))))
    drawn = batch()
    context = modules["context_encoder"](drawn["images"], drawn["masks"].context_idx)
    before = modules["predictor"](context, drawn["masks"])
    with torch.no_grad():
        modules["predictor"].level_embed[1].add_(torch.linspace(-1, 1, 8))
    after = modules["predictor"](context, drawn["masks"])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


# Encoders


def test_all_patches_by_index_equal_the_whole_image():
    encoder = moved(build_modules(config())["context_encoder"]).eval()
    whole = encoder(images())
    assert torch.equal(whole, encoder(images(), torch.arange(36).expand(3, -1)))
    # Another order of patches gives the same tokens in that order: places travel with the patches.
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole[:, order], encoder(images(), order.expand(3, -1)), atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_pixels_of_a_hidden_patch_do_not_reach_the_context_and_visible_ones_do(stem):
    encoder = moved(build_modules(config(stem=stem))["context_encoder"])
    patch_idx = torch.tensor([[0, 1, 7, 20]]).expand(3, -1)
    before = encoder(images(), patch_idx)
    hidden, visible = images(), images()
    hidden[:, :, 4:8, 8:12] += 5.0  # patch 8, row 1, column 2
    visible[:, :, 4:8, 4:8] += 5.0  # patch 7
    assert torch.equal(encoder(hidden, patch_idx), before)
    assert ((encoder(visible, patch_idx) - before).abs().amax(dim=2) > 1e-4).all()  # through attention, all tokens


def test_a_conv_stem_halves_the_image_until_patches_are_pixels_and_sees_beyond_their_edges():
    encoder = moved(build_modules(config(stem="conv"))["context_encoder"])
    stem = encoder.vit.patch_embed.proj
    assert [tuple(layer.weight.shape) for layer in stem if isinstance(layer, nn.Conv2d)] == [
        (8, 1, 3, 3),
        (8, 8, 3, 3),
        (16, 8, 1, 1),
    ]
    changed = images()
    changed[:, :, 8, 8] += 5.0  # the corner of patch 14, row 2, column 2
    moved_tokens = (stem(changed) - stem(images())).abs().amax(dim=(0, 1)) > 1e-6
    assert moved_tokens.nonzero().tolist() == [[2, 2]]  # rows and columns from -3 to +3 of twice-halved pixels
    changed[:, :, 7, 7] += 5.0  # patch 7, within the reach of patches 8, 13 and 14
    moved_tokens = (stem(changed) - stem(images())).abs().amax(dim=(0, 1)) > 1e-6
    assert moved_tokens.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@pytest.mark.parametrize("patch_size", [1, 3, 6])
def test_a_conv_stem_of_another_patch_size_is_refused_in_one_line(patch_size):
    with pytest.raises(ConfigError, match=r"patch_size of a conv stem must be a power of two, at least 2, got \d$"):
        build_modules(config(stem="conv", patch_size=patch_size))


def test_features_at_a_depth_are_timms_intermediate_ones():
    encoder = moved(build_modules(config(depth=4))["context_encoder"]).eval()
    quarter, half, last = encoder.features(images(), depths=(0.25, 0.5, 1.0))
    for features, block in ((quarter, 0), (half, 1)):
        expected = encoder.vit.forward_intermediates(
            images(), indices=[block], output_fmt="NLC", intermediates_only=True
        )
        assert torch.allclose(features, expected[0], atol=1e-6)
    assert torch.allclose(last, encoder.vit.forward_features(images()), atol=1e-6)


def test_features_at_depth_zero_are_the_pixels_of_each_patch_row_by_row():
    encoder = build_modules(config())["context_encoder"]
    last, pixels = encoder.features(images(), depths=(1.0, 0.0))
    assert torch.equal(last, encoder(images()))
    assert pixels.shape == (3, 36, 16)
    assert torch.equal(pixels[1, 2 * 6 + 3], images()[1, 0, 8:12, 12:16].flatten())
    chosen = torch.tensor([[5, 0], [7, 35], [1, 2]])
    seen = encoder.features(images(), chosen, depths=(0.0,))[0]
    assert torch.equal(seen, take_tokens(pixels, chosen))


def test_a_level_of_depth_zero_predicts_the_pixels_of_each_target_patch_normalized():
    modules = build_modules(config([Level(depth=0), Level("image")]))
    outputs = hjepa_step(modules, given := batch())
    flat = images().unfold(2, 4, 4).unfold(3, 4, 4).reshape(3, 36, 16)  # one channel
    expected = take_tokens(flat, given["masks"].target_idx)
    expected = (expected - expected.mean(-1, keepdim=True)) / (
        expected.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert torch.allclose(outputs["targets"][0], expected, atol=1e-6)
    assert outputs["predictions"][0].shape == expected.shape
    assert outputs["targets"][1].shape == outputs["predictions"][1].shape == (3, 1, 1, 16)


def test_pixels_alone_do_not_run_the_target_encoder():
    modules = build_modules(config([Level(depth=0)]))
    ran = []
    modules["target_encoder"].vit.blocks[0].register_forward_hook(lambda *_: ran.append(True))
    outputs = hjepa_step(modules, batch())
    assert not ran
    assert "target_tokens" not in outputs
    both = build_modules(config([Level(depth=0), Level()]))
    both["target_encoder"].vit.blocks[0].register_forward_hook(lambda *_: ran.append(True))
    assert hjepa_step(both, batch())["target_tokens"].shape == (3, 36, 16)
    assert ran


def test_pixels_of_oblong_patches_in_three_channels_come_channel_by_channel():
    arguments = {"patch_size": (4, 8), "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = ContextEncoder("vit_tiny_patch16_224", (8, 24), in_chans=3, **arguments)
    given = torch.arange(2 * 3 * 8 * 24.0).view(2, 3, 8, 24)
    pixels = encoder.features(given, depths=(0.0,))[0]
    assert pixels.shape == (2, 6, 3 * 4 * 8)
    assert torch.equal(pixels[1, 4], given[1, :, 4:8, 8:16].flatten())


def test_a_level_of_pixels_needs_their_number():
    with pytest.raises(ValueError, match="num_pixels must be positive where a level has depth 0, got 0"):
        Predictor(grid=(2, 2), embed_dim=8, levels=[Level(depth=0)], width=8, num_heads=2)


def test_what_is_measured_and_read_of_an_encoder_leaves_levels_of_pixels_out():
    levels = (Level(depth=0), Level(2), Level(depth=0.5))
    encoder = nn.ModuleDict({"encoder": build_modules(config(levels))["context_encoder"]})
    maps = feature_map_step(encoder, batch(), levels)
    assert set(maps) == {"encoder", "encoder_level_1", "encoder_level_2"}
    assert set(readings_step(encoder, batch(), levels)) == {"last", "last_2", "level_1", "level_2"}


@pytest.mark.parametrize("pool", [2, "image"])
def test_a_level_of_pixels_pools_nothing(pool):
    with pytest.raises(ValueError, match="pool must be 1 where depth is 0"):
        Level(pool, depth=0)


def test_linear_layers_start_at_the_scale_of_their_width_or_at_that_of_ijepa():
    for width, hidden in ((16, 64), (64, 256)):
        model = config(init="xavier", embed_dim=width, depth=4)
        blocks = build_modules(model)["context_encoder"].vit.blocks
        found = torch.cat([block.mlp.fc1.weight.flatten() for block in blocks])
        limit = math.sqrt(6 / (width + hidden))  # uniform: its standard deviation is that over the root of 3
        assert found.abs().max() <= limit
        assert found.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    head = build_modules(config(embed_dim=64))["predictor"].heads[0]
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / (8 + 64)), rel=0.1)
    assert not head.bias.any()
    ours = {"predictor": PredictorConfig(width=8, num_heads=2, init="trunc_normal"), "patch_init": "trunc_normal"}
    small = build_modules(config(embed_dim=64, **ours))
    vit = small["context_encoder"].vit
    for layer in (vit.patch_embed.proj, vit.blocks[0].mlp.fc1, small["predictor"].heads[0]):
        assert layer.weight.abs().max() <= 0.04
        assert layer.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.1)  # cut off at two deviations


def test_target_encoder_is_the_context_encoder_bit_for_bit_at_step_zero():
    modules = build_modules(config(drop_path=0.1, layer_scale=0.1))
    context, target = modules["context_encoder"], modules["target_encoder"]
    assert context.state_dict().keys() == target.state_dict().keys()
    for name, tensor in context.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name])
        assert tensor.data_ptr() != target.state_dict()[name].data_ptr()
    assert torch.equal(context.eval()(images()), target(images()))


def test_target_encoder_has_no_gradients_and_never_trains():
    modules = build_modules(config(drop_path=0.5))
    modules.train()
    target = modules["target_encoder"]
    assert modules["context_encoder"].training
    assert not any(module.training for module in target.modules())
    assert not any(parameter.requires_grad for parameter in target.parameters())
    hjepa_step(modules, batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in target.parameters())


def test_drop_path_acts_in_the_context_encoder_alone():
    modules = build_modules(config(drop_path=0.5, depth=4)).train()
    context, target = modules["context_encoder"], modules["target_encoder"]

    def twice(encoder):
        torch.manual_seed(0)
        return encoder(images()), encoder(images())

    first, second = twice(context)
    assert not torch.allclose(first, second)
    first, second = twice(target)
    assert torch.equal(first, second)
    first, second = twice(context.eval())
    assert torch.equal(first, second)


def test_sine_cosine_positions_are_fixed_and_learned_ones_are_not():
    fixed = build_modules(config())["context_encoder"].vit.pos_embed
    learned = build_modules(config(pos_embed="learned"))["context_encoder"].vit.pos_embed
    assert not fixed.requires_grad and learned.requires_grad
    assert torch.equal(fixed[0], sincos_2d((6, 6), 16))
    assert not torch.allclose(learned[0], sincos_2d((6, 6), 16))


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_medium_patch16_reg4_gap_256", 16),
        ("vit_base_patch16_clip_224", 16),
        ("vit_base_patch16_siglip_224", 16),
        ("vit_small_patch16_18x2_224", 16),
        ("deit_tiny_patch16_224", 16),
        ("flexivit_small", 16),
    ],
)
def test_vision_transformers_of_timm_work_by_name(name, patch):
    encoder = ContextEncoder(name, img_size=3 * patch, embed_dim=24, depth=2, num_heads=2)
    pictures = images(2, 3, 3 * patch)
    assert (encoder.grid, encoder.num_patches, encoder.embed_dim, encoder.depth) == ((3, 3), 9, 24, 2)
    assert encoder(pictures).shape == (2, 9, 24)
    assert encoder(pictures, torch.tensor([[0, 4], [1, 8]])).shape == (2, 2, 24)
    target = TargetEncoder.copy_of(encoder)
    assert torch.equal(target(pictures), encoder.eval()(pictures))
    expected = encoder.vit.forward_features(pictures)[:, encoder.vit.num_prefix_tokens :]
    assert torch.allclose(target(pictures), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "overrides", "prefix"),
    [
        ("vit_tiny_patch16_224", {"class_token": True}, 1),
        ("vit_small_patch14_reg4_dinov2", {"class_token": True, "reg_tokens": 4}, 5),
    ],
)
def test_prefix_tokens_attend_but_only_patch_tokens_come_out(name, overrides, prefix):
    encoder = moved(ContextEncoder(name, 28, patch_size=7, embed_dim=24, depth=2, num_heads=2, **overrides))
    pictures, patch_idx = images(2, 3, 28), torch.tensor([[0, 4, 15], [1, 8, 9]])
    assert encoder.vit.num_prefix_tokens == prefix
    before = encoder(pictures, patch_idx)
    assert before.shape == (2, 3, 24)
    assert encoder(pictures).shape == (2, 16, 24)
    assert torch.equal(encoder(pictures, torch.arange(16).expand(2, -1)), encoder(pictures))
    with torch.no_grad():
        encoder.vit.cls_token.add_(torch.linspace(-1, 1, 24))  # a constant would be lost in the layer norms
    assert not torch.allclose(encoder(pictures, patch_idx), before)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tiny_patch16_24", "similar names: vit_tiny_patch16_224"),
        ("nonsense", "timm.list_models"),
        ("resnet18", "must be a timm VisionTransformer"),
        ("swin_tiny_patch4_window7_224", "must be a timm VisionTransformer"),
        ("deit_tiny_distilled_patch16_224", "must be a timm VisionTransformer"),
    ],
)
def test_unknown_and_unsuitable_encoders_are_refused_in_one_line(name, says):
    with pytest.raises(ValueError, match=says):
        ContextEncoder(name, img_size=32)
    with pytest.raises(ConfigError, match=f"model.encoder_type {name}: .*{says}") as caught:
        build_modules(config(encoder_type=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"embed_dim": 20, "num_heads": 3}, "num_heads must divide model.embed_dim"),
        ({"patch_size": None}, "multiple of the patch size 16 x 16, got 24"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(model, says):
    with pytest.raises(ConfigError, match=says):
        build_modules(config(**model))


def test_activation_checkpointing_changes_memory_not_gradients():
    levels = (Level(), Level(pool=2))
    gradients = []
    for recompute in (False, True):
        predictor = PredictorConfig(width=8, depth=1, num_heads=2, level_depth=1)
        modules = build_modules(
            config(levels, activation_checkpointing=recompute, drop_path=0.3, predictor=predictor)
        ).train()
        saved = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(1) or tensor, lambda t: t
        ):
            loss = hjepa_step(modules, batch())["loss"]
        loss.backward()
        gradients.append(({n: p.grad for n, p in modules.named_parameters() if p.grad is not None}, len(saved)))
    (plain, many), (recomputed, few) = gradients
    assert few < many / 2
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-6)


def test_weights_depend_on_the_seed_alone():
    def weights(seed):
        return build_modules(Config(**{**vars(config()), "seed": seed}))["predictor"].embed.weight

    torch.manual_seed(0)
    first, state = weights(0), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # building has drawn nothing from the global generator


# Parameter groups


def test_every_trainable_parameter_is_in_exactly_one_group_with_decay_for_matrices_only():
    predictor = PredictorConfig(width=8, depth=1, num_heads=2, level_depth=1)
    modules = build_modules(config((Level(), Level(pool=2)), pos_embed="learned", layer_scale=0.1, predictor=predictor))
    groups = param_groups(modules, weight_decay=0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter): name for name, parameter in modules.named_parameters() if parameter.requires_grad}
    assert sorted(grouped) == sorted(trainable)
    assert [group["name"] for group in groups] == [
        "shared/decay",
        "shared/no_decay",
        "level_0/decay",
        "level_0/no_decay",
        "level_1/decay",
        "level_1/no_decay",
    ]
    for group in groups:
        assert group["weight_decay"] == (0.05 if group["decay"] else 0.0)
        for parameter in group["params"]:
            name = trainable[id(parameter)]
            expected = parameter.ndim > 1 and not name.endswith("bias") and not name.endswith("pos_embed")
            assert group["decay"] is expected, name
            own = ("heads", "level_blocks", "level_embed")
            levels = [level for level in (0, 1) if name.startswith(tuple(f"predictor.{part}.{level}" for part in own))]
            assert levels == ([] if group["level"] is None else [group["level"]]), name


def test_levels_share_no_head_and_a_level_of_weight_zero_gets_no_gradient():
    modules = build_modules(config((Level(), Level(pool=2, weight=0.0))))
    hjepa_step(modules, batch())["loss"].backward()
    first, second = (head.weight for head in modules["predictor"].heads)
    assert first.grad.abs().sum() > 0
    assert second.grad is None or second.grad.abs().sum() == 0


# The step


def own_layer_norm(vector, norm=None, eps=1e-5):
    centered = vector - vector.sum() / len(vector)
    normed = centered / torch.sqrt((centered * centered).sum() / len(vector) + (eps if norm is None else norm.eps))
    return normed if norm is None else normed * norm.weight + norm.bias


def own_attention(attention, tokens, num_heads):
    """Multi-head self-attention, token by token and head by head."""
    dim = tokens.shape[1]
    size = dim // num_heads
    mixed = attention.qkv.weight @ tokens.T + attention.qkv.bias[:, None]  # (3 D, tokens)
    columns = []
    for i in range(len(tokens)):
        heads = []
        for head in range(num_heads):
            rows = slice(head * size, (head + 1) * size)
            query, keys, values = mixed[:dim][rows, i], mixed[dim : 2 * dim][rows], mixed[2 * dim :][rows]
            scores = torch.stack([(query * keys[:, j]).sum() / math.sqrt(size) for j in range(len(tokens))])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            heads.append(values @ weights)
        columns.append(attention.proj.weight @ torch.cat(heads) + attention.proj.bias)
    return torch.stack(columns)


def own_block(block, tokens, num_heads):
    tokens = tokens + own_attention(
        block.attn, torch.stack([own_layer_norm(t, block.norm1) for t in tokens]), num_heads
    )
    rows = []
    for token in tokens:
        hidden = block.mlp.fc1.weight @ own_layer_norm(token, block.norm2) + block.mlp.fc1.bias
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        rows.append(token + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias)
    return torch.stack(rows)


def own_encoder(encoder, image, patches):
    """Embed ``patches`` of one image one by one, add their places, run the blocks, norm."""
    vit, tokens = encoder.vit, []
    for patch in patches:
        row, column = patch // 6, patch % 6
        pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
        kernel = vit.patch_embed.proj.weight.reshape(16, -1)
        tokens.append(kernel @ pixels + vit.patch_embed.proj.bias + vit.pos_embed[0, patch])
    tokens = torch.stack(tokens)
    for block in vit.blocks:
        tokens = own_block(block, tokens, num_heads=2)
    return torch.stack([own_layer_norm(token, vit.norm) for token in tokens])


def own_ijepa_loss(modules, pictures, context_idx, target_idx):
    """I-JEPA (arXiv:2301.08243), read from the paper: one image, one block, one patch, one number after the other."""
    predictor, terms = modules["predictor"], []
    for image, visible, blocks in zip(pictures, context_idx.tolist(), target_idx.tolist(), strict=True):
        with torch.no_grad():
            targets = own_encoder(modules["target_encoder"], image, range(36))
        context = own_encoder(modules["context_encoder"], image, visible)
        for block in blocks:
            tokens = []
            for token, patch in zip(context, visible, strict=True):
                place = hand_position(patch // 6, patch % 6, 8)
                tokens.append(predictor.embed.weight @ token + predictor.embed.bias + place)
            for patch in block:
                place = hand_position(patch // 6, patch % 6, 8)
                tokens.append(predictor.mask_token[0, 0] + place)
            tokens = torch.stack(tokens)
            for layer in predictor.blocks:
                tokens = own_block(layer, tokens, num_heads=2)
            for token, patch in zip(tokens[len(visible) :], block, strict=True):
                head = predictor.heads[0]
                answer = head.weight @ own_layer_norm(token, predictor.norm) + head.bias
                for difference in answer - own_layer_norm(targets[patch]):
                    size = difference.abs()
                    terms.append(0.5 * size * size if size < 1 else size - 0.5)
    return sum(terms) / len(terms)


def test_one_level_equals_a_loop_written_ijepa_in_loss_and_gradients():
    modules = moved(build_modules(config(predictor=PredictorConfig(width=8, depth=2, num_heads=2))))
    drawn = batch(count=2, num_targets=2)
    ours = hjepa_step(modules, drawn)["loss"]
    ours.backward()
    gradients = {name: parameter.grad for name, parameter in modules.named_parameters() if parameter.requires_grad}
    modules.zero_grad()
    reference = own_ijepa_loss(modules, drawn["images"], drawn["masks"].context_idx, drawn["masks"].target_idx)
    assert ours.item() == pytest.approx(reference.item(), abs=1e-5)
    reference.backward()
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


def test_layer_normed_targets_do_not_feel_the_scale_of_the_features():
    modules = moved(build_modules(config((Level(), Level(pool=2), Level(pool="image")))))
    targets = hjepa_step(modules, batch())["targets"]
    with torch.no_grad():
        for parameter in modules["target_encoder"].vit.norm.parameters():
            parameter.mul_(7.0)
    for before, after in zip(targets, hjepa_step(modules, batch())["targets"], strict=True):
        assert torch.allclose(before, after, atol=1e-4)
        assert torch.allclose(before.mean(dim=-1), torch.zeros(()), atol=1e-5)
        assert torch.allclose(before.square().mean(dim=-1), torch.ones(()), atol=1e-2)


def test_targets_are_pooled_first_and_normed_then():
    modules = moved(build_modules(config((Level(pool=2, depth=0.5),))))
    drawn = batch()
    features = modules["target_encoder"].features(drawn["images"], depths=(0.5,))[0]
    target = hjepa_step(modules, drawn)["targets"][0]
    top_left = drawn["masks"].target_idx[0, 0, 0].item()
    cell = torch.stack([features[0, top_left + offset] for offset in (0, 1, 6, 7)]).mean(dim=0)
    assert torch.allclose(target[0, 0, 0], own_layer_norm(cell), atol=1e-5)


def test_loss_is_the_weighted_sum_of_levels_and_regularizers():
    modules = moved(
        build_modules(config((Level(weight=1.0), Level(pool=2, weight=0.25), Level(pool="image", weight=3))))
    )
    torch.manual_seed(0)
    outputs = hjepa_step(modules, batch(), LOSSES["mse"], {"variance": 2.0, "covariance": 0.5, "sigreg": 0.125})
    by_hand = sum(
        weight * (prediction - target).square().mean()
        for weight, prediction, target in zip((1, 0.25, 3), outputs["predictions"], outputs["targets"], strict=True)
    )
    summary = outputs["context_tokens"].mean(dim=1)
    torch.manual_seed(0)
    by_hand += 2.0 * variance(summary) + 0.5 * covariance(summary) + 0.125 * sigreg(summary)
    assert outputs["loss"].item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert outputs["loss_variance"].item() == pytest.approx(variance(summary).item())


def test_equal_inputs_give_equal_outputs_and_change_nothing():
    modules = moved(
        build_modules(config((Level(), Level(pool=2, depth=0.5), Level(pool="image")), drop_path=0.2))
    ).train()
    drawn = batch()
    inputs = copy.deepcopy(drawn)
    before = {name: tensor.clone() for name, tensor in modules.state_dict().items()}
    modes = [module.training for module in modules.modules()]
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(hjepa_step(modules, drawn, regularizers={"sigreg": 1.0}))
    first, second = outputs
    assert first.keys() == second.keys()
    for name, value in first.items():
        for ours, theirs in zip(*([v] if torch.is_tensor(v) else v for v in (value, second[name])), strict=True):
            assert torch.equal(ours, theirs), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in modules.state_dict().items())
    assert modes == [module.training for module in modules.modules()]
    assert all(parameter.grad is None for parameter in modules.parameters())
    assert drawn.keys() == inputs.keys() and torch.equal(drawn["images"], inputs["images"])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn["masks"][:2], inputs["masks"][:2], strict=True))


def test_step_without_random_layers_draws_no_random_number():
    modules = build_modules(config())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    hjepa_step(modules, batch())
    assert torch.equal(torch.get_rng_state(), state)


# Losses and metrics


def test_losses_match_numbers_by_hand():
    prediction, target = torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 1.0]])
    assert LOSSES["smooth_l1"](prediction, target).item() == pytest.approx((0.125 + 1.5) / 2)
    assert LOSSES["mse"](prediction, target).item() == pytest.approx((0.25 + 4) / 2)
    # delta 0.5: 0.5 is on the seam (0.125), 2 beyond it: 0.5 * (2 - 0.25)
    assert LOSSES["huber"](prediction, target).item() == pytest.approx((0.125 + 0.875) / 2)
    assert LOSSES["cosine"](prediction, target).item() == pytest.approx(1 - 3 / math.sqrt(9.25), abs=1e-6)
    assert LOSSES["cosine"](target, -2 * target).item() == pytest.approx(2.0)


def test_configured_loss_is_the_named_one():
    assert LossConfig().type == "smooth_l1" and set(LOSSES) == {"smooth_l1", "mse", "huber", "cosine"}


def test_variance_counts_only_what_is_missing_below_one():
    # Standard deviations 2 (over 1, nothing missing), sqrt(1e-4) = 0.01 (0.99 missing) and sqrt(0.25 + 1e-4).
    samples = torch.tensor([[2.0, 3.0, 0.5], [-2.0, 3.0, -0.5], [0.0, 3.0, 0.0]])
    assert samples[:, 0].var() == 4 and samples[:, 2].var() == 0.25
    expected = (0 + 0.99 + 1 - math.sqrt(0.2501)) / 3
    assert variance(samples).item() == pytest.approx(expected, abs=1e-6)


def test_covariance_sums_squared_off_diagonals_over_d():
    # Cov(a, b) = (2 + 2) / 2 = 2 twice, Cov(a, c) = Cov(b, c) = 0: (4 + 4) / 3.
    samples = torch.tensor([[1.0, 2.0, 5.0], [-1.0, -2.0, 5.0], [0.0, 0.0, 5.0]])
    assert covariance(samples).item() == pytest.approx(8 / 3)
    assert covariance(samples.view(3, 1, 3)).item() == pytest.approx(8 / 3)


def test_sigreg_equals_a_loop_over_directions_and_points():
    samples = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.3
    torch.manual_seed(5)
    ours = sigreg(samples, num_slices=6, num_points=9).item()
    torch.manual_seed(5)
    directions = torch.randn(4, 6).double().numpy()
    points, statistics = np.linspace(-5, 5, 9), []
    for column in range(6):
        direction = directions[:, column] / math.sqrt(sum(directions[:, column] ** 2))
        projected = [sum(direction * sample) for sample in samples.double().numpy()]
        heights = []
        for t in points:
            real = sum(math.cos(t * x) for x in projected) / 20
            imaginary = sum(math.sin(t * x) for x in projected) / 20
            normal = math.exp(-(t**2) / 2)
            heights.append(((real - normal) ** 2 + imaginary**2) * normal)
        area = sum((a + b) / 2 * (10 / 8) for a, b in pairwise(heights))
        statistics.append(20 * area)
    assert ours == pytest.approx(sum(statistics) / 6, rel=1e-4)


def test_sigreg_is_small_for_a_normal_cloud_and_large_for_collapsed_shifted_or_scaled_ones():
    normal = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    good = sigreg(normal).item()
    assert good < 2
    collapsed = torch.zeros(512, 16)
    rank_one = normal[:, :1] * torch.ones(16)
    for bad in (collapsed, normal + 1, normal * 3, rank_one, normal * 0.3):
        torch.manual_seed(0)
        assert sigreg(bad).item() > 20 * good


def isotropic(count=4096, dim=16):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


def test_effective_rank_of_known_matrices():
    assert effective_rank(isotropic()) == pytest.approx(16, abs=0.1)
    direction = torch.arange(1.0, 17.0)
    assert effective_rank(isotropic(dim=1) * direction) == pytest.approx(1.0, abs=1e-3)
    # Singular values 3 and 1: the entropy of (0.75, 0.25).
    two = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    half = isotropic()
    half[:, 8:] = 0
    assert effective_rank(half) == pytest.approx(8, abs=0.1)


def test_effective_rank_does_not_see_the_mean_the_scale_or_repeated_rows():
    features = isotropic(256)
    rank = effective_rank(features)
    assert effective_rank(features + 20) == pytest.approx(rank, abs=1e-3)
    assert effective_rank(features * 1e-3) == pytest.approx(rank, abs=1e-3)
    assert effective_rank(torch.cat([features, features, features])) == pytest.approx(rank, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -37.3])
def test_effective_rank_of_constant_rows_is_one(value):
    assert effective_rank(torch.full((64, 8), value)) == 1.0
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) + value
    assert effective_rank(row.expand(1000, -1)) == 1.0


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_effective_rank_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="features"):
        effective_rank(torch.zeros(shape))


def test_context_encoder_gets_gradients_from_every_level():
    for level in (Level(pool=1), Level(pool=2, depth=0.5), Level(pool="image")):
        modules = build_modules(config((level,)))
        hjepa_step(modules, batch())["loss"].backward()
        gradient = modules["context_encoder"].vit.patch_embed.proj.weight.grad
        assert isinstance(modules["context_encoder"].vit.blocks, nn.Sequential) and gradient.abs().sum() > 0
