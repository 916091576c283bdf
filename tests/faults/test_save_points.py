"""When a run is saved, with what score and description, and which checkpoints stay."""

import json

import torch
from helpers import NOISE
from resuming import RICH, outcome, train

from hjepa_engine import load_config
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.retention import Record

#: 2 epochs of 5 iterations.
PLAIN = {**NOISE, "training.epochs": 2, "probe.enabled": "false"}


def all_saves(folder, **changes):
    """Every checkpoint of a run of 2 epochs of 5 steps, oldest first."""
    values = {
        **PLAIN,
        "checkpoint.keep_last_n": 99,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return train(folder, values), list_checkpoints(folder / "checkpoints")[::-1]


def test_a_checkpoint_says_why_it_was_saved_and_has_a_score_only_while_that_is_new(tmp_path):
    run, found = all_saves(tmp_path / "steps", checkpoint__save_every_steps=3)
    losses = [record["val/loss"] for record in outcome(run)[2] if "val/loss" in record]
    assert [(checkpoint.record.step, checkpoint.reasons, checkpoint.record.score) for checkpoint in found] == [
        (3, ["steps"], None),
        (5, ["epoch"], losses[0]),
        (6, ["steps"], None),
        (9, ["steps"], None),
        (10, ["epoch", "end"], losses[1]),
    ]
    assert [checkpoint.metrics.get("val/loss") for checkpoint in found] == [
        None,
        losses[0],
        losses[0],
        losses[0],
        losses[1],
    ]
    _, found = all_saves(tmp_path / "end", checkpoint__save_frequency=None)
    assert [(checkpoint.record.step, checkpoint.reasons) for checkpoint in found] == [(10, ["end"])]
    _, found = all_saves(tmp_path / "time", checkpoint__save_frequency=None, checkpoint__save_every_minutes=1e-9)
    assert [checkpoint.record.step for checkpoint in found] == list(range(1, 11))
    assert [checkpoint.reasons for checkpoint in found] == [["minutes"]] * 9 + [["minutes", "end"]]


def test_a_score_and_the_steps_of_an_epochs_end_survive_a_stop_right_before_it(tmp_path):
    rhythm = {"checkpoint.save_frequency": None, "checkpoint.save_every_steps": 5, "checkpoint.metric": "train/loss"}
    changes = {key.replace(".", "__"): value for key, value in rhythm.items()}
    _, whole = all_saves(tmp_path / "whole", **changes)
    train(tmp_path / "run", {**PLAIN, "checkpoint.keep_last_n": 99, **rhythm}, stop=5)
    _, found = all_saves(tmp_path / "run", **changes)
    assert found[0].reasons == ["interrupted"]
    assert [(c.record, c.reasons) for c in found[1:]] == [(c.record, c.reasons) for c in whole]
    assert whole[0].record.score is not None


def test_the_configured_checkpoints_stay(tmp_path):
    run = train(
        tmp_path,
        {
            **PLAIN,
            "training.epochs": 6,
            "checkpoint.keep_best_n": 2,
            "checkpoint.keep_every_epochs": 2,
            "checkpoint.mode": "max",
        },
    )
    losses = [record["val/loss"] for record in outcome(run)[2] if "val/loss" in record]
    foremost = sorted(range(6), key=lambda epoch: losses[epoch])[-2:]
    wanted = {2, 4, 6, 5} | {epoch + 1 for epoch in foremost}
    assert {checkpoint.record.epoch for checkpoint in list_checkpoints(tmp_path / "checkpoints")} == wanted
    index = json.loads((tmp_path / "checkpoints" / "index.json").read_text())
    assert index["latest"] == "epoch_0006_step_00000030"
    assert index["best"] == f"epoch_{foremost[-1] + 1:04d}_step_{5 * (foremost[-1] + 1):08d}"


def test_a_manifest_describes_the_run(tmp_path):
    run = train(tmp_path, RICH, stop=7)
    newest = list_checkpoints(tmp_path / "checkpoints")[0]
    assert newest.record == Record("epoch_0001_step_00000007", 7, 7, 1, False, None)
    assert load_config(tmp_path / "config.yaml") == run.config
    assert newest.config["training"]["lr"] == run.config.training.lr and newest.config["seed"] == 0
    environment = {"torch": torch.__version__, "device": "cpu", "threads": 1, "processes": 1}
    assert newest.environment == {**environment, "step": "hjepa_engine.steps.hjepa.hjepa_step"}
    assert newest.metrics["val/loss"] > 0 and newest.metric == "val/loss"
    assert newest.size == (newest.path / "state.safetensors").stat().st_size
