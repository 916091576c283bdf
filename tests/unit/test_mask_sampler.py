"""Masks are sampled beside the step, and are those that sampling in place gives."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest
import torch
from helpers import LinearModel, linear_step
from ignite.engine import Events
from torch import nn

from hjepa_engine import TrainEvents, create_evaluator, create_trainer
from hjepa_engine.handlers import MaskSampler, OptimizerStep
from hjepa_engine.masking import MultiBlockMasks


class Counted(MultiBlockMasks):
    """Remember what was sampled, and where."""

    def __init__(self):
        super().__init__((8, 8))
        self.calls = []

    def sample(self, *draw):
        self.calls.append((draw, threading.current_thread() is threading.main_thread()))
        return super().sample(*draw)

    def in_place(self):
        """What was sampled at the moment when it was needed."""
        return [draw for draw, in_main_thread in self.calls if in_main_thread]


def batches(*sizes):
    return [{"images": torch.zeros(size, 1), "x": torch.ones(size, 1), "y": torch.ones(size, 1)} for size in sizes]


def trainer_with(sampler, accumulation_steps=1):
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(lambda modules, batch: {"loss": modules["model"].weight.sum()}, modules)
    optimizer = torch.optim.SGD(modules.parameters(), 0.1)
    trainer.attach(sampler, OptimizerStep(optimizer, accumulation_steps))
    trainer.seen = []

    @trainer.on(TrainEvents.FORWARD_STARTED)
    def the_step_takes_longer_than_the_thread():
        wait([sampler._ahead[2]])

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: trainer.seen.append(engine.state.batch["masks"])
    )
    return trainer


def assert_drawn(seen, *draws):
    """``seen`` are the masks of these batch sizes, steps and offsets, at seed 5."""
    masks = MultiBlockMasks((8, 8))
    for ours, (size, step, offset) in zip(seen, draws, strict=True):
        theirs = masks.sample(size, 5, step, offset)
        assert torch.equal(ours.context_idx, theirs.context_idx) and torch.equal(ours.target_idx, theirs.target_idx)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_only_the_first_masks_are_waited_for():
    masks = Counted()
    trainer = trainer_with(MaskSampler(masks, 5))
    trainer.run(batches(4, 4, 4, 4), max_epochs=2)
    assert_drawn(trainer.seen, *((4, step, 0) for step in range(8)))
    assert masks.in_place() == [(4, 5, 0, 0)]


def test_micro_batches_of_a_window_that_the_epoch_cuts_short_are_known_ahead():
    masks = Counted()
    trainer = trainer_with(MaskSampler(masks, 5, accumulation_steps=2), accumulation_steps=2)
    trainer.run(batches(4, 4, 4), max_epochs=2)
    assert_drawn(trainer.seen, (4, 0, 0), (4, 0, 4), (4, 1, 0), (4, 2, 0), (4, 2, 4), (4, 3, 0))
    assert len(masks.in_place()) == 1


def test_a_batch_of_another_size_is_sampled_in_place():
    masks = Counted()
    trainer = trainer_with(MaskSampler(masks, 5))
    trainer.run(batches(4, 4, 3), max_epochs=2)
    assert_drawn(trainer.seen, (4, 0, 0), (4, 1, 0), (3, 2, 0), (4, 3, 0), (4, 4, 0), (3, 5, 0))
    assert [(draw[2], draw[0]) for draw in masks.in_place()] == [(0, 4), (2, 3), (3, 4), (5, 3)]


def test_an_evaluation_gets_the_same_masks_every_time():
    masks = Counted()
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    evaluator.step = lambda modules, batch: {"loss": torch.zeros(())}
    sampler = MaskSampler(masks, 5)
    evaluator.attach(sampler)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: wait([sampler._ahead[2]]))
    seen = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch["masks"]))
    for _ in range(2):
        evaluator.run(batches(4, 4, 2))
    assert_drawn(seen, *2 * [(4, 0, 0), (4, 1, 0), (2, 2, 0)])
    assert len(masks.in_place()) == 2 * 2


def test_skipped_updates_and_epochs_that_are_cut_short_get_the_masks_of_their_step():
    masks = Counted()
    trainer = trainer_with(MaskSampler(masks, 5, accumulation_steps=2), accumulation_steps=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: trainer.terminate_epoch())

    @trainer.on(TrainEvents.GRADIENTS_READY)
    def skip():
        trainer.state.skip_update = trainer.state.iteration == 6  # the end of the first complete window

    trainer.run(batches(4, 4, 4, 4), max_epochs=2)
    assert (trainer.state.skipped_updates, trainer.state.optimizer_step) == (1, 1)
    assert_drawn(trainer.seen, (4, 0, 0), (4, 0, 0), (4, 0, 4), (4, 0, 0), (4, 0, 4))
    assert len(masks.in_place()) == 3


def test_a_resumed_run_gets_the_masks_of_its_step():
    whole = trainer_with(MaskSampler(Counted(), 5))
    whole.run(batches(*[4] * 6), max_epochs=1)
    first = trainer_with(MaskSampler(Counted(), 5))
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: first.terminate())
    first.run(batches(*[4] * 6), max_epochs=1)
    second = trainer_with(MaskSampler(Counted(), 5))
    second.load_state_dict(first.state_dict())
    second.run(batches(*[4] * 4), max_epochs=1, epoch_length=6)
    assert_drawn(second.seen, *((4, step, 0) for step in range(2, 6)))
    assert torch.equal(whole.seen[3].context_idx, second.seen[1].context_idx)


def test_a_thread_that_is_not_done_is_not_waited_for():
    may_go_on = threading.Event()

    class Slow(Counted):
        def sample(self, *draw):
            if threading.current_thread() is not threading.main_thread():
                may_go_on.wait()
            return super().sample(*draw)

    masks = Slow()
    sampler = MaskSampler(masks, 5)
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(lambda modules, batch: {"loss": modules["model"].weight.sum()}, modules)
    trainer.attach(sampler, OptimizerStep(torch.optim.SGD(modules.parameters(), 0.1)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), may_go_on.set)
    trainer.run(batches(4, 4, 4, 4), max_epochs=1)
    assert [draw[2] for draw in masks.in_place()] == [0, 1, 2, 3]


def test_an_error_in_the_thread_is_raised_where_its_masks_are_needed():
    class Broken(Counted):
        def sample(self, *draw):
            if draw[2] == 2 and threading.current_thread() is not threading.main_thread():
                raise MemoryError("no room for masks")
            return super().sample(*draw)

    trainer = trainer_with(MaskSampler(Broken(), 5))
    with pytest.raises(MemoryError, match="no room for masks"):
        trainer.run(batches(4, 4, 4, 4), max_epochs=1)
    assert trainer.state.iteration == 3 and len(trainer.seen) == 2


@pytest.mark.parametrize("end", ["terminate", "interrupt", "error"])
def test_the_thread_ends_with_the_run_however_that_ends(end):
    trainer = trainer_with(MaskSampler(Counted(), 5))

    def stop():
        assert any(thread.name.startswith("masks") for thread in threading.enumerate())
        if end == "error":
            raise KeyError("step")
        getattr(trainer, end)()

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    if end == "error":
        with pytest.raises(KeyError):
            trainer.run(batches(4, 4, 4), max_epochs=1)
    else:
        trainer.run(batches(4, 4, 4), max_epochs=1)
    assert not any(thread.name.startswith("masks") for thread in threading.enumerate())


def test_a_pickled_sampler_holds_no_thread_and_goes_on():
    sampler = MaskSampler(MultiBlockMasks((8, 8)), 5)
    trainer = trainer_with(sampler)
    copies = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: copies.append(pickle.dumps(sampler)))
    trainer.run(batches(4, 4, 4), max_epochs=1)
    again = trainer_with(pickle.loads(copies[0]))
    again.run(batches(4), max_epochs=1)
    assert_drawn(again.seen, (4, 0, 0))


def test_the_thread_does_not_keep_a_process_from_ending():
    program = """
import sys, time, types
from hjepa_engine.handlers import MaskSampler
from hjepa_engine.masking import MultiBlockMasks
engine = types.SimpleNamespace(state=types.SimpleNamespace(batch={"images": [0] * 4}, iteration=1))
sampler = MaskSampler(MultiBlockMasks((8, 8)))
sampler.sample(engine)
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (3, "")
