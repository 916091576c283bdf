"""Exported encoders open in other projects without this one, and compute there what they compute here."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from helpers import NOISE, options, same_bits, weights_of
from safetensors.torch import load_file, save_file

from hjepa_engine import load_config, load_encoder
from hjepa_engine.checkpoint.folder import find_checkpoint, list_checkpoints
from hjepa_engine.errors import ConfigError, ExportError
from hjepa_engine.interop import graphs
from hjepa_engine.interop.building import arguments_of, build_encoder
from hjepa_engine.interop.fit import plan_weights
from hjepa_engine.interop.reading import read_source
from hjepa_engine.interop.writing import FORMATS, export_encoder
from hjepa_engine.models import build_modules
from hjepa_engine.recipes import export
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.run.cli import run_command

IMAGES = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def trained(folder, **changes):
    """A finished run whose target encoder is not the context encoder."""
    values = {**NOISE, "model.depth": 2, "model.ema.momentum": 0.5, "probe.epochs": 1, "run_dir": folder}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    run = build(load_config(None, options(values)))
    run.fit()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(
        tmp_path_factory.mktemp("interop") / "run", data__mean="[0.1, 0.2, 0.3]", data__std="[0.4, 0.5, 0.6]"
    )


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """The folder of a format, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def exports(kind):
        return export_encoder(run.folder.path, kind, folder / kind).path

    return exports


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs a program where this project is not installed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    for path in {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}:
        for item in path.iterdir():
            if not re.search("hjepa|__editable__|easy-install", item.name) and not (packages / item.name).exists():
                (packages / item.name).symlink_to(item)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

    def call(program, cwd):
        command = [str(python), "-c", program]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


PROGRAM = """if True:
    import importlib.util
    assert importlib.util.find_spec("hjepa_engine") is None
    import numpy, onnxruntime, timm, torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoImageProcessor, AutoModel, IJepaModel
    images = load_file("images.safetensors")["images"]
    found = {}
    with torch.no_grad():
        model = AutoModel.from_pretrained("huggingface")
        assert type(model) is IJepaModel
        processor = AutoImageProcessor.from_pretrained("huggingface")
        print(list(processor.image_mean), list(processor.image_std), dict(processor.size))
        for size in (1, 2, 5):
            found[f"huggingface {size}"] = model(images[:size]).last_hidden_state
        model = timm.create_model("local-dir:timm", pretrained=True).eval()
        print(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std", "input_size")))
        found["timm 5"] = model(images)
        session = onnxruntime.InferenceSession("onnx/model.onnx")
        program = torch.export.load("torch_export/model.pt2").module()
        for size in (1, 2, 5):
            found[f"onnx {size}"] = torch.from_numpy(session.run(["tokens"], {"images": images[:size].numpy()})[0])
            found[f"torch_export {size}"] = program(images[:size])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, "found.safetensors")
    print(*CARDS, sep="\\n")
"""


def code_of(card):
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


@pytest.mark.slow
def test_all_formats_open_without_this_project_and_compute_the_same(run, exports, elsewhere):
    folder = exports("timm").parent
    save_file({"images": IMAGES}, folder / "images.safetensors")
    cards = [code_of(exports(kind) / "README.md") for kind in FORMATS if kind != "safetensors"]
    run_cards = "".join(f"exec({card!r}); print(tuple(tokens.shape))\n" for card in cards)
    out = elsewhere(PROGRAM.replace('    print(*CARDS, sep="\\n")\n', "") + run_cards, folder)
    mean, std, card = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "(1, 36, 16)"
    assert out.splitlines() == [
        f"{list(mean)} {list(std)} {{'height': 24, 'width': 24}}",
        f"{mean} {std} (3, 24, 24)",
        *[card] * 4,
    ]
    tokens, found = load_encoder(run.folder.path)(IMAGES), load_file(folder / "found.safetensors")
    limits = {"huggingface": 1e-5, "timm": 1e-6, "onnx": 1e-4, "torch_export": 1e-6}
    assert len(found) == 10
    for name, tensor in found.items():
        kind, size = name.split()
        torch.testing.assert_close(tensor, tokens[: int(size)], atol=limits[kind], rtol=0)


@pytest.mark.parametrize("kind", ["safetensors", "timm", "huggingface"])
def test_what_is_exported_and_read_again_is_equal_bit_for_bit(run, exports, kind):
    source = read_source(str(exports(kind)))
    again = build_encoder(source, arguments_of(source))
    target = weights_of(run.modules["target_encoder"])
    assert same_bits(weights_of(again), target)
    assert source.stats == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    modules = build_modules(load_config(run.folder.path / "config.yaml"))
    plan_weights(modules, source).apply()
    assert same_bits(weights_of(modules["context_encoder"]), target)
    assert same_bits(weights_of(modules["target_encoder"]), target)


def test_the_context_encoder_and_any_checkpoint_can_be_exported(run, tmp_path, capsys):
    words = ["--run", str(run.folder.path), "--format", "safetensors", "--output", str(tmp_path / "context")]
    export.main([*words, "--module", "context_encoder", "--checkpoint", "best"])
    size = sum(path.stat().st_size for path in (tmp_path / "context").iterdir())
    name = find_checkpoint(run.folder.path, "best").record.name
    assert capsys.readouterr().out == (
        f"{tmp_path}/context: safetensors, {size / 1e3:.1f} kB, context_encoder of checkpoint {name}\n"
    )
    exported = load_file(tmp_path / "context" / "model.safetensors")
    best = load_encoder(run.folder.path, "best", module="context_encoder")
    assert same_bits(exported, weights_of(best))
    assert not same_bits(exported, weights_of(run.modules["target_encoder"]))
    assert "The `context_encoder` of an H-JEPA" in (tmp_path / "context" / "README.md").read_text()


def test_the_card_says_what_the_run_says(run, exports):
    card = (exports("huggingface") / "README.md").read_text()
    results = json.loads((run.folder.path / "status.json").read_text())["results"]
    for line in (
        "| data | fake, 40 images |",
        "| trained | 2 of 2 epochs, 10 steps with batches of 8 |",
        f"| linear probe | {100 * results['trained']:.1f} % |",
        f"| linear probe of raw pixels | {100 * results['pixels']:.1f} % |",
        "| images | 24 x 24 pixels, 3 channels |",
        "| normalization | pixels from 0 to 1, minus 0.1, 0.2, 0.3, divided by 0.4, 0.5, 0.6 |",
    ):
        assert line in card.splitlines()
    assert re.search(r"^\| `val/loss` \| [\d.]+ \|$", card, re.MULTILINE)


def test_the_card_has_figures_of_the_weights_that_were_measured_alone(run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run.folder.path, folder)
    saved = [checkpoint.record.name for checkpoint in list_checkpoints(folder / "checkpoints")]
    assert len(saved) == 2

    def probes(number, checkpoint):
        path = export_encoder(folder, "safetensors", tmp_path / str(number), checkpoint=checkpoint).path
        return [line for line in (path / "README.md").read_text().splitlines() if "linear probe" in line]

    final = probes(0, None)
    assert len(final) == 3 and probes(1, saved[0]) == final and probes(2, saved[1]) == []
    record = {"checkpoint": saved[1], "accuracy": {"trained": 0.125}}
    (folder / "linear_probe.json").write_text(json.dumps(record))
    assert probes(3, saved[1]) == ["| linear probe | 12.5 % |"] and probes(4, None) == final
    (folder / "checkpoints" / saved[0] / "manifest.json").write_bytes(b"{}")
    path = export_encoder(folder, "safetensors", tmp_path / "5").path
    assert "| trained |" not in (path / "README.md").read_text() and not caplog.messages


def test_it_is_said_which_weights_were_taken(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run.folder.path, folder)
    words = ["--run", str(folder), "--format", "safetensors", "--output"]
    export.main([*words, str(tmp_path / "one")])
    assert capsys.readouterr().out.endswith(" kB, the exported encoder\n")
    shutil.rmtree(folder / "encoder")
    export.main([*words, str(tmp_path / "two")])
    newest = find_checkpoint(folder, "latest").record.name
    assert capsys.readouterr().out.endswith(f", target_encoder of checkpoint {newest}\n")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, kind):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hjepa_engine.interop.writing.write_card", stop)
    monkeypatch.setattr(graphs.torch.export, "export", stop)
    monkeypatch.setattr(graphs.torch.onnx, "export", stop)
    (tmp_path / f".{kind}.tmp").mkdir()  # of one that was killed
    (tmp_path / f".{kind}.tmp" / "half").write_text("x")
    with pytest.raises(KeyboardInterrupt):
        export_encoder(run.folder.path, kind, tmp_path / kind)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_in_one_line(run, tmp_path, monkeypatch):
    folder = run.folder.path
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    for said, arguments in {
        "--format must be one of safetensors, timm, huggingface, onnx, torch_export, got 'keras'": (folder, "keras"),
        f"--output {mine} holds something already: give another one, or remove it": (
            folder,
            "timm",
            tmp_path / "mine",
        ),
        f"{tmp_path}/none is no run folder: config.yaml is missing": (tmp_path / "none", "timm"),
        "--format onnx needs onnx and onnxscript: pip install 'hjepa-engine[export]'": (folder, "onnx"),
    }.items():
        with pytest.raises((ConfigError, ExportError)) as error:
            export_encoder(*arguments)
        assert str(error.value) == said
    with pytest.raises(
        ConfigError, match="--module must be an encoder, context_encoder or target_encoder, got 'predictor'"
    ):
        export_encoder(folder, "timm", tmp_path / "x", module="predictor")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not (folder / "export").exists()


def test_what_ijepa_cannot_express_is_refused(tmp_path):
    for changes, said in (
        ({"model__layer_scale": 0.1}, r"IJepaModel of Hugging Face has no layer scale \(model\.layer_scale\)"),
        ({"model__encoder_type": "vit_base_patch16_clip_quickgelu_224"}, "IJepaModel of Hugging Face has no "),
        ({"model__stem": "conv"}, r"IJepaModel of Hugging Face has no model\.stem conv: choose another --format"),
    ):
        folder = tmp_path / str(len(said))
        trained(folder, probe__enabled="false", training__max_iters=1, **changes)
        with pytest.raises(ExportError, match=said):
            export_encoder(folder, "huggingface")
        assert not (folder / "export").exists() or not any((folder / "export").iterdir())


def test_a_conv_stem_is_read_back_and_leaves_by_the_formats_that_have_a_place_for_it(tmp_path):
    trained(tmp_path / "run", probe__enabled="false", training__max_iters=1, model__stem="conv")
    with pytest.raises(ExportError, match=r"timm's vision transformers have no model\.stem conv"):
        export_encoder(tmp_path / "run", "timm")
    expected = load_encoder(tmp_path / "run")(IMAGES)
    for place in (tmp_path / "run", export_encoder(tmp_path / "run", "safetensors").path):
        source = read_source(str(place))
        assert same_bits({"": build_encoder(source, arguments_of(source))(IMAGES)}, {"": expected})
    program = torch.export.load(next(export_encoder(tmp_path / "run", "torch_export").path.glob("*.pt2"))).module()
    assert torch.allclose(program(IMAGES), expected, atol=1e-5)


def test_norms_that_timm_has_not_are_refused_and_hugging_face_has_them(tmp_path):
    trained(tmp_path, probe__enabled="false", training__max_iters=1, model__norm_eps=1e-3)
    with pytest.raises(ExportError, match=r"timm's vit_tiny_patch16_224 has model\.norm_eps 1e-06, the run 0\.001"):
        export_encoder(tmp_path, "timm")
    source = read_source(str(export_encoder(tmp_path, "huggingface").path))
    again = build_encoder(source, arguments_of(source))
    assert same_bits({"": again(IMAGES)}, {"": load_encoder(tmp_path)(IMAGES)})


def test_the_command_ends_with_its_exit_code_and_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(export.main, ["--run", str(tmp_path), "--format", "timm"])
    assert (stop.value.code, capsys.readouterr().err) == (4, f"{tmp_path} is no run folder: config.yaml is missing\n")


@pytest.mark.parametrize("kind", ["timm", "huggingface", "torch_export"])
def test_an_export_computes_what_the_run_computes(run, exports, kind, monkeypatch):
    monkeypatch.chdir(exports(kind).parent)
    if kind == "timm":
        model = timm.create_model("local-dir:timm", pretrained=True).eval()
    elif kind == "huggingface":
        found = pytest.importorskip("transformers").AutoModel.from_pretrained("huggingface").eval()
        model = lambda images: found(images).last_hidden_state  # noqa: E731
    else:
        model = torch.export.load("torch_export/model.pt2").module()
    encoder = load_encoder(run.folder.path)
    for size in (1, 2, 5):
        torch.testing.assert_close(model(IMAGES[:size]), encoder(IMAGES[:size]), atol=1e-6, rtol=0)
