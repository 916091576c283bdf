"""What the default handlers do not do in every iteration: read tensors, which waits for a GPU, and look things up."""

import math
from collections import Counter

import pytest
import torch
from helpers import LinearModel, linear_step, rows, tiny_config
from ignite.engine import Events
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_engine import TrainEvents, create_trainer
from hjepa_engine.checkpoint.state import collect_state
from hjepa_engine.errors import GuardStop
from hjepa_engine.handlers import NonFiniteGuard, OptimizerStep, TargetEncoderEMA
from hjepa_engine.metrics import WeightedMeans
from hjepa_engine.optim import build_optimizer
from hjepa_engine.recipes import pretrain

#: What hands a tensor's values to the program: methods that reach no operator of torch on a CPU, and operators.
METHODS = {"tolist", "numpy", "cpu"}
OPERATORS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}


class Reads:
    """Counts reads of tensors, by iteration, between two batches and outside the ends of log intervals."""

    def __init__(self):
        self.counts, self.is_on, self.iteration = Counter(), False, 0

    def note(self, name):
        if self.is_on:
            self.counts[self.iteration] += 1

    def attach(self, engine):
        def begin(engine):
            self.is_on, self.iteration = True, engine.state.iteration

        def pause():
            self.is_on = False

        engine.add_event_handler(Events.ITERATION_STARTED, begin)
        for event in (TrainEvents.LOG_INTERVAL_COMPLETED, Events.GET_BATCH_STARTED):
            engine.hook(event, before=pause)

    def run(self, trainer, *args, **kwargs):
        note = self.note

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in METHODS:
                    note(name)
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.name() in OPERATORS:
                    note(function.name())
                return function(*args, **(kwargs or {}))

        with Functions(), Operators():
            return trainer.run(*args, **kwargs)


def test_every_way_to_read_a_tensor_is_counted():
    reads, values = Reads(), torch.ones(2)
    ways = [
        lambda: values[0].item(),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: bool(values[0]),
        lambda: float(values[0]),
        lambda: int(values[0]),
        lambda: values.cpu(),
        lambda: values.nonzero(),
    ]
    for number, way in enumerate(ways):
        reads.is_on, reads.iteration = True, number
        reads.run(type("Trainer", (), {"run": staticmethod(way)}))
    assert set(reads.counts) == set(range(len(ways)))


def reads_of_a_pretraining_run(tmp_path, on_device):
    """Reads in the recipe's own run, and its state at the end."""
    config = tiny_config(
        run_dir=tmp_path / "run", training__epochs=2, training__clip_grad=1.0, logging__log_frequency=1000
    )
    run = pretrain.build(config)
    if on_device:
        [guard] = [handler for handler in run.handlers if isinstance(handler, NonFiniteGuard)]
        run.trainer.detach(guard)
        NonFiniteGuard(on_device=True).attach(run.trainer)
    reads = Reads()
    reads.attach(run.trainer)
    reads.run(run.trainer, run.data, max_epochs=2)
    return reads, run.trainer.state


def test_on_a_cpu_only_the_guard_reads_and_only_loss_and_norm(tmp_path):
    # Reading a CPU's tensor waits for nothing, and a run that stops at the step itself says which of both it was.
    reads, state = reads_of_a_pretraining_run(tmp_path, on_device=False)
    assert reads.counts == dict.fromkeys(range(1, state.iteration + 1), 2)


def test_with_the_guard_on_the_device_nothing_is_read_outside_log_intervals(tmp_path):
    # As on a GPU. With fp16, and where training.non_finite is "skip", one read per optimizer step remains: how many
    # updates were made decides the next learning rate.
    reads, state = reads_of_a_pretraining_run(tmp_path, on_device=True)
    assert state.iteration > 4 and reads.counts == {}


# The guard that decides on the device


def held_run(batches, name, log_frequency, **arguments):
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(linear_step, modules, log_frequency=log_frequency)
    trainer.attach(OptimizerStep(build_optimizer(name, [{"params": list(modules.parameters())}], 0.1), **arguments))
    trainer.attach(NonFiniteGuard(on_device=True))
    return trainer


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_held_weights_are_those_of_the_last_good_step_until_the_interval_ends(name, clip_grad, bad):
    good = held_run(None, name, 1, clip_grad=clip_grad)
    good.run(rows((1, 0), (0, 2)), max_epochs=1)
    trainer = held_run(None, name, 5, clip_grad=clip_grad)
    with pytest.raises(GuardStop, match="non-finite loss or gradient at optimizer step 2; the weights are those of"):
        trainer.run(rows((1, 0), (0, 2), (bad, 0), (1, 1), (2, 2), (3, 3)))
    assert trainer.state.iteration == 5
    assert torch.equal(trainer.modules["model"].weight, good.modules["model"].weight)
    assert torch.isfinite(trainer.modules["model"].weight).all()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_without_a_bad_step_has_the_bits_of_one_without_the_guard(name):
    batches = rows((1, 0), (0, 2), (3, 1), (1, 1))
    guarded, plain = held_run(None, name, 2, clip_grad=0.5), held_run(None, name, 2, clip_grad=0.5)
    plain.detach(plain.stateful_handlers()["NonFiniteGuard"])
    for trainer in (guarded, plain):
        trainer.run(batches, max_epochs=3)
    assert torch.equal(guarded.modules["model"].weight, plain.modules["model"].weight)


def test_a_state_with_held_updates_is_never_saved():
    trainer = held_run(None, "adamw", 100)

    def save(engine):
        if engine.state.iteration == 3:
            collect_state(engine)

    trainer.add_event_handler(TrainEvents.CHECKPOINT_READY, save)
    with pytest.raises(GuardStop, match="at optimizer step 1"):
        trainer.run(rows((1, 0), (math.nan, 0), (1, 1), (1, 1)))
    assert trainer.state.iteration == 3


def test_a_run_that_is_terminated_inside_an_interval_still_says_so():
    trainer = held_run(None, "adamw", 100)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    with pytest.raises(GuardStop, match="at optimizer step 0"):
        trainer.run(rows((math.nan, 0), (1, 1), (1, 1)))


def test_what_cannot_be_held_on_the_device_is_refused():
    with pytest.raises(ValueError, match="on_device must be False with action skip or a scaler"):
        NonFiniteGuard("skip", on_device=True)
    with pytest.raises(ValueError, match="on_device must be False with action skip or a scaler"):
        NonFiniteGuard(scaled=True, on_device=True)
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(linear_step, modules)
    trainer.attach(OptimizerStep(torch.optim.RAdam(modules.parameters())), NonFiniteGuard(on_device=True))
    with pytest.raises(ValueError, match="only a fused optimizer, without a gradient scaler, can hold an update"):
        trainer.run(rows((1, 0)))


# The target encoder


def test_the_tensors_of_the_target_encoder_are_looked_up_once_per_run(monkeypatch):
    looked_up = []
    find = TargetEncoderEMA.find_tensors
    monkeypatch.setattr(TargetEncoderEMA, "find_tensors", lambda self: (looked_up.append(1), find(self)))
    trainer = held_run(None, "sgd", 100)
    target = LinearModel().requires_grad_(False)
    trainer.attach(TargetEncoderEMA(trainer.modules["model"], target, 0.5))
    trainer.run(rows((1, 0), (0, 1), (1, 1)))
    assert len(looked_up) == 1 and not torch.equal(target.weight, LinearModel().weight)


# Means


def test_means_cost_two_operations_however_many_there_are_and_take_any_mixture():
    means = WeightedMeans()
    values = {f"loss_{number}": torch.tensor(float(number)) for number in range(20)}
    means.add(values, 3)
    operators = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.append(function.name())
            return function(*args, **(kwargs or {}))

    with Operators():
        means.add(values, 1)
    assert [name for name in operators if name != "aten::detach"] == ["aten::stack", "aten::add_.Tensor"]
    means.add({"loss_4": torch.tensor(8.0, dtype=torch.bfloat16), "count": torch.tensor(2**24 + 1)}, 4)
    copied = WeightedMeans()
    copied.load_state_dict(means.state_dict())
    for each in (means, copied):
        found = each.compute()
        assert list(found) == [*values, "count"]
        assert (found["loss_4"], found["loss_5"], found["count"]) == (6.0, 5.0, 2**24 + 1)
