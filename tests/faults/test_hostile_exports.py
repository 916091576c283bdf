"""Exported encoders and states of others, made by an enemy: refused with one line, whatever way they come in."""

import json
import os

import pytest
import torch
from helpers import LinearModel, linear_trainer, same_bits, save_state, weights_of
from test_hostile_checkpoints import LIES, gadgets, in_a_child, link_to, report, torch_files
from torch import nn

from hjepa_engine.checkpoint.state import resume
from hjepa_engine.errors import CheckpointError, ExportError
from hjepa_engine.export import load_encoder, save_encoder
from hjepa_engine.interop.fit import plan_weights
from hjepa_engine.interop.own import read_own
from hjepa_engine.models.encoder import TargetEncoder

ENCODER = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def exported(tmp_path):
    encoder = TargetEncoder(**ENCODER)
    save_encoder(encoder, tmp_path / "run" / "encoder", {"encoder": ENCODER})
    return encoder


def describe(**more):
    return lambda place: place.write_text(json.dumps({"encoder": ENCODER | more}))


def write(data):
    return lambda place: place.write_bytes(data)


ENCODERS = {
    f"{what} for {name}": (name, make)
    for name in ("config.json", "model.safetensors")
    for what, make in {
        "a pipe": os.mkfifo,
        "a folder": os.mkdir,
        "a link to /dev/zero": link_to("/dev/zero"),
        "nothing": lambda place: None,
        "a pickle": write(gadgets("canary")["os.system"]),
        "1 GB of nothing": lambda place: (place.touch(), os.truncate(place, 2**30)),
        "deep nesting": write(b"[" * 10**6),
    }.items()
}
ENCODERS |= {
    f"config.json with {more}": ("config.json", describe(**more))
    for more in (
        {"embed_dim": 2**20},
        {"img_size": 2**20},
        {"in_chans": 10**9},
        {"embed_dim": -8},
        {"depth": 0},
        {"name": "os.system"},
        {"name": ["x"]},
        {"embed_dim": "8"},
        {"nonsense": 1},
        {"checkpoint_path": "/etc/passwd"},
        {"num_heads": 0},
    )
}
ENCODERS |= {f"weights: {name}": ("model.safetensors", write(LIES[name])) for name in LIES if "structure" not in name}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_exported_encoder_is_as_harmless(tmp_path, name):
    exported(tmp_path)
    run = tmp_path / "run"
    assert load_encoder(run) is not None
    file, make = ENCODERS[name]
    (run / "encoder" / file).unlink()
    make(run / "encoder" / file)
    error, seconds, grown = in_a_child(lambda: report(run, run))["load_encoder"]
    assert error and "TRACEBACK" not in error, error
    assert len(error) < 1000 and "\n" not in error
    assert seconds < 5 and grown < 1000, (seconds, grown)


@pytest.mark.parametrize(
    "state",
    [
        *([], {}, 5, None, "modules", {"modules": 5}, {"modules": {"model": 5}}, {"modules": {"model": {"weight": 5}}}),
        {"modules": {"model": {"weight": torch.ones(2)}}, "handlers": 5, "ranks": [{"handlers": {}}]},
    ],
)
def test_a_state_that_is_none_of_a_run_is_refused(tmp_path, state):
    (tmp_path / "checkpoints").mkdir()
    save_state(tmp_path / "checkpoints", state, 1)
    trainer, _ = linear_trainer()
    before = weights_of(trainer.modules)
    with pytest.raises(CheckpointError):
        resume(trainer, tmp_path / "checkpoints")
    assert same_bits(weights_of(trainer.modules), before)
    if not isinstance(state, dict) or "handlers" not in state:
        for load in (read_own, lambda path: plan_weights(nn.ModuleDict({"model": LinearModel()}), read_own(path))):
            with pytest.raises(CheckpointError):
                load(tmp_path)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_a_description_cannot_make_timm_load_anything(tmp_path, argument):
    exported(tmp_path)
    evil = tmp_path / "evil.pth"
    evil.write_bytes(torch_files(tmp_path / "canary")["torch legacy, call"])
    value = {"checkpoint_path": str(evil), "pretrained": True}.get(argument, {"file": str(evil)})
    describe(**{argument: value})(tmp_path / "run" / "encoder" / "config.json")
    with pytest.raises(ExportError, match=f"must not make timm load weights, got {argument}"):
        load_encoder(tmp_path / "run")
    assert not (tmp_path / "canary").exists()
