import copy
import io
import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LinearModel,
    Terminal,
    linear_step,
    linear_trainer,
    noise_batches,
    pretraining,
    rows,
    same_bits,
    tiny_config,
    weights_of,
)
from ignite.engine import Engine, Events
from safetensors import safe_open
from torch import nn

from hjepa_engine import TrainEvents, create_evaluator, create_trainer, load_encoder
from hjepa_engine.errors import DataError, ExportError, GuardStop
from hjepa_engine.handlers import (
    DamagedImages,
    DataPosition,
    EarlyStopping,
    EncoderExport,
    MetricAverager,
    MetricsLogger,
    NonFiniteGuard,
    ProgressBar,
    TargetEncoderEMA,
    Throughput,
    Validation,
)
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.models import encoder_arguments
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.utils.eta import duration

# --- Target encoder -------------------------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), value))
        self.register_buffer("mean", torch.full((3,), value))
        self.register_buffer("count", torch.tensor(int(value)))


def test_the_target_encoder_follows_a_hand_written_moving_average():
    torch.manual_seed(0)
    context = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    target = copy.deepcopy(context).requires_grad_(False)
    by_hand = {name: tensor.double() for name, tensor in weights_of(target).items()}
    ema = TargetEncoderEMA(context, target)
    trainer = create_trainer(lambda modules, batch: {}, nn.ModuleDict())
    ema.attach(trainer)
    for momentum in (0.9, 0.99, 0.5, 0.996):
        for parameter in context.parameters():
            parameter.data.normal_()
        ema.param_groups[0]["momentum"] = momentum
        trainer.fire_event(TrainEvents.OPTIMIZER_STEPPED)
        for name, tensor in context.state_dict().items():
            by_hand[name] = momentum * by_hand[name] + (1 - momentum) * tensor.double()
    for name, tensor in target.state_dict().items():
        torch.testing.assert_close(tensor.double(), by_hand[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 1.0), (0.0, 3.0)])
def test_momentum_1_freezes_the_target_and_0_copies_the_context(momentum, expected):
    context, target = WithBuffers(3.0), WithBuffers(1.0)
    TargetEncoderEMA(context, target, momentum).update()
    assert torch.equal(target.weight, torch.full((2, 3), expected))
    assert torch.equal(target.mean, torch.full((3,), expected))


def test_buffers_are_averaged_or_copied_and_never_shared():
    context, target = WithBuffers(3.0), WithBuffers(1.0)
    ema = TargetEncoderEMA(context, target, 0.75)
    ema.update()
    assert target.mean.tolist() == [1.5] * 3
    assert target.count.item() == 3
    context.mean.fill_(100.0)
    context.count.fill_(100)
    context.weight.data.fill_(100.0)
    assert (target.mean[0].item(), target.count.item(), target.weight[0, 0].item()) == (1.5, 3, 1.5)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_momentum_outside_0_to_1_is_refused(momentum):
    with pytest.raises(ValueError, match=f"momentum must be from 0 to 1, got {momentum}"):
        TargetEncoderEMA(LinearModel(), LinearModel(), momentum)


# --- A run is a function of its configuration -------------------------------------------------------------------------


TWENTY_STEPS = {"training__epochs": 4, "training__clip_grad": 0.5, "model__depth": 2, "model__drop_path": 0.3}


def test_handlers_attached_in_any_order_give_the_same_bits(tmp_path):
    config = tiny_config(**TWENTY_STEPS, run_dir=tmp_path / "run", probe__enabled="false")
    reference = pretraining(config)
    before = reference.weights
    reference.run()
    assert reference.trainer.state.optimizer_step == 20
    moved = [name for name, tensor in reference.weights.items() if not torch.equal(tensor, before[name])]
    assert {name.split(".")[0] for name in moved} == {"context_encoder", "target_encoder", "predictor"}
    for order in range(5):
        assert same_bits(pretraining(config, order=order).run().weights, reference.weights), order
    # ... and so does the recipe itself.
    run = build(config)
    run.fit()
    assert same_bits(weights_of(run.modules), reference.weights)


def test_the_order_of_handlers_does_not_matter_with_accumulation_and_dropped_updates_either():
    def step(modules, batch):
        outputs = plain(modules, batch)
        poisoned = (batch["labels"] == 13).any()  # one micro-batch in the middle of the run
        return {**outputs, "loss": outputs["loss"] * math.nan} if poisoned else outputs

    config = tiny_config(training__accumulation_steps=2, training__non_finite="skip")
    data = noise_batches([4] * 5)
    data[3]["labels"] = torch.full((4,), 13)
    plain = pretraining(config, data=data).trainer.step
    for gradients in (True, False):
        seen = []
        for order in (None, 0, 1, 2, 3):
            run = pretraining(config, data=data, order=order, step=step)
            run.handlers["guard"].scaled = not gradients
            dropped = []
            run.trainer.add_event_handler(
                TrainEvents.ITERATION_FINALIZED,
                lambda engine, dropped=dropped: dropped.append(engine.state.skipped_updates),
            )
            run.run()
            seen.append(run.weights)
            assert dropped == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2], (gradients, order)
            assert same_bits(run.weights, seen[0]), (gradients, order)
        assert all(tensor.isfinite().all() for tensor in seen[0].values())


def test_a_seed_names_a_run():
    config = tiny_config(**TWENTY_STEPS)
    first, second = pretraining(config).run().weights, pretraining(config).run().weights
    other = pretraining(replace(config, seed=1)).run().weights
    assert same_bits(first, second)
    learned = [name for name, tensor in first.items() if "pos_embed" not in name and tensor.ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in learned)


@pytest.mark.parametrize("what", ["order", "masks", "dropout", "weights"])
def test_every_kind_of_randomness_hangs_on_the_seed(what):
    config = tiny_config(**TWENTY_STEPS)
    seen = []
    for seed in (0, 0, 1):
        run = pretraining(replace(config, seed=seed))
        if what == "weights":
            seen.append(next(iter(run.trainer.modules["predictor"].parameters())).detach())
            continue
        run.trainer.add_event_handler(
            TrainEvents.LOSS_READY,
            lambda engine: seen.append(
                {
                    "order": lambda: engine.state.batch["images"],
                    "masks": lambda: engine.state.batch["masks"].target_idx.double().mean(dim=1),
                    "dropout": lambda: torch.rand(8),
                }[what]()
            ),
        )
        run.run(max_iters=1)
    assert torch.equal(seen[0], seen[1])
    assert seen[0].shape != seen[2].shape or not torch.equal(seen[0], seen[2])


def test_the_number_of_workers_does_not_change_the_run():
    settings = {"data__random_affine": 0.5, "data__horizontal_flip": 0.5, "data__dataset": "digits"}
    settings |= {"data__val_fraction": 0.98, "model__depth": 2, "model__drop_path": 0.3}
    runs = [pretraining(tiny_config(**settings, data__num_workers=workers)) for workers in (0, 2)]
    losses = []
    for run in runs:
        assert len(run.data) == 4
        seen = []
        run.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, seen=seen: seen.append(engine.state.output["loss"].item())
        )
        run.handlers["validation"].data = noise_batches([8], channels=1)
        run.run()
        losses.append(seen)
    assert losses[0] == losses[1]
    assert same_bits(runs[0].weights, runs[1].weights)


class Places:
    """A sampler that remembers where it was put."""

    def __init__(self):
        self.places = []

    def set_position(self, epoch, batch):
        self.places.append((epoch, batch))


def engine_state(iteration, epoch_length):
    """What a trainer saves that has done so many iterations."""
    metrics = {"clock": 0, "values": {}, "written": {}}
    place = {"iteration": iteration, "epoch_length": epoch_length, "optimizer_step": iteration}
    return {**place, "epoch_open": False, "metrics": metrics}


@pytest.mark.parametrize(("iteration", "places"), [(0, [(0, 0), (1, 0), (2, 0)]), (4, [(1, 1), (2, 0)]), (6, [(2, 0)])])
def test_every_pass_over_the_data_starts_where_the_engine_is(iteration, places):
    sampler = Places()
    trainer, _ = linear_trainer()
    DataPosition(sampler).attach(trainer)
    trainer.load_state_dict(engine_state(iteration, epoch_length=3))
    trainer.run(rows((1, 0), (3, 0), (8, 0)), max_epochs=3)
    assert sampler.places == places


class BurnRandomNumbers:
    """An observer that draws from every global generator at every event it can reach."""

    def attach(self, engine):
        between = (Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED)  # one step and the next
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, *between):
            engine.add_event_handler(event, self.burn)
        for event in TrainEvents:
            engine.add_event_handler(event, self.burn)

    def burn(self):
        import random

        import numpy

        torch.rand(7)
        numpy.random.rand(3)
        random.random()


def test_observers_that_draw_random_numbers_change_nothing():
    config = tiny_config(**{**TWENTY_STEPS, "training__epochs": 2}, data__random_affine=0.5)
    alone = pretraining(config).run().weights
    torch.manual_seed(99)
    assert same_bits(pretraining(config, extra=[BurnRandomNumbers()], order=3).run().weights, alone)


# --- Averages -------------------------------------------------------------------------------------------------------


def test_a_mean_covers_one_log_window():
    trainer, _ = linear_trainer(lr=1e-9, log_frequency=2)
    MetricAverager().attach(trainer)
    seen = []
    trainer.add_event_handler(TrainEvents.METRICS_READY, lambda engine: seen.append(engine.state.metrics["train/loss"]))
    trainer.run(rows((1, 0), (3, 0), (5, 0), (7, 0), (100, 0)), max_epochs=2)
    # Steps 2, 4 and 5 (the epoch's last), then 6, 8 and 10.
    assert seen == pytest.approx([2.0, 6.0, 100.0, 1.0, 4.0, 53.5], rel=1e-5)


def test_means_are_weighted_by_samples():
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    MetricAverager(prefix="").attach(evaluator)
    batches = [{"x": torch.tensor([[1.0, 0], [2, 0], [3, 0]])}, {"x": torch.tensor([[10.0, 0]])}]
    assert evaluator.run(batches).metrics == {"loss": 4.0}  # (1 + 2 + 3 + 10) / 4, not (2 + 10) / 2


def test_a_filler_does_not_count_in_a_mean():
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    MetricAverager(prefix="").attach(evaluator)
    filler = {"x": torch.tensor([[90.0, 0]]), "is_filler": True}
    assert evaluator.run([*rows((1, 0), (5, 0)), filler]).metrics == {"loss": 3.0}


def test_a_value_that_is_missing_from_some_outputs_is_averaged_over_the_others():
    trainer, _ = linear_trainer(accumulation_steps=2, lr=1e-9, log_frequency=2)
    MetricAverager().attach(trainer)
    trainer.run(rows((3, 0), (5, 0), (0, 2), (0, 6)))
    assert trainer.state.metrics["train/grad_norm"] == 4.0  # the two steps' 4 and 4, over two of four iterations
    assert trainer.state.metrics["train/loss"] == pytest.approx(4.0)


def test_vectors_are_not_averaged():
    trainer = create_trainer(lambda modules, batch: {"loss": batch["x"].mean(), "tokens": batch["x"]}, nn.ModuleDict())
    MetricAverager().attach(trainer)
    trainer.run(rows((1, 1)))
    assert trainer.state.metrics == {"train/loss": 1.0}


def test_an_open_window_survives_a_restart():
    values = [1.0, 2.0, 30.0, 4.0, 5.5, 7.0]

    def trainer():
        trainer = create_trainer(lambda modules, batch: {"loss": batch["x"].mean()}, nn.ModuleDict())
        averager = MetricAverager()
        averager.attach(trainer)
        return trainer, averager

    whole, _ = trainer()
    whole.run(rows(*[(value,) for value in values]))
    first, averager = trainer()
    first.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.terminate())
    first.run(rows(*[(value,) for value in values]))
    state, sums = first.state_dict(), json.loads(json.dumps(averager.state_dict()))
    second, restored = trainer()
    second.load_state_dict(state)
    restored.load_state_dict(sums)
    second.run(rows(*[(value,) for value in values[4:]]), epoch_length=6)
    assert whole.state.metrics["train/loss"] == sum(values) / 6
    assert second.state.metrics["train/loss"] == sum(values) / 6


# --- Throughput -------------------------------------------------------------------------------------------------------


def test_throughput_tells_waiting_from_working(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hjepa_engine.handlers.throughput.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow:
        def __len__(self):
            return 3

        def __iter__(self):
            for _ in range(3):
                now[0] += 3.0
                yield {"images": torch.zeros(8, 1)}

    def step(modules, batch):
        now[0] += 1.0
        return {"loss": torch.zeros(())}

    trainer = create_trainer(step, nn.ModuleDict())
    Throughput().attach(trainer)
    seen = []
    ends = TrainEvents.ITERATION_FINALIZED(every=3)
    trainer.add_event_handler(ends, lambda engine: seen.append(dict(engine.state.metrics)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: now.__setitem__(0, now[0] + 1000.0))  # validation
    trainer.run(Slow(), max_epochs=3)
    # One window per epoch: 3 batches of 8 images, each 3 s of waiting and 1 s of work.
    for name, value in {"images_per_s": 2.0, "data_wait": 0.75, "data_ms": 3000.0, "iteration_ms": 4000.0}.items():
        assert [values[f"train/{name}"] for values in seen] == pytest.approx([value] * 3), name


# --- Early stopping -----------------------------------------------------------------------------------------------------


def stopping_run(values, **settings):
    """The trainer of a run whose validations report ``values``, and its handler."""
    trainer, _ = linear_trainer()
    report = iter(values)

    def validate(engine):
        engine.state.metrics["val/loss"] = next(report)
        engine.fire_event(TrainEvents.VALIDATION_COMPLETED)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    handler = EarlyStopping(**settings)
    handler.attach(trainer)
    trainer.run(rows((1, 0)), max_epochs=len(values))
    return trainer, handler


@pytest.mark.parametrize(
    ("values", "settings", "epochs"),
    [
        ([5, 4, 4.5, 4.5, 1], {"patience": 2}, 4),
        ([5, 4, 4.5, 3, 3, 3, 3], {"patience": 2}, 6),
        ([5, math.nan, math.nan, 1], {"patience": 2}, 3),
        ([math.nan, 5, 4, 3], {"patience": 2}, 4),
        ([math.inf, 5, -math.inf, 4], {"patience": 1}, 1),
        ([1, 2, 3, 2, 2], {"patience": 2, "mode": "max"}, 5),
        ([5.0, 4.95, 4.9, 4.85], {"patience": 2, "min_delta": 0.2}, 3),
    ],
)
def test_a_run_ends_after_patience_validations_without_improvement(values, settings, epochs):
    assert stopping_run(values, **settings)[0].state.epoch == epochs


def test_patience_survives_a_restart():
    _, handler = stopping_run([5, 4, 4.5], patience=2)
    restored = EarlyStopping(patience=2)
    restored.load_state_dict(json.loads(json.dumps(handler.state_dict())))
    assert restored.state_dict() == handler.state_dict() == {"best": -4.0, "bad": 1}
    engine = Engine(lambda engine, batch: None)
    engine.state.metrics["val/loss"] = 4.5
    restored.check(engine)
    assert engine.should_terminate


def test_early_stopping_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="mode must be min or max, got 'least'"):
        EarlyStopping(1, mode="least")
    with pytest.raises(ValueError, match=r"early stopping needs the metric 'probe/knn', logged metrics: val/loss"):
        stopping_run([1.0], patience=1, metric="probe/knn")


# --- Guards ---------------------------------------------------------------------------------------------------------


def guarded(batches, accumulation_steps=1, attach_first=False, **settings):
    trainer, handler = linear_trainer(accumulation_steps)
    guard = NonFiniteGuard(**settings)
    if attach_first:  # the other way round: a trainer whose guard comes before its optimizer step
        trainer = create_trainer(linear_step, trainer.modules)
        guard.attach(trainer)
        handler.attach(trainer)
    else:
        guard.attach(trainer)
    weights = []
    trainer.add_event_handler(
        TrainEvents.ITERATION_FINALIZED, lambda engine: weights.append(engine.modules["model"].weight.tolist())
    )
    error = None
    try:
        trainer.run(batches)
    except GuardStop as stop:
        error = stop
    return trainer, weights, error


NAN, INF = (math.nan, 0), (math.inf, 0)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_non_finite_loss_ends_the_run_before_the_weights_see_it(bad, attach_first, scaled):
    batches = rows((1, 0), bad, (1, 0))
    trainer, weights, error = guarded(batches, attach_first=attach_first, scaled=scaled)
    assert str(error).startswith("non-finite loss at optimizer step 1; the weights are those of the last good step")
    assert weights == [[0.0, 1.0]]
    assert trainer.modules["model"].weight.tolist() == [0.0, 1.0]
    assert error.exit_code == 5


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_dropped_update_leaves_weights_and_clock_alone(attach_first, scaled):
    batches = rows((1, 0), NAN, (0, 1), INF, (0, 1))
    settings = {"attach_first": attach_first, "scaled": scaled, "action": "skip"}
    trainer, weights, error = guarded(batches, **settings)
    assert error is None
    assert weights == [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, -1.0]]
    assert (trainer.state.optimizer_step, trainer.state.skipped_updates) == (3, 2)


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_micro_batch_drops_its_whole_window_and_no_other(attach_first, scaled, place):
    window = [(5, 5), (5, 5)]
    window[place] = NAN
    batches = rows((1, 0), (1, 0), *window, (0, 1), (0, 1))
    settings = {"attach_first": attach_first, "scaled": scaled, "action": "skip"}
    trainer, weights, error = guarded(batches, accumulation_steps=2, **settings)
    assert error is None
    assert weights == [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert trainer.state.skipped_updates == 1


def test_a_finite_loss_with_infinite_gradients_counts_where_gradients_are_checked():
    def step(modules, batch):
        return {"loss": modules["model"](batch["x"]).mean().sqrt()}  # at 0 its slope is infinite

    trainer, _ = linear_trainer(step=step)
    NonFiniteGuard().attach(trainer)
    with pytest.raises(GuardStop, match="non-finite gradient at optimizer step 0"):
        trainer.run(rows((1, -1)))
    assert trainer.modules["model"].weight.tolist() == [1.0, 1.0]


def test_gradients_that_overflow_for_ever_end_a_run_with_a_scaler_and_move_nothing():
    def step(modules, batch):
        return {"loss": modules["model"](batch["x"]).mean().sqrt()}  # at 0 its slope is infinite

    moved = []
    trainer, _ = linear_trainer(step=step, scaler=torch.amp.GradScaler("cpu"))
    NonFiniteGuard(scaled=True).attach(trainer)
    trainer.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, lambda: moved.append(1))
    with pytest.raises(GuardStop, match="non-finite gradient at optimizer step 0 for 50 updates in a row"):
        trainer.run(rows(*[(1, -1)] * 60))
    assert (moved, trainer.state.iteration, trainer.state.skipped_updates) == ([], 50, 49)
    assert trainer.modules["model"].weight.tolist() == [1.0, 1.0]


def test_skipped_updates_are_logged_once_there_are_any():
    trainer, _, _ = guarded(rows((1, 0), NAN, (1, 0)), action="skip")
    assert trainer.state.metrics["train/skipped_updates"] == 1.0


def test_dropped_updates_in_a_row_end_the_run_and_good_ones_forgive():
    _, weights, error = guarded(rows(NAN, (1, 0), NAN, NAN, NAN, (1, 0)), action="skip", patience=3)
    assert len(weights) == 4
    assert "non-finite loss at optimizer step 1 for 3 updates in a row" in str(error)
    assert guarded(rows(NAN, NAN, (1, 0), NAN, NAN), action="skip", patience=3)[2] is None


def test_the_guard_counts_on_after_a_restart():
    guard = NonFiniteGuard("skip", patience=3)
    guard.load_state_dict({"in_a_row": 2})
    assert guard.state_dict() == {"in_a_row": 2}
    trainer, _ = linear_trainer()
    guard.attach(trainer)
    with pytest.raises(GuardStop, match="for 3 updates in a row"):
        trainer.run(rows(NAN))


def test_the_guard_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="action must be stop or skip, got 'ignore'"):
        NonFiniteGuard("ignore")
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        NonFiniteGuard("skip", 0)


# --- Damaged images ---------------------------------------------------------------------------


def images_run(damaged, max_share, total=2000):
    trainer = create_trainer(lambda modules, batch: {}, nn.ModuleDict(), log_frequency=1)
    handler = DamagedImages(max_share, total)
    handler.attach(trainer)
    trainer.run([{"images": torch.zeros(50, 1), "damaged": names} for names in damaged])
    return trainer, handler


def test_damaged_images_are_counted_and_named_once(caplog):
    trainer, handler = images_run([["a.jpg: truncated"], [], ["a.jpg: truncated", "b.jpg: empty"]], 0.05)
    assert trainer.state.metrics == {"data/damaged": 2.0}
    assert [r.getMessage() for r in caplog.records if "unreadable" in r.message] == [
        "unreadable training image: a.jpg: truncated",
        "unreadable training image: b.jpg: empty",
    ]
    restored = DamagedImages()
    restored.load_state_dict(handler.state_dict())
    assert restored.state_dict() == {"damaged": ["a.jpg: truncated", "b.jpg: empty"]}


def test_too_many_damaged_images_end_the_run():
    with pytest.raises(
        DataError, match=r"3 of 2000 training images could not be read, more than data.max_damaged 0.001 allows; one of"
    ):
        images_run([["a", "b"], ["c"], []], 0.001)
    images_run([["a"], ["b"]] * 3, 0.001)  # 2 of 2,000 are allowed, in whatever order and however often they are read
    assert "data/damaged" not in images_run([[]], 0.0)[0].state.metrics
    with pytest.raises(ValueError, match="max_share must be from 0 to 1, got 2"):
        DamagedImages(2)


# --- Logging --------------------------------------------------------------------------------------------------------


class Memory:
    """A writer that remembers, or fails where it is told to."""

    def __init__(self, fails_in=()):
        self.fails_in, self.records, self.opened, self.closed = fails_in, [], [], 0

    def open(self, state):
        self.opened.append(state)
        if "open" in self.fails_in:
            raise OSError("no\nspace")

    def write(self, metrics, step, epoch):
        if "write" in self.fails_in:
            raise ConnectionError("no route")
        self.records.append((dict(metrics), step, epoch))

    def close(self):
        self.closed += 1
        if "close" in self.fails_in:
            raise RuntimeError("no end")

    def state_dict(self):
        return {"records": len(self.records)}


def test_every_value_is_written_once_with_its_step():
    trainer, _ = linear_trainer(log_frequency=2)
    memory = Memory()
    logger = MetricsLogger([memory])
    logger.attach(trainer)

    def window(engine):
        engine.state.metrics["train/loss"] = float(engine.state.optimizer_step)

    def validate(engine):
        engine.state.metrics["val/loss"] = 10.0 * engine.state.epoch
        engine.fire_event(TrainEvents.VALIDATION_COMPLETED)

    def late(engine):
        engine.state.metrics["late"] = 1.0

    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, window)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, late)
    trainer.run(rows(*[(0, 0)] * 3), max_epochs=2)
    logger.log_metrics({"linear": 0.5}, prefix="probe/")
    logger.log_metrics({"early": 1}, step=1)
    logger.close()
    assert memory.records == [
        ({"train/loss": 2.0}, 2, 1),
        ({"train/loss": 3.0}, 3, 1),
        ({"val/loss": 10.0, "late": 1.0}, 3, 1),
        ({"train/loss": 4.0}, 4, 2),
        ({"train/loss": 6.0}, 6, 2),
        ({"val/loss": 20.0, "late": 1.0}, 6, 2),
        ({"probe/linear": 0.5}, 6, 2),
        ({"early": 1.0}, 1, 2),
    ]
    assert (memory.opened, memory.closed) == ([None], 1)


@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_the_failure_of_a_logger_is_not_the_runs(place, caplog):
    config = tiny_config(training__epochs=3)
    alone = pretraining(config).run().weights
    good = Memory()
    run = pretraining(config, writers=[Memory([place]), good])
    with caplog.at_level(logging.WARNING):
        run.run()
        run.handlers["logger"].close()
    assert same_bits(run.weights, alone)
    (warning,) = [record for record in caplog.records if record.name == "hjepa_engine.loggers.group"]
    assert "is off from now on: no" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert len(good.records) >= 3 * 2
    assert good.closed == 1


def test_nothing_is_opened_before_there_is_something_to_write():
    trainer, _ = linear_trainer()
    memory = Memory()
    logger = MetricsLogger([memory])
    logger.attach(trainer)
    trainer.run(rows((1, 0)))
    logger.close()
    assert (memory.opened, memory.closed) == ([], 0)


def test_a_logger_goes_on_with_the_state_of_its_writers_and_writes_nothing_twice():
    first, second, writers = linear_trainer()[0], linear_trainer()[0], [Memory(), Memory()]
    logger, restored = (MetricsLogger([writer]) for writer in writers)

    def write(engine):
        engine.state.metrics["x"] = float(engine.state.iteration)

    for trainer, handler in ((first, logger), (second, restored)):
        handler.attach(trainer)
        trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, write)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    first.run(rows((1, 0), (3, 0), (8, 0)))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    restored.load_state_dict(json.loads(json.dumps(logger.state_dict())))
    second.run(rows((8, 0)), epoch_length=3)
    assert [step for _, step, _ in writers[0].records] == [1, 2]
    assert writers[1].opened == [{"records": 2}]
    assert writers[1].records == [({"x": 3.0}, 3, 1)]


def test_what_an_opened_writer_goes_on_from_is_kept_where_it_was_never_opened():
    logger = MetricsLogger([Memory()])
    logger.load_state_dict({"seen": 7, "writers": {"Memory": {"records": 5}, "Gone": {"id": "x"}}})
    assert logger.state_dict() == {"seen": 7, "writers": {"Memory": {"records": 5}, "Gone": {"id": "x"}}}


def test_metrics_are_lines_of_json(tmp_path):
    trainer, _ = linear_trainer(lr=1e-9, log_frequency=2)
    MetricAverager().attach(trainer)
    logger = MetricsLogger([JsonlWriter(tmp_path / "metrics.jsonl")])
    logger.attach(trainer)
    trainer.run(rows((1, 0), (3, 0), (math.nan, 0)))
    logger.log_metrics({"worst": math.inf})
    logger.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(list(record)[:3] == ["step", "epoch", "time"] for record in records)
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
    assert 1.5e9 < records[0]["time"] < 1e11
    for record in records:
        del record["time"]
    assert records[0] == {"step": 2, "epoch": 1, "train/loss": pytest.approx(2.0), "train/grad_norm": 2.0}
    assert records[1] == {"step": 3, "epoch": 1, "train/loss": None, "train/grad_norm": None}
    assert records[2] == {"step": 3, "epoch": 1, "worst": None}


def lines_of(path, state, *steps):
    """Steps of all records, after a process that goes on from ``state`` has written some; and its state after each."""
    writer, states = JsonlWriter(path), []
    writer.open(state)
    for step in steps:
        writer.write({"a": 1.0}, step, 1)
        states.append(json.loads(json.dumps(writer.state_dict())))
    writer.close()
    return [json.loads(line)["step"] for line in path.read_text().splitlines()], states


def test_a_resumed_run_appends_to_the_records_before_its_checkpoint_and_cuts_off_the_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen, states = lines_of(path, None, 1, 2, 3)
    assert seen == [1, 2, 3]
    assert lines_of(path, states[1], 3, 4)[0] == [1, 2, 3, 4]
    assert lines_of(path, states[0], 9)[0] == [1, 9]
    assert lines_of(path, None, 5)[0] == [5]  # a new run


def test_records_that_were_lost_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    _, states = lines_of(path, None, 1, 2)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert lines_of(path, states[1], 3)[0] == [1, 3]
    (warning,) = caplog.records
    there, wanted = states[0]["bytes"], states[1]["bytes"]
    assert warning.getMessage() == f"{path} has lost its end: {there} bytes instead of {wanted}"


# --- Progress -------------------------------------------------------------------------------------------------------


def progress(stream, monkeypatch, max_epochs=2, **settings):
    """What a person sees of a run of 2 epochs of 3 iterations of 2 s each."""
    now = [0.0]
    monkeypatch.setattr("hjepa_engine.handlers.progress_bar.time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer, _ = linear_trainer(lr=1e-9)
    MetricAverager().attach(trainer)
    ProgressBar(stream=stream).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.__setitem__(0, now[0] + 2.0))
    trainer.run(rows((1, 0), (3, 0), (8, 0)), **(settings or {"max_epochs": max_epochs}))
    return stream.getvalue()


def test_without_a_terminal_there_are_only_lines(monkeypatch):
    assert progress(io.StringIO(), monkeypatch).splitlines() == [
        "epoch 1/2  train/loss 8  6.0 s, 2000 ms/it, 6.0 s left",
        "epoch 2/2  train/loss 8  6.0 s, 2000 ms/it, 0.0 s left",
        "pretrain: 6 iterations, 12.0 s in this process",
    ]


def test_a_run_of_so_many_iterations_knows_its_epochs_and_its_end(monkeypatch):
    assert progress(io.StringIO(), monkeypatch, max_iters=5).splitlines() == [
        "epoch 1/2  train/loss 8  6.0 s, 2000 ms/it, 4.0 s left",
        "pretrain: 5 iterations, 10.0 s in this process",
    ]


def test_the_time_left_of_a_resumed_run_is_judged_by_its_own_iterations(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("hjepa_engine.handlers.progress_bar.time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer, _ = linear_trainer()
    ProgressBar(stream=stream).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.__setitem__(0, now[0] + 2.0))
    trainer.load_state_dict(engine_state(6, epoch_length=3))
    trainer.run(rows((1, 0), (3, 0), (8, 0)), max_epochs=4)
    assert stream.getvalue().splitlines()[0] == "epoch 3/4    6.0 s, 2000 ms/it, 6.0 s left"


def test_a_terminal_shows_a_bar_too(monkeypatch):
    shown = progress(Terminal(), monkeypatch)
    assert "\r" in shown
    assert "/6 [" in shown
    assert "epoch 1/2  train/loss 8  6.0 s, 2000 ms/it, 6.0 s left\n" in shown
    assert shown.endswith("pretrain: 6 iterations, 12.0 s in this process\n")


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    assert progress(Terminal(), monkeypatch) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (59.9, "59.9 s"), (65, "1:05"), (3600, "1:00:00")])
def test_times_read_like_times(seconds, text):
    assert duration(seconds) == text


def test_a_time_never_shows_sixty_seconds():
    assert duration(59.97) == "1:00"


# --- Export and validation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run folder with an exported encoder, and the encoder that was trained."""
    folder = tmp_path_factory.mktemp("export")
    run = pretraining(tiny_config(model__depth=2, model__drop_path=0.2))
    export = EncoderExport(
        run.trainer.modules["target_encoder"], folder / "encoder", {"encoder": encoder_arguments(run.config)}
    )
    export.attach(run.trainer)
    run.run()
    return folder, run.trainer.modules["target_encoder"]


def test_an_exported_encoder_computes_what_the_trained_one_does(exported):
    folder, trained = exported
    images = noise_batches([5])[0]["images"]
    for place in (folder, str(folder), folder / "encoder"):
        encoder = load_encoder(place)
        tokens = encoder(images)
        assert tokens.shape == (5, 36, 16)
        assert torch.equal(tokens, trained(images))
        assert same_bits(weights_of(encoder), weights_of(trained))
        assert not tokens.requires_grad
        assert not encoder.training


def test_an_export_is_safetensors_beside_json(exported):
    folder, trained = exported
    assert sorted(path.name for path in (folder / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "encoder" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trained.state_dict())
    description = json.loads((folder / "encoder" / "config.json").read_text())
    assert description["encoder"]["embed_dim"] == 16


def damage_weights(folder):
    path = folder / "encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_description(folder, text="{"):
    (folder / "encoder" / "config.json").write_text(text)


DAMAGE = {
    "nothing there": (lambda folder: None, "has no exported encoder"),
    "no weights": (lambda folder: (folder / "encoder" / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut short": (damage_weights, "cannot be loaded"),
    "weights are noise": (
        lambda folder: (folder / "encoder" / "model.safetensors").write_bytes(b"\x00" * 999),
        "cannot be loaded",
    ),
    "description cut short": (damage_description, "cannot be loaded"),
    "description of something else": (lambda folder: damage_description(folder, "[1]"), "cannot be loaded"),
    "description without an encoder": (lambda folder: damage_description(folder, "{}"), "cannot be loaded"),
    "unknown encoder": (
        lambda folder: damage_description(folder, '{"encoder": {"name": "vit_tny", "img_size": 24}}'),
        "unknown encoder 'vit_tny'",
    ),
    "other sizes": (
        lambda folder: damage_description(
            folder, '{"encoder": {"name": "vit_tiny_patch16_224", "img_size": 32, "depth": 1}}'
        ),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_one_line(exported, damage, tmp_path):
    action, message = DAMAGE[damage]
    if damage != "nothing there":
        (tmp_path / "encoder").mkdir()
        for path in (exported[0] / "encoder").iterdir():
            (tmp_path / "encoder" / path.name).write_bytes(path.read_bytes())
    action(tmp_path)
    with pytest.raises(ExportError) as error:
        load_encoder(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 4


def test_validation_writes_under_its_prefix_after_every_nth_epoch():
    trainer, _ = linear_trainer()
    evaluator = create_evaluator(linear_step, nn.ModuleDict({"model": LinearModel()}))
    MetricAverager(prefix="").attach(evaluator)
    Validation(evaluator, rows((1, 0), (4, 0)), every=2).attach(trainer)
    seen = []
    trainer.add_event_handler(
        TrainEvents.VALIDATION_COMPLETED, lambda engine: seen.append((engine.state.epoch, dict(engine.state.metrics)))
    )
    trainer.run(rows((0, 0)), max_epochs=5)
    assert seen == [(2, {"val/loss": 2.5}), (4, {"val/loss": 2.5})]
    assert "loss" not in trainer.state.metrics


def test_a_pretraining_run_validates_every_level():
    run = pretraining(tiny_config()).run()
    metrics = run.trainer.state.metrics
    assert {name for name in metrics if name.startswith("val/")} == {"val/loss", "val/loss_level_0", "val/loss_level_1"}
    assert metrics["val/loss"] == pytest.approx(metrics["val/loss_level_0"] + metrics["val/loss_level_1"])
    assert 0 < metrics["val/loss"] < 2
