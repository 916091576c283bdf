"""Pretraining runs that start from encoders of other projects, and linear probes of them, by their commands."""

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers import NOISE, options, same_bits, tiny_config, weights_of
from safetensors.torch import save_file

from hjepa_engine import dump_config, load_encoder
from hjepa_engine.checkpoint.folder import load_one
from hjepa_engine.interop.huggingface import write_huggingface
from hjepa_engine.interop.timm import write_timm
from hjepa_engine.models import TargetEncoder, build_modules
from hjepa_engine.recipes import linear_probe, pretrain
from hjepa_engine.run.cli import run_command

STATS = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
#: A run that keeps its first weights: the learning rate is too small to move them.
STILL = {**NOISE, "model.num_hierarchies": 1, "training.lr": 1e-30, "training.min_lr": 0, "training.weight_decay": 0}
STILL |= {
    "model.ema.momentum": 1.0,
    "training.weight_decay_end": "null",
    "training.max_iters": 1,
    "probe.enabled": "false",
}


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a recipe's command line; standard output, last line of standard error, exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").write_text("seed: 0\n")

    def run(recipe, *words):
        words = ["--config", "plain.yaml", *words] if recipe is pretrain else words
        with pytest.raises(SystemExit) as stop:
            run_command(recipe.main, [str(word) for word in words])
        said = capsys.readouterr()
        return said.out, (said.err.splitlines() or [""])[-1], stop.value.code or 0

    return run


def meta(folder):
    """A checkpoint in Meta's layout: the modules of this project under their names."""
    modules = build_modules(tiny_config(model__num_hierarchies=1, seed=5))
    torch.nn.init.normal_(modules["target_encoder"].vit.norm.bias)
    contents = {}
    for part, theirs in (("context_encoder", "encoder"), ("target_encoder", "target_encoder")):
        weights = modules[part].vit.state_dict()
        contents[theirs] = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({**contents, "epoch": 3, "opt": {"state": {}}}, folder / "jepa.pth.tar")
    return folder / "jepa.pth.tar", modules["target_encoder"]


def encoder(seed=5):
    torch.manual_seed(seed)
    made = TargetEncoder("vit_tiny_patch16_224", 24, **SIZES)
    return made.requires_grad_(False).eval()


def hugging_face(folder):
    made = encoder()
    (folder / "hf").mkdir()
    write_huggingface(made, folder / "hf", STATS)
    return folder / "hf", made


def timm_folder(folder):
    made = encoder()
    (folder / "vit").mkdir()
    write_timm(made, folder / "vit", STATS)
    return folder / "vit", made


def timm_file(folder):
    made = encoder()
    torch.save(made.vit.state_dict(), folder / "vit.pth")
    return folder / "vit.pth", made


def own_run(folder):
    run = pretrain.build(
        tiny_config(run_dir=str(folder / "own"), training__max_iters=1, probe__enabled="false", seed=5)
    )
    run.fit()
    return folder / "own", load_encoder(folder / "own", "latest")


def own_export(folder):
    place, _ = own_run(folder)
    return place / "encoder", load_encoder(place)


KINDS = {each.__name__: each for each in (meta, hugging_face, timm_folder, timm_file, own_run, own_export)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_it(command, tmp_path, kind):
    place, made = KINDS[kind](tmp_path)
    out, line, code = command(pretrain, *options({**STILL, "run_dir": "run", "model.init_from": place}))
    assert code == 0, line
    assert f"weights from {place}" in out
    _, state = load_one(tmp_path / "run")
    assert same_bits(state["modules"]["target_encoder"], weights_of(made))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_probed(command, tmp_path, kind):
    place, _ = KINDS[kind](tmp_path)
    quick = {"data.dataset": "fake", "data.fake_size": 20, "probe.epochs": 1, "logging.progress_bar": "false"}
    quick |= {"device": "cpu", "model.num_heads": 2}
    words = ["--encoder", place, "--output", "results", *options(quick)]
    out, line, code = command(linear_probe, *words)
    assert code == 0, line
    assert "  trained encoder " in out and "  random encoder " in out and "20 images" in out
    assert "results: results/linear_probe.json" in out
    record = json.loads(Path("results/linear_probe.json").read_text())
    assert set(record["accuracy"]) == {"trained", "random", "pixels"} and record["encoder"].startswith(str(place))
    assert sorted(path.name for path in Path("results").iterdir()) == [
        "linear_probe.json",
        *(f"probe_{name}.jsonl" for name in ("pixels", "random", "trained")),
    ]


def test_a_probe_on_larger_images_interpolates_and_others_are_refused(command, tmp_path):
    place, _ = hugging_face(tmp_path)
    quick = {"data.dataset": "fake", "data.fake_size": 8, "probe.epochs": 1, "logging.progress_bar": "false"}
    out, _, code = command(linear_probe, "--encoder", place, *options({**quick, "data.image_size": "[32, 16]"}))
    assert code == 0 and "32 x 16 pixels" in out and "results:" not in out
    _, line, code = command(linear_probe, "--encoder", place, *options({**quick, "data.image_size": 30}))
    assert (code, line) == (2, f"data.image_size must be a multiple of the patches of {place} (4), got 30 x 30")
    for words, said in (
        ([], "one of --run and --encoder must be given"),
        (["--run", "x", "--encoder", "y"], "one of --run and --encoder must be given"),
        (
            ["--encoder", "y", "--checkpoint", "best"],
            "--checkpoint names one of a run: give --run, or the checkpoint's",
        ),
        (["--run", "y", "--output", "z"], "--output is for --encoder: results of a run are in its folder"),
        (["--encoder", place, "--model.depth", "3"], "model.depth is the encoder's own or of training, and cannot be"),
    ):
        _, line, code = command(linear_probe, *words)
        assert code == 2 and line.startswith(said)
    _, line, code = command(linear_probe, "--encoder", "nowhere")
    assert code == 4 and line.startswith("nowhere: there is no such file or folder; accepted are a run")


def test_an_export_that_asks_for_another_encoder_is_refused(command, tmp_path):
    place, _ = own_export(tmp_path)
    described = json.loads((place / "config.json").read_text())
    for changes, said in (
        ({"depth": 2}, "target_encoder.vit.blocks.1.norm1.weight is missing; its encoder has model.embed_dim 16"),
        ({"embed_dim": 4096, "depth": 100}, "weights, the encoder that it describes has 20,"),
        ({"checkpoint_path": "x"}, "config.json must not make timm load weights, got checkpoint_path"),
    ):
        described_now = {**described, "encoder": {**described["encoder"], **changes}}
        (place / "config.json").write_text(json.dumps(described_now))
        _, line, code = command(linear_probe, "--encoder", place, "--data.dataset", "fake")
        assert code == 4 and line.startswith(f"{place}") and said in line, line


def wrong(folder):
    """Files that do not fit the run, and what is said of each."""
    place, _ = meta(folder)
    contents = torch.load(place, weights_only=True)
    less = {name: tensor for name, tensor in contents["target_encoder"].items() if "blocks.0.mlp" not in name}
    torch.save({**contents, "target_encoder": less}, folder / "less.pth")
    broken = {name: tensor.clone() for name, tensor in contents["encoder"].items()}
    broken["module.norm.bias"][0] = float("nan")
    torch.save({**contents, "encoder": broken}, folder / "nan.pth")
    (folder / "cut.pth").write_bytes(place.read_bytes()[:-500])
    sizes = {**SIZES, "embed_dim": 20, "img_size": 24, "class_token": False, "global_pool": ""}
    wide = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_file(wide.state_dict(), folder / "wide.safetensors")
    return {
        "less.pth": "target_encoder.blocks.0.mlp.fc1.weight is missing; its encoder has model.embed_dim 16, model.depth 1",
        "nan.pth": "encoder.norm.bias has 1 weights of 16 that are NaN or infinite",
        "cut.pth": "is no file of torch.save, or is damaged; ",
        "wide.safetensors": "pos_embed is (1, 36, 20), here (1, 36, 16); its encoder has model.embed_dim 20, model.depth 1",
        "timm/vit_tiny_patch16_22": "timm has no vision transformer of that name",
    }


def test_weights_that_do_not_fit_are_exit_code_4_and_nothing_is_left(command, tmp_path):
    for name, said in wrong(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        _, line, code = command(pretrain, *options({**STILL, "run_dir": "new/run", "model.init_from": name}))
        assert code == 4 and line.startswith(f"{name}: ") and said in line, line
        assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_run_stays_where_it_is_when_weights_do_not_fit(command, tmp_path):
    wrong(tmp_path)
    assert command(pretrain, *options({**STILL, "run_dir": "run"}))[2] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = {**STILL, "run_dir": "run", "checkpoint.resume": "never", "model.init_from": "less.pth"}
    assert command(pretrain, *options(again))[2] == 4
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # A run that goes on has no use for them.
    goes_on = {**STILL, "run_dir": "run", "training.max_iters": 2, "model.init_from": "less.pth"}
    out, _, code = command(pretrain, *options(goes_on))
    assert code == 0 and "resumed step 1 " in out


def test_the_name_of_timms_weights_is_no_path_in_the_saved_configuration(command, tmp_path):
    place, _ = timm_folder(tmp_path)
    assert command(pretrain, *options({**STILL, "run_dir": "run", "model.init_from": "vit"}))[2] == 0
    assert f"init_from: {place}\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert "init_from: timm/vit_tiny\n" in dump_config(tiny_config(model__init_from="timm/vit_tiny"), absolute=True)


def test_a_probe_says_what_was_left_out_and_resized(command, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES, img_size=24, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    quick = {"data.dataset": "fake", "data.fake_size": 8, "probe.epochs": 1, "logging.progress_bar": "false"}
    quick |= {"model.num_heads": 2, "data.image_size": 32}
    out, line, code = command(linear_probe, "--encoder", "vit.pth", "--output", "results", *options(quick))
    assert code == 0, line
    notes = json.loads(Path("results/linear_probe.json").read_text())["notes"]
    assert any("cls_token dropped, with 1 positions" in note for note in notes)
    assert "resized pos_embed: 6 x 6 to 8 x 8 patches" in notes
    assert all(f"encoder: {note}\n" in out for note in notes)


def test_an_encoder_of_one_channel_asks_for_its_normalization(command, tmp_path):
    made = TargetEncoder("vit_tiny_patch16_224", 24, in_chans=1, **SIZES).vit.state_dict()
    torch.save(made, tmp_path / "vit.pth")
    torch.save({"target_encoder": made}, tmp_path / "jepa.pth.tar")
    quick = {"data.dataset": "fake", "data.fake_size": 8, "probe.epochs": 1, "logging.progress_bar": "false"}
    quick |= {"model.num_heads": 2}
    for place in ("vit.pth", "jepa.pth.tar"):
        _, line, code = command(linear_probe, "--encoder", place, *options(quick))
        said = f"data.mean and data.std must be given: {place} does not say how its images are normalized"
        assert (code, line) == (2, said)
        given = {**quick, "data.mean": "[0.5]", "data.std": "[0.5]"}
        _, line, code = command(linear_probe, "--encoder", place, *options(given))
        assert code == 0, line
