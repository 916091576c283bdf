import re
import weakref
from collections import namedtuple

import pytest
import torch
from helpers import (
    ROOT,
    LinearModel,
    linear_step,
    linear_trainer,
    pretraining,
    rows,
    same_bits,
    tiny_config,
    weights_of,
)
from ignite.engine import Engine, Events
from torch import nn

from hjepa_engine import TrainEvents, create_evaluator, create_trainer
from hjepa_engine.build import build_masks
from hjepa_engine.handlers import CollapseGuard, MaskSampler, MetricAverager, OptimizerStep, StepSeed, Validation
from hjepa_engine.state import Metrics, TrainState, Window, accumulation_window
from hjepa_engine.utils.tensors import detach, move_to

BATCHES = rows((1, 0), (0, 1), (1, 1))


LOADING = {Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.DATALOADER_STOP_ITERATION}


class Recorder:
    """Write down every event that fires."""

    def __init__(self, events=(*TrainEvents, *Events), skipped=LOADING):
        skipped = {*skipped, Events.EXCEPTION_RAISED}  # its handlers get the error too
        self.events, self.seen = [event for event in events if event not in skipped], []

    def attach(self, engine):
        for event in self.events:
            engine.add_event_handler(event, lambda engine, name=event.name: self.seen.append(name))


def validation():
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    MetricAverager(prefix="").attach(evaluator)
    return Validation(evaluator, BATCHES)


def test_the_timeline_of_a_run_is_the_documented_one():
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(linear_step, modules, log_frequency=2)
    recorder = Recorder()
    recorder.attach(trainer)
    OptimizerStep(torch.optim.SGD(modules.parameters(), 0.1), accumulation_steps=2).attach(trainer)
    validation().attach(trainer)
    trainer.run(BATCHES, max_epochs=2)
    forward = ["ITERATION_STARTED", "FORWARD_STARTED", "FORWARD_COMPLETED", "LOSS_READY", "BACKWARD_COMPLETED"]
    # A window of micro-batches is open behind the first of two: no point to save at.
    accumulated = [*forward, "UPDATE_COMPLETED", "ITERATION_COMPLETED", "ITERATION_FINALIZED"]
    stepped = [*forward, "GRADIENTS_READY", "OPTIMIZER_STEPPED", "UPDATE_COMPLETED", "ITERATION_COMPLETED"]
    window = ["LOG_INTERVAL_COMPLETED", "METRICS_READY", "LOG_METRICS"]
    committed = ["ITERATION_FINALIZED", "CHECKPOINT_READY"]
    epoch_ends = ["EPOCH_COMPLETED", "VALIDATION_COMPLETED", "LOG_METRICS", "EPOCH_FINALIZED", "CHECKPOINT_READY"]
    first = ["EPOCH_STARTED", *accumulated, *stepped, *committed, *stepped, *window, *committed, *epoch_ends]
    # Optimizer steps 3 and 4: the second window of the log ends with step 4, which is the epoch's end too.
    assert recorder.seen == ["STARTED", "LOG_METRICS", *first, *first, "COMPLETED", "RUN_FINALIZED"]


def test_the_pseudocode_of_the_documentation_fires_the_events_that_a_run_fires():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pseudocode = re.search(r"^## One iteration$.*?^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL).group(1)
    lines = re.findall(r"^ *([A-Z_]{4,})( \*)?(?: |$)", pseudocode, re.MULTILINE)
    trainer = create_trainer(linear_step, nn.ModuleDict({"model": LinearModel()}))
    recorder = Recorder(skipped=())
    recorder.attach(trainer)
    OptimizerStep(torch.optim.SGD(trainer.modules.parameters(), 0.1)).attach(trainer)
    validation().attach(trainer)
    trainer.run(BATCHES[:1])
    assert [name for name, _ in lines] == recorder.seen
    assert {name for name, star in lines if star} == {event.name for event in TrainEvents} - {"PREEMPTED"}


def test_committed_events_come_last_whoever_attached_when():
    trainer, _ = linear_trainer()
    seen = []

    def late(engine):
        if engine.state.iteration == 1:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("attached during the run"))
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append("attached during the run"))

    trainer.add_event_handler(TrainEvents.CHECKPOINT_READY, lambda: seen.append("save point"))
    trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, lambda: seen.append("iteration committed"))
    trainer.add_event_handler(TrainEvents.EPOCH_FINALIZED, lambda: seen.append("epoch committed"))
    trainer.add_event_handler(TrainEvents.METRICS_READY, lambda: seen.append("metrics"))
    trainer.add_event_handler(TrainEvents.LOG_METRICS, lambda: seen.append("record"))
    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, lambda: seen.append("window"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, late)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("last attached"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append("last attached"))
    trainer.run(BATCHES[:2])
    measured = ["window", "metrics", "record"]
    iteration = ["last attached", "attached during the run", *measured, "iteration committed", "save point"]
    epoch = ["last attached", "attached during the run", "record", "epoch committed", "save point"]
    assert seen == ["record", *iteration, *iteration, *epoch]


def test_the_iteration_is_committed_after_handlers_that_stop_the_run():
    trainer, _ = linear_trainer()
    committed = []
    trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, lambda engine: committed.append(engine.state.iteration))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    trainer.run(BATCHES)
    assert committed == [1, 2]


@pytest.mark.parametrize(
    ("accumulation_steps", "log_frequency", "length", "ends"),
    [
        (1, 2, {"max_epochs": 2}, [2, 4, 5, 6, 8, 10]),
        (2, 2, {"max_epochs": 2}, [4, 5, 7, 10]),  # steps end at iterations 2, 4, 5, 7, 9, 10
        (1, 50, {"max_epochs": 2}, [5, 10]),
        (1, 3, {"max_iters": 7}, [3, 5, 6, 7]),
    ],
)
def test_log_windows_end_at_multiples_of_log_frequency_and_with_epochs_and_runs(
    accumulation_steps, log_frequency, length, ends
):
    trainer, _ = linear_trainer(accumulation_steps, log_frequency=log_frequency)
    seen = []
    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, lambda engine: seen.append(engine.state.iteration))
    trainer.run(rows(*[(1, 0)] * 5), **length)
    assert seen == ends


def test_a_skipped_update_does_not_end_a_second_window_at_the_same_step():
    trainer, _ = linear_trainer(log_frequency=2)
    seen = []

    def skip(engine):
        engine.state.skip_update = engine.state.iteration == 3

    trainer.add_event_handler(TrainEvents.GRADIENTS_READY, skip)
    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, lambda engine: seen.append(engine.state.iteration))
    trainer.run(rows(*[(1, 0)] * 6))
    assert seen == [2, 5, 6]  # iteration 3 is dropped: steps 2 and 4 end at iterations 2 and 5


@pytest.mark.parametrize(
    ("epoch_length", "accumulation_steps", "max_iters", "sizes"),
    [
        (5, 2, None, [2, 2, 1, 2, 2, 1]),
        (4, 2, None, [2, 2, 2, 2]),
        (3, 5, None, [3, 3]),
        (5, 1, None, [1] * 10),
        (5, 2, 8, [2, 2, 1, 2, 1]),
        (5, 3, 4, [3, 1]),
        (5, 3, 7, [3, 2, 2]),
        (4, 4, 2, [2]),
    ],
)
def test_windows_divide_a_run_without_crossing_epochs(epoch_length, accumulation_steps, max_iters, sizes):
    number = max_iters or 2 * epoch_length
    windows = [accumulation_window(i, epoch_length, accumulation_steps, max_iters) for i in range(1, number + 1)]
    assert windows == [Window(place, size) for size in sizes for place in range(size)]
    assert [window.is_last for window in windows].count(True) == len(sizes)


def test_metrics_know_what_was_written_since_a_moment():
    metrics = Metrics()
    metrics["a"] = 1.0
    metrics.update({"b": 2.0}, c=3.0)
    fresh, now = metrics.since(0)
    assert fresh == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert metrics.since(now) == ({}, now)
    metrics["a"] = 1.0  # an equal value is a new one
    assert metrics.since(now)[0] == {"a": 1.0}
    assert metrics == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_output_has_its_graph_for_the_backward_pass_and_none_afterwards():
    def step(modules, batch):
        tokens = modules["model"](batch["x"])
        return {"loss": tokens.mean(), "levels": [tokens, tokens * 2], "note": "kept"}

    trainer, _ = linear_trainer(step=step)
    graphs = {}
    for event in (TrainEvents.LOSS_READY, TrainEvents.OPTIMIZER_STEPPED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(
            event,
            lambda engine, name=event.name: graphs.update(
                {name: [t.requires_grad for t in (engine.state.output["loss"], *engine.state.output["levels"])]}
            ),
        )
    trainer.run(BATCHES[:1])
    assert graphs == {
        "LOSS_READY": [True] * 3,
        "OPTIMIZER_STEPPED": [True] * 3,
        "ITERATION_COMPLETED": [False] * 3,
    }
    assert trainer.state.output["note"] == "kept"
    assert trainer.state.output["grad_norm"].item() == 1.0


def test_detach_reaches_tensors_in_lists():
    weight = torch.ones(2, requires_grad=True)
    cut = detach({"loss": weight.sum(), "levels": [weight * 2, [weight * 3]], "name": "x"})
    assert not cut["loss"].requires_grad
    assert not cut["levels"][0].requires_grad
    assert not cut["levels"][1][0].requires_grad
    assert cut["name"] == "x"


Pair = namedtuple("Pair", "first second")


def test_every_tensor_of_a_batch_reaches_the_device():
    tensor = torch.ones(1)
    batch = {"images": tensor, "masks": Pair(tensor, [tensor, (tensor, "word")]), "names": ["a"], "count": 3}
    moved = move_to(batch, torch.device("meta"))
    assert isinstance(moved["masks"], Pair)
    tensors = (moved["images"], moved["masks"].first, moved["masks"].second[0], moved["masks"].second[1][0])
    assert [t.device.type for t in tensors] == ["meta"] * 4
    assert (moved["masks"].second[1][1], moved["names"], moved["count"]) == ("word", ["a"], 3)
    assert batch["images"].device.type == "cpu"


def test_steps_and_handlers_see_the_moved_batch(monkeypatch):
    seen = []
    monkeypatch.setattr("hjepa_engine.engine.move_to", lambda batch, device: {"moved to": str(device), **batch})
    trainer = create_trainer(lambda modules, batch: seen.append(batch["moved to"]) or {}, nn.ModuleDict())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch["moved to"]))
    trainer.run([{"x": 1}])
    assert seen == ["cpu", "cpu"]


def test_a_trainer_is_an_ignite_engine_that_trains_its_modules():
    modules = nn.ModuleDict({"model": LinearModel()}).eval()
    trainer = create_trainer(linear_step, modules)
    assert isinstance(trainer, Engine)
    assert trainer.modules is modules
    trainer.run(BATCHES)
    assert modules.training
    assert torch.equal(modules["model"].weight, torch.ones(2))  # without an OptimizerStep it only computes


def test_the_state_of_both_engines_declares_what_handlers_share_and_lasts_over_runs():
    trainer, _ = linear_trainer()
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    for engine in (trainer, evaluator):
        state = engine.state
        assert type(state) is TrainState and set(TrainState.__annotations__) <= vars(state).keys()
        engine.run(BATCHES)
        assert engine.state is state


def test_attach_calls_the_attach_of_each_handler_and_returns_the_engine():
    trainer, _ = linear_trainer()
    guard, recorder = CollapseGuard([]), Recorder()
    assert trainer.attach(guard, recorder) is trainer
    assert "CollapseGuard" in trainer.stateful_handlers()
    trainer.run(BATCHES[:1])
    assert recorder.seen[0] == "STARTED"


@pytest.mark.parametrize("wrong", [CollapseGuard, [CollapseGuard([])], None, print])
def test_what_is_no_handler_is_refused_before_anything_is_attached(wrong):
    trainer, _ = linear_trainer()
    with pytest.raises(TypeError, match=r"a handler must be an object with attach\(engine\), got"):
        trainer.attach(CollapseGuard([]), wrong)
    assert "CollapseGuard" not in trainer.stateful_handlers()


def test_log_frequency_must_be_positive():
    with pytest.raises(ValueError, match="log_frequency must be at least 1, got 0"):
        create_trainer(linear_step, nn.ModuleDict(), log_frequency=0)


def test_filters_count_optimizer_steps():
    trainer, _ = linear_trainer(accumulation_steps=2)
    seen = []
    for event in (
        TrainEvents.OPTIMIZER_STEPPED(every=2),
        TrainEvents.OPTIMIZER_STEPPED(once=3),
        TrainEvents.METRICS_READY(every=4),
        TrainEvents.ITERATION_FINALIZED(every=6),
    ):
        trainer.add_event_handler(
            event, lambda engine: seen.append((engine.state.optimizer_step, engine.state.iteration))
        )
    trainer.run(rows(*[(1, 0)] * 8))
    assert seen == [(2, 4), (3, 6), (3, 6), (4, 8), (4, 8)]


def test_the_engine_saves_the_clock_of_the_schedules():
    trainer, _ = linear_trainer(accumulation_steps=2)
    trainer.run(rows(*[(1, 0)] * 5))
    state = trainer.state_dict()
    assert (state["optimizer_step"], state["iteration"]) == (3, 5)
    restored, _ = linear_trainer(accumulation_steps=2)
    restored.load_state_dict(state)
    assert (restored.state.optimizer_step, restored.state.iteration) == (3, 5)


def test_an_evaluator_needs_no_gradients_and_changes_no_weights():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    modules, seen = nn.ModuleDict({"model": net}), []

    def step(modules, batch):
        seen.append((torch.is_grad_enabled(), net.training, net[1].training))
        return {"loss": modules["model"](batch["x"]).mean()}

    before = weights_of(modules)
    evaluator = create_evaluator(step, modules)
    MetricAverager(prefix="").attach(evaluator)
    first = evaluator.run(BATCHES).metrics["loss"]
    second = evaluator.run(BATCHES).metrics["loss"]
    assert seen == [(False, False, False)] * 6
    assert first == second
    assert same_bits(before, weights_of(modules))
    assert all(parameter.grad is None for parameter in modules.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluator_restores_the_mode_of_the_modules(training):
    modules = nn.ModuleDict({"model": LinearModel()}).train(training)
    create_evaluator(linear_step, modules).run(BATCHES)
    assert modules["model"].training is training


def test_an_evaluator_restores_the_mode_of_every_module_on_its_own():
    modules = nn.ModuleDict({"frozen": LinearModel().eval(), "model": LinearModel()})
    create_evaluator(linear_step, modules).run(BATCHES)
    assert (modules["frozen"].training, modules["model"].training) == (False, True)


def test_evaluator_metrics_start_anew_with_every_run():
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    MetricAverager(prefix="").attach(evaluator)
    evaluator.state.metrics["old"] = 1.0
    assert evaluator.run(rows((2, 0), (4, 0))).metrics == {"loss": 3.0}
    assert evaluator.run(rows((1, 0))).metrics == {"loss": 1.0}


def test_an_unchanged_model_has_the_same_validation_loss_bit_for_bit_in_every_epoch():
    run = pretraining(tiny_config())
    trainer = create_trainer(run.trainer.step, run.trainer.modules)
    masks = build_masks(run.config, run.trainer.modules["context_encoder"].grid)
    for handler in (run.handlers["position"], MaskSampler(masks), StepSeed(), run.handlers["validation"]):
        handler.attach(trainer)
    losses, drawn = [], []
    trainer.add_event_handler(
        TrainEvents.VALIDATION_COMPLETED, lambda engine: losses.append(engine.state.metrics["val/loss"])
    )
    run.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: drawn.append(engine.state.batch["masks"].context_idx)
    )
    trainer.run(run.data, max_epochs=3)
    assert len(losses) == 3
    assert losses[0] == losses[1] == losses[2] > 0
    number = len(drawn) // 3
    assert all(torch.equal(drawn[i], drawn[i + number]) for i in range(2 * number))
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_the_outputs_of_an_iteration_are_freed_before_the_next_step_computes():
    seen, alive = [], []

    def step(modules, batch):
        alive.append([reference() is not None for reference in seen])
        tokens = torch.ones(3)
        seen.append(weakref.ref(tokens))
        return {"loss": modules["model"](torch.ones(1, 1)).sum(), "tokens": tokens}

    trainer = create_trainer(step, nn.ModuleDict({"model": nn.Linear(1, 1)}))
    trainer.run([{}] * 3, max_epochs=1)
    assert alive == [[], [False], [False, False]]
    assert torch.equal(trainer.state.output["tokens"], torch.ones(3))  # of the last iteration
