"""Corners of resuming and stopping that a long-lived process, a notebook or a careless configuration gets into."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import NOISE, linear_trainer, options, rows
from ignite.engine import Events
from resuming import train
from torch import nn

from hjepa_engine import TrainEvents, create_trainer, load_config
from hjepa_engine.checkpoint.folder import list_checkpoints, load_newest
from hjepa_engine.checkpoint.state import resume
from hjepa_engine.config.changes import config_changes, plain_config
from hjepa_engine.errors import CheckpointError, ConfigError, ExportError, Preempted
from hjepa_engine.export import save_encoder
from hjepa_engine.handlers import Checkpointer, OptimizerStep, Preemption
from hjepa_engine.run.folder import RunFolder

PLAIN = {**NOISE, "training.epochs": 2, "probe.enabled": "false"}
WATCHER = "[{class_path: test_run_edges.Watcher, init_args: {weights: {2: 0.5, 10: 1.0}}}]"


class Watcher:
    def __init__(self, weights):
        self.weights = weights

    def attach(self, engine):
        assert self.weights == {2: 0.5, 10: 1.0}


def saving(folder, **arguments):
    """A linear trainer that saves every step and can be stopped."""
    trainer, step = linear_trainer()
    Checkpointer(folder, every_epochs=None, every_steps=1, **arguments).attach(trainer)
    preemption = Preemption()
    preemption.attach(trainer)
    return trainer, preemption, step


def test_integer_keys_in_a_configuration_do_not_spoil_the_manifest(tmp_path):
    train(tmp_path, {**PLAIN, "handlers": WATCHER})
    checkpoint, _ = load_newest(tmp_path / "checkpoints")
    assert checkpoint.config["handlers"][0]["init_args"] == {"weights": {"2": 0.5, "10": 1.0}}
    train(tmp_path, {**PLAIN, "handlers": WATCHER, "training.epochs": 3})  # it is the same configuration when read back


def test_a_configuration_that_no_manifest_can_hold_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        Checkpointer(tmp_path, config={"x": {1, 2}})


def test_a_key_that_was_taken_out_is_a_change():
    before = load_config(None, ["--training.optimizer_args", "{eps: 1e-6, amsgrad: true}"])
    after = load_config(None, ["--training.optimizer_args", "{eps: 1e-6}"])
    (change,) = config_changes(plain_config(before), after)
    assert str(change) == "training.optimizer_args.amsgrad was True, is None now"


def test_a_run_does_not_go_on_from_the_checkpoints_of_another_one(tmp_path):
    train(tmp_path / "a", {**PLAIN, "checkpoint.checkpoint_dir": tmp_path / "shared"})
    other = {**PLAIN, "training.lr": 5e-4, "training.epochs": 1}
    train(tmp_path / "b", other)
    with pytest.raises(
        ConfigError, match=r"checkpoint_dir .*shared holds a run .*: training.lr was 0.001, is 0.0005 now"
    ):
        train(tmp_path / "b", {**other, "training.epochs": 3, "checkpoint.checkpoint_dir": tmp_path / "shared"})


def test_a_run_that_moves_its_checkpoints_keeps_its_log(tmp_path):
    train(tmp_path, PLAIN, stop=7)
    before = (tmp_path / "metrics.jsonl").read_text()
    moved = {**PLAIN, "checkpoint.checkpoint_dir": tmp_path / "elsewhere"}
    with pytest.raises(CheckpointError, match=r"give the former checkpoint_dir or --checkpoint.resume never"):
        train(tmp_path, moved)
    train(tmp_path, {**moved, "checkpoint.resume": tmp_path / "checkpoints"})
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 10


def test_an_older_checkpoint_of_the_same_run_is_not_passed_over_in_silence(tmp_path):
    train(tmp_path, PLAIN, stop=7)
    older, newest = sorted(checkpoint.path for checkpoint in list_checkpoints(tmp_path / "checkpoints"))
    with pytest.raises(ConfigError, match=r"is not the newest checkpoint of this run; to go on from it, give another"):
        train(tmp_path, {**PLAIN, "checkpoint.resume": older})
    assert train(tmp_path, {**PLAIN, "checkpoint.resume": newest}).trainer.state.iteration == 10


@pytest.mark.parametrize("name", ["config.yaml", "status.json"])
def test_never_sets_a_folder_aside_that_cannot_be_read(tmp_path, name):
    train(tmp_path, PLAIN, stop=7)
    (tmp_path / name).write_text("{no_such_key: [")
    assert train(tmp_path, {**PLAIN, "checkpoint.resume": "never"}).trainer.state.iteration == 10
    assert (tmp_path / "previous_1" / name).read_text() == "{no_such_key: ["


def test_a_trainer_that_was_interrupted_runs_again_in_the_same_process(tmp_path):
    data = rows(*[(n, 1) for n in range(6)])
    whole, _, _ = saving(tmp_path / "whole")
    whole.run(data, max_epochs=1)
    trainer, preemption, _ = saving(tmp_path / "run")
    trainer.add_event_handler(TrainEvents.LOSS_READY(once=4), lambda: preemption.request("asked"))
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted, match="asked at step 4"):
        trainer.run(data, max_epochs=1)
    assert signal.getsignal(signal.SIGINT) is former
    resume(trainer, tmp_path / "run")
    trainer.run(data[4:], max_epochs=1, epoch_length=6)
    assert trainer.state.iteration == 6
    assert torch.equal(trainer.modules["model"].weight, whole.modules["model"].weight)


def test_ctrl_c_after_another_stop_request_still_saves(tmp_path):
    trainer, _, _ = saving(tmp_path)

    def signals(engine):
        if engine.state.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    trainer.add_event_handler(TrainEvents.LOSS_READY, signals)
    with pytest.raises(Preempted, match="SIGTERM at step 3"):
        trainer.run(rows(*[(1, 1)] * 6), max_epochs=1)
    assert load_newest(tmp_path)[0].record.step == 3


def test_a_window_that_max_iters_had_cut_goes_on_with_the_mean_of_what_is_in_it(tmp_path):
    trainer, _ = linear_trainer(accumulation_steps=4)
    Checkpointer(tmp_path).attach(trainer)
    data = rows(*[(2, 0)] * 8)
    trainer.run(data, max_iters=6)
    longer, _ = linear_trainer(accumulation_steps=4)
    resume(longer, tmp_path)
    weights = []
    longer.add_event_handler(
        TrainEvents.OPTIMIZER_STEPPED, lambda e: weights.append(e.modules["model"].weight[0].item())
    )
    longer.run(data[6:], max_iters=8, epoch_length=8)
    assert trainer.modules["model"].weight[0].item() == 1 - 2 - 2 and weights == [-3 - 2]


def test_numbers_of_numpy_in_a_handlers_state_are_saved(tmp_path):
    class Best:
        def __init__(self):
            self.best = np.float64(0.25)

        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self.look)

        def look(self):
            pass

        def state_dict(self):
            return {"best": self.best, "count": np.int32(3)}

        def load_state_dict(self, state):
            self.best = state["best"]

    trainer, _, _ = saving(tmp_path)
    Best().attach(trainer)
    trainer.run(rows((1, 1)), max_epochs=1)
    assert load_newest(tmp_path)[1]["handlers"]["Best"] == {"best": 0.25, "count": 3}


def test_a_module_whose_state_is_no_tensor_is_refused_before_the_first_step(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"x": 1}

    trainer = create_trainer(
        lambda modules, batch: {"loss": modules["odd"](batch["x"]).sum()}, nn.ModuleDict({"odd": Odd(2, 1)})
    )
    OptimizerStep(torch.optim.SGD(trainer.modules.parameters(), 0.1)).attach(trainer)
    Checkpointer(tmp_path).attach(trainer)
    with pytest.raises(CheckpointError, match="weights of modules"):
        trainer.run(rows((1, 1)), max_epochs=1)
    assert trainer.state.iteration == 0


def test_an_error_keeps_its_cause(tmp_path):
    class Fails:
        def attach(self, engine):
            engine.add_event_handler(TrainEvents.LOSS_READY, self.fail)

        def fail(self):
            raise ValueError("why") from KeyError("because")

    with pytest.raises(ValueError, match="why") as raised:
        train(tmp_path, PLAIN, handlers=[Fails])
    assert isinstance(raised.value.__cause__, KeyError)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


def test_an_encoder_that_cannot_be_written_is_exit_code_4(tmp_path):
    (tmp_path / "encoder").write_text("a file")
    with pytest.raises(ExportError, match=r"cannot be written to .*encoder") as raised:
        save_encoder(nn.Linear(2, 2), tmp_path / "encoder", {})
    assert raised.value.exit_code == 4


def test_a_late_checkpoint_does_not_bring_an_ended_run_back_to_life(tmp_path):
    folder = RunFolder(load_config(None, options({**PLAIN, "run_dir": tmp_path})))
    folder.write_status("running", step=1)
    folder.write_status("stopped", step=2, exit_code=130, reason="interrupted")
    folder.write_status("running", step=3, checkpoint=tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
