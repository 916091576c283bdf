"""How a run starts: on its own checkpoint, on another run's, from the beginning, or not at all."""

import json
import os
import shutil
import signal
import socket

import pytest
from helpers import NOISE, largest_difference, options, same_bits, sign_again, weights_of
from ignite.engine import Events
from PIL import Image
from resuming import Drawer, Steps, contents, outcome, train

from hjepa_engine import TrainEvents, dump_config, load_config
from hjepa_engine.build import build_schedules
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.config.changes import MAY_CHANGE, MAY_CHANGE_ELSEWHERE
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError, ConfigError, DataError
from hjepa_engine.recipes import pretrain
from hjepa_engine.run.cli import run_command
from hjepa_engine.run.folder import RunFolder

#: 2 epochs of 5 iterations.
PLAIN = {**NOISE, "training.epochs": 2, "probe.enabled": "false"}
HINT = "--checkpoint.resume never"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``python recipes/pretrain.py`` with a tiny configuration; standard output, the last line of the errors, exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_config(load_config(None, options({**PLAIN, "run_dir": "run"}))))

    def run(**changes):
        argv = options({key.replace("__", "."): value for key, value in changes.items()})
        with pytest.raises(SystemExit) as stop:
            run_command(pretrain.main, ["--config", "tiny.yaml", *argv])
        said = capsys.readouterr()
        return said.out, (said.err.splitlines() or [""])[-1], stop.value.code or 0

    return run


def saved(folder):
    return list_checkpoints(folder)


def damage(folder):
    for checkpoint in saved(folder):
        path = checkpoint.path / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")


# --- Go on, or not ---------------------------------------------------------------------------------------------------


def test_must_wants_a_checkpoint_and_auto_does_not(command, tmp_path):
    out, line, code = command(checkpoint__resume="must")
    assert (code, line) == (4, "checkpoint.resume is must, but run/checkpoints holds no checkpoint")
    assert contents(tmp_path / "run") == {}
    assert command()[2] == 0
    out, _, code = command(checkpoint__resume="must", training__epochs=3)
    assert code == 0 and "resumed step 10 (iteration 10 of 15) from run/checkpoints/epoch_0002_step_00000010" in out


def test_another_configuration_is_refused_by_its_keys_and_nothing_changes(command, tmp_path):
    train(tmp_path / "run", PLAIN, stop=7)
    before = contents(tmp_path / "run")
    changes = {"training__lr": 0.5, "model__drop_path": 0.5, "masking__num_masks": 3, "seed": 4}
    _, line, code = command(**changes)
    assert code == 2
    assert line.startswith("run_dir run holds a run with another configuration: model.drop_path was 0.0, is 0.5 now; ")
    assert line.endswith(" and 1 more; choose another --run_dir")
    with pytest.raises(ConfigError, match=r"another configuration: training.lr was 0.001, is 0.1 now; choose"):
        train(tmp_path / "run", {**PLAIN, "training.lr": 0.1})  # from Python, too
    assert before == contents(tmp_path / "run")


def test_a_folder_of_checkpoints_that_two_runs_share_does_not_mix_them(tmp_path):
    shared = {**PLAIN, "checkpoint.checkpoint_dir": str(tmp_path / "shared")}
    train(tmp_path / "one", shared, stop=7)
    with pytest.raises(ConfigError, match=r"another configuration: training.lr was 0.001, is 0.1 now"):
        train(tmp_path / "two", {**shared, "training.lr": 0.1})


OTHER = {
    "training.epochs": 4,
    "training.max_iters": 12,
    "training.early_stopping": 3,
    "training.time_limit": 60,
    "data.data_path": "elsewhere",
    "data.train_dir": "elsewhere",
    "data.val_dir": "elsewhere",
    "data.num_workers": 1,
    "data.pin_memory": "false",
    "data.on_device": "true",
    "data.max_damaged": 0.5,
    "data.max_pixels": 10_000,
    "data.allow_growth": "true",
    "model.init_from": "nowhere",
    "distributed.timeout": 5,
    "checkpoint.keep_last_n": 3,
    "logging.log_frequency": 3,
    "collapse.every": 7,
    "guard.lr_factor": 0.1,
    "probe.epochs": 3,
    "online_probe.neighbors": 3,
    "pictures.images": 2,
    "handlers": "[{class_path: resuming.Steps}]",
    "device": "auto",
}


def test_every_key_that_may_change_does_and_no_other(tmp_path, capsys):
    train(tmp_path, PLAIN, stop=7)
    known = {key if key in MAY_CHANGE else f"{key.partition('.')[0]}." for key in OTHER}
    assert {*MAY_CHANGE} == known | {"run_dir", "data.download", "data.hub_name", "model.init_parts"}
    for key, value in (*OTHER.items(), ("data.download", None)):
        config = load_config(None, options({**PLAIN, **({} if value is None else {key: value}), "run_dir": tmp_path}))
        config.data.download = value is None  # noise cannot be fetched
        folder = RunFolder(config)
        (change,) = (change for change in folder.changes() if not change.key.startswith("run_dir"))
        assert change.key.startswith(key)
        folder.refuse(folder.changes(), "it")
    capsys.readouterr()
    run = train(tmp_path, {**PLAIN, **OTHER})
    assert run.trainer.state.iteration == 12
    out = capsys.readouterr().out
    assert all(f"  {key} was " in out for key in OTHER)


def test_never_sets_the_whole_run_aside_each_time(command, tmp_path):
    assert command()[2] == 0
    first = contents(tmp_path / "run")
    out, _, code = command(checkpoint__resume="never", training__lr=0.01)
    assert code == 0 and "starting anew: the earlier run in run is in run/previous_1 now" in out
    aside = tmp_path / "run" / "previous_1"
    moved = {aside / path.relative_to(tmp_path / "run"): what for path, what in first.items()}
    assert contents(aside) == moved
    assert "run/previous_2" in command(checkpoint__resume="never")[0]
    assert contents(aside) == moved
    assert json.loads((tmp_path / "run" / "previous_2" / "status.json").read_text())["state"] == "done"
    assert len(saved(tmp_path / "run" / "checkpoints")) == 2


def test_never_sets_checkpoints_that_lie_elsewhere_aside_and_nothing_else_there(command, tmp_path):
    assert command(checkpoint__checkpoint_dir="far")[2] == 0
    (tmp_path / "far" / "thesis.txt").write_text("mine")
    before = contents(tmp_path / "far")
    assert command(checkpoint__checkpoint_dir="far", checkpoint__resume="never")[2] == 0
    far, aside = tmp_path / "far", tmp_path / "far" / "previous_1"
    del before[far / "thesis.txt"]
    assert contents(aside) == {aside / path.relative_to(far): what for path, what in before.items()}
    assert (far / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "run" / "previous_1" / "config.yaml").exists() and len(saved(far)) == 2
    shutil.rmtree(tmp_path / "run")  # the number is still taken over there
    assert command(checkpoint__checkpoint_dir="far", checkpoint__resume="never")[2] == 0
    assert contents(far / "previous_2") != {}


def test_weights_to_start_with_may_come_from_the_run_that_is_set_aside(command, tmp_path):
    assert command()[2] == 0
    _, line, code = command(checkpoint__resume="never", model__init_from="nowhere")
    assert (
        code == 4
        and line.startswith("nowhere: there is no such file or folder; accepted are a run, checkpoint")
        and not (tmp_path / "run" / "previous_1").exists()
    )
    out, _, code = command(checkpoint__resume="never", model__init_from="run")
    assert code == 0 and "weights from run/checkpoints/epoch_0002_step_00000010:" in out and "previous_1" in out


# --- Another run's checkpoint ----------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_ones_checkpoint_with_a_lower_rate(tmp_path, capsys, caplog):
    first = train(tmp_path / "first", PLAIN, stop=7)
    lower = {**PLAIN, "training.lr": 1e-4, "checkpoint.resume": str(tmp_path / "first")}
    Steps.taken.clear()
    second = train(tmp_path / "second", lower, (Steps,))
    assert Steps.taken == [build_schedules(second.config, 5).lr(step) for step in (7, 8, 9)]
    out = capsys.readouterr().out
    assert f"resumed step 7 (iteration 7 of 10) from {tmp_path}/first/checkpoints/epoch_0001_step_00000007" in out
    assert "  training.lr was 0.001, is 0.0001 now" in out
    records = [line for line in outcome(second)[2] if "train/loss" in line or "val/loss" in line]
    assert [record["step"] for record in records] == [8, 10, 10]  # a log of its own, without the other's values
    assert [("val/loss" in record, "train/loss" in record) for record in records] == [(False, True)] * 2 + [
        (True, False)
    ]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert max(record["step"] for record in outcome(first)[2]) <= 7  # it is as it was
    assert len(saved(tmp_path / "second" / "checkpoints")) == 1


@pytest.mark.parametrize(("key", "value"), [("training.optimizer", "sgd"), ("data.batch_size", 4), ("seed", 3)])
def test_a_run_does_not_go_on_from_one_that_differs_in_more(tmp_path, key, value):
    path = train(tmp_path / "first", PLAIN, stop=7).trainer.state.checkpoint
    assert not key.startswith(MAY_CHANGE_ELSEWHERE)
    with pytest.raises(ConfigError, match=f"^checkpoint.resume {path}: {key} was .*; model.init_from takes the"):
        train(tmp_path / "second", {**PLAIN, key: value, "checkpoint.resume": str(path)})
    assert contents(tmp_path / "second") == {}


def test_a_run_that_dies_before_its_first_save_goes_on_from_the_other_run_again(tmp_path):
    train(tmp_path / "first", PLAIN, stop=7)
    values = {**PLAIN, "checkpoint.resume": str(tmp_path / "first")}
    with pytest.raises(RuntimeError, match="boom"):
        train(tmp_path / "second", values, (Bomb,))
    assert saved(tmp_path / "second" / "checkpoints") == []
    assert train(tmp_path / "second", values).trainer.state.iteration == 10


class Bomb:
    def attach(self, engine):
        engine.add_event_handler(TrainEvents.LOSS_READY, self.explode)

    def explode(self):
        raise RuntimeError("boom")


# --- Where a run cannot go on ----------------------------------------------------------------------------------------


def test_a_run_without_a_usable_checkpoint_never_starts_again_unasked(command, tmp_path):
    train(tmp_path / "run", PLAIN, stop=7)
    damage(tmp_path / "run" / "checkpoints")
    for _ in range(2):
        _, line, code = command()
        assert code == 4 and line.startswith("no checkpoint in run/checkpoints is usable") and HINT in line
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"damaged_epoch_0001_step_00000005", "damaged_epoch_0001_step_00000007"}
    assert command(checkpoint__resume="never")[2] == 0
    assert names < {path.name for path in (tmp_path / "run" / "previous_1" / "checkpoints").iterdir()}


def test_checkpoints_that_have_vanished_are_missed(command, tmp_path):
    train(tmp_path / "run", PLAIN, stop=7)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for changes in ({}, {"checkpoint__checkpoint_dir": "other"}):
        _, line, code = command(**changes)
        assert code == 4 and "holds no checkpoint, but" in line and "epoch_0001_step_00000007 was saved" in line
        assert HINT in line
    assert command(checkpoint__resume="never")[2] == 0


def test_the_newest_checkpoint_is_still_known_after_a_start_that_saved_nothing(command, tmp_path):
    train(tmp_path / "run", PLAIN, stop=7)
    with pytest.raises(RuntimeError, match="boom"):
        train(tmp_path / "run", PLAIN, (Bomb,))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert command()[2] == 4


def test_epochs_of_another_length_are_an_error_of_the_data_where_a_checkpoint_does_not_describe_it(tmp_path):
    for number in range(40):
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (number, 3, 5)).save(path)
    values = {**PLAIN, "data.dataset": "imagefolder", "data.data_path": str(tmp_path / "images"), "data.batch_size": 4}
    length = train(tmp_path / "run", values, stop=4).trainer.state.epoch_length
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        sign_again(checkpoint.path, data={})
    for number in range(20):
        (tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=rf"an epoch of the data has \d batches, it had {length} when .*00000004 was"):
        train(tmp_path / "run", values)


class Keeper:
    """Has a state; what ``Keeper.value`` is."""

    value = 1

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.look)

    def look(self):
        pass

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_a_handler_whose_state_cannot_be_saved_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Keeper, "value", {1, 2})
    Steps.taken.clear()
    with pytest.raises(CheckpointError, match=r"the state cannot be saved: handlers\.Keeper\.value is of type set"):
        train(tmp_path, PLAIN, (Keeper, Steps))
    assert Steps.taken == []


def test_handlers_that_come_and_go_are_remarked_upon(tmp_path, caplog):
    train(tmp_path, PLAIN, (Drawer,), stop=3)
    train(tmp_path, PLAIN, (Keeper, Keeper))
    remarks = [record.message for record in caplog.records if record.name == "hjepa_engine.run.lifecycle"]
    assert sorted(remarks) == [
        "Keeper starts afresh: the checkpoint has no state of it",
        "Keeper_2 starts afresh: the checkpoint has no state of it",
        "the state of Drawer is not used: there is no such handler now",
    ]


def test_a_second_process_is_kept_out_while_the_first_one_lives(command, tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        folder = RunFolder(load_config("tiny.yaml"))
        folder.lock()
        os.write(write, b"1")
        signal.pause()
    try:
        os.read(read, 1)
        for changes in ({}, {"run_dir": "other", "checkpoint__checkpoint_dir": "run/checkpoints"}):
            _, line, code = command(**changes)
            assert code == 2 and f"is in use by process {child} on {socket.gethostname()}" in line
        assert contents(tmp_path / "run") == {}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert command()[2] == 0


# --- Weights alone ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run with another seed."""
    return train(tmp_path_factory.mktemp("other"), {**PLAIN, "seed": 5})


def started(tmp_path, **changes):
    """The weights that a run has at its first step."""
    found = {}

    class Look:
        def attach(self, engine: Trainer):
            engine.add_event_handler(Events.STARTED, lambda engine: found.update(weights_of(engine.modules)))

    values = {**PLAIN, "training.max_iters": 1, **{key.replace("__", "."): value for key, value in changes.items()}}
    train(tmp_path, values, (Look,))
    return found


def part(weights, name):
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def test_a_run_starts_with_the_weights_of_a_checkpoint_or_of_a_run(other, tmp_path, capsys):
    weights = weights_of(other.modules)
    places = (other.folder.path, other.trainer.state.checkpoint)
    for number, place in enumerate(places):
        assert same_bits(started(tmp_path / str(number), model__init_from=place), weights)
        out = capsys.readouterr().out
        assert f"weights from {other.trainer.state.checkpoint}:\n" in out
        for name in ("context_encoder", "target_encoder", "predictor"):
            total = len(other.modules[name].state_dict())
            assert f"  {name:16} {total:4} of {total} tensors\n" in out


def test_a_run_starts_with_an_exported_encoder_in_both_encoders(other, tmp_path, capsys):
    weights = started(tmp_path, model__init_from=other.folder.path / "encoder")
    target = weights_of(other.modules["target_encoder"])
    assert same_bits(part(weights, "target_encoder"), target) and same_bits(part(weights, "context_encoder"), target)
    assert largest_difference(part(weights, "predictor"), weights_of(other.modules["predictor"])) > 0
    assert "predictor" not in capsys.readouterr().out


def test_a_run_starts_with_the_parts_that_are_named_and_what_fits_of_them(other, tmp_path, capsys):
    plain = started(tmp_path / "plain")
    capsys.readouterr()
    weights = started(tmp_path / "parts", model__init_from=other.folder.path, model__init_parts="[predictor]")
    assert same_bits(part(weights, "predictor"), weights_of(other.modules["predictor"]))
    assert same_bits(part(weights, "context_encoder"), part(plain, "context_encoder"))
    capsys.readouterr()
    weights = started(tmp_path / "wide", model__init_from=other.folder.path, model__predictor__mlp_ratio=2)
    out = capsys.readouterr().out
    assert "    not blocks.0.mlp.fc1.weight: (64, 16) there, (32, 16) here\n" in out
    assert same_bits(part(weights, "context_encoder"), weights_of(other.modules["context_encoder"]))


def test_weights_that_are_not_there_or_do_not_fit_are_exit_code_4(command, other):
    for changes, said in (
        (
            {"model__init_parts": "[decoder]"},
            "model.init_parts: 'decoder' is not in both; the run has context_",
        ),
        (
            {"model__init_parts": "[predictor]", "model__predictor__width": 24, "model__embed_dim": 24},
            "no tensor of",
        ),
    ):
        _, line, code = command(model__init_from=other.folder.path, **changes)
        assert code == 4 and said in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_cannot_be_kept_in_memory_are_found_before_anything_is_written(command, tmp_path, split):
    for number, part in ((20, "train"), (4, "val")):
        (tmp_path / "images" / part / "cat").mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (24, 24), (9 * index, 0, 0)).save(tmp_path / "images" / part / "cat" / f"{index}.png")
    Image.new("RGB", (24, 30)).save(tmp_path / "images" / split / "cat" / "1.png")
    data = {
        "data__dataset": "imagefolder",
        "data__data_path": "images",
        "data__batch_size": 4,
        "collapse__enabled": False,
    }
    _, line, code = command(**data, data__in_memory=True, pictures__enabled=False)
    assert code == 3 and f"images/{split}/cat/1.png: 30 x 24 pixels" in line and "else --data.in_memory false" in line
    assert not (tmp_path / "run").exists()
    assert command(**data, data__in_memory=False, pictures__enabled=False)[2] == 0
