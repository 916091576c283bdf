"""Ignite's own handlers, and what its engine promises, on the trainer and the evaluator of this project."""

import inspect
import io
import re
import time

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
    same_state,
    tiny_config,
    weights_of,
)
from ignite.engine import Engine, Events
from ignite.handlers import (
    BasicTimeProfiler,
    Checkpoint,
    ConcatScheduler,
    DiskSaver,
    EMAHandler,
    EpochOutputStore,
    FastaiLRFinder,
    HandlersTimeProfiler,
    LambdaStateScheduler,
    LinearCyclicalScheduler,
    ParamGroupScheduler,
    PiecewiseLinear,
    TensorboardLogger,
    TerminateOnNan,
    Timer,
    WandBLogger,
    create_lr_scheduler_with_warmup,
)
from ignite.handlers import EarlyStopping as IgniteEarlyStopping
from ignite.handlers import ProgressBar as IgniteProgressBar
from ignite.metrics import Average, Loss, RunningAverage
from ignite.metrics.metric import RunningBatchWise
from test_loggers import read_events, read_wandb
from torch import nn

from hjepa_engine import TrainEvents, create_evaluator, create_trainer
from hjepa_engine.checkpoint.state import collect_state, flat_state, restore_state
from hjepa_engine.errors import CheckpointError, DataError
from hjepa_engine.handlers import Checkpointer, DataPosition, MetricAverager, OptimizerStep, ParamSchedule, Validation

#: Gradients of the linear model, one batch each: with SGD at a rate of 1 the first weight falls by 1, 2, 3 and 4.
BATCHES = rows((1, 0), (2, 0), (3, 0), (4, 0))


class NoLength:
    """Batches that can be read again and again, and have no length."""

    def __init__(self, batches=BATCHES):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def linear_evaluator(step=linear_step):
    return create_evaluator(step, nn.ModuleDict({"model": LinearModel()}))


def loss_of(output):
    return output["loss"]


def record(engine, event, read=lambda engine: (engine.state.epoch, engine.state.iteration)):
    """What ``read`` says whenever ``event`` fires, in a list that grows."""
    seen = []
    engine.add_event_handler(event, lambda engine: seen.append(read(engine)))
    return seen


def rates(trainer, optimizer, group=0):
    return record(trainer, TrainEvents.FORWARD_STARTED, lambda engine: optimizer.param_groups[group]["lr"])


# --- Handlers ---------------------------------------------------------------------------------------------------------


def test_ignites_progress_bar_shows_losses_and_metrics():
    trainer, _ = linear_trainer()
    MetricAverager().attach(trainer)
    stream = io.StringIO()
    bar = IgniteProgressBar(file=stream, persist=True, mininterval=0)
    bar.attach(trainer, metric_names=["train/loss"], output_transform=loss_of)
    trainer.run(BATCHES, max_epochs=2)
    # The third batch of the second epoch: 3 * (1 - 1 - 2 - 3 - 4 - 1 - 2); the mean of the second before it: 2 * (-10).
    assert "Epoch [2/2]: [3/4]" in stream.getvalue()
    assert ", train/loss=-20, output=-36 " in stream.getvalue()


def test_ignites_checkpoint_resumes_in_the_middle_of_an_epoch_bit_by_bit(tmp_path):
    def run(folder=None):
        made = pretraining(tiny_config())  # five batches an epoch
        objects = {"trainer": made.trainer, "modules": made.trainer.modules, **made.trainer.stateful_handlers()}
        if folder is not None:
            save = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=1)
            made.trainer.add_event_handler(TrainEvents.CHECKPOINT_READY(once=7), save)
        return made, objects

    whole, _ = run()
    whole.run(max_epochs=2)
    stopped, _ = run(tmp_path)
    stopped.trainer.add_event_handler(TrainEvents.CHECKPOINT_READY(once=7), lambda engine: engine.terminate())
    stopped.run(max_epochs=2)
    (path,) = tmp_path.glob("*.pt")
    assert path.name == "checkpoint_7.pt"  # Ignite counts what the event counts
    resumed, objects = run()
    Checkpoint.load_objects(objects, path)
    resumed.run(max_epochs=2)
    assert same_bits(resumed.weights, whole.weights)
    assert resumed.trainer.state.optimizer_step == 10


def test_ignites_early_stopping_on_the_evaluator_ends_the_training():
    trainer, _ = linear_trainer()
    evaluator = create_evaluator(linear_step, trainer.modules)
    Average(output_transform=loss_of).attach(evaluator, "loss")
    IgniteEarlyStopping(2, lambda engine: engine.state.metrics["loss"], trainer).attach(evaluator, reset_engine=trainer)
    Validation(evaluator, rows((1, 0))).attach(trainer)
    trainer.run(rows((1, 0)), max_epochs=9)
    assert trainer.state.epoch == 3  # it falls in each epoch, so that the first is the best


def test_ignites_moving_average_of_the_weights_follows_the_optimizer():
    trainer, _ = linear_trainer(accumulation_steps=2)
    handler = EMAHandler(trainer.modules["model"], momentum=0.5)
    handler.attach(trainer, event=TrainEvents.OPTIMIZER_STEPPED)
    trainer.run(rows((1, 0), (1, 0), (2, 0), (2, 0)))
    # The weight is 1, 0 and -2; the average 1, 0.5 and -0.75.
    assert handler.ema_model.weight.tolist() == [-0.75, 1.0]


@pytest.mark.parametrize("make", [lambda: linear_trainer()[0], linear_evaluator])
def test_ignites_output_store_keeps_the_outputs_of_an_epoch(make):
    engine = make()
    EpochOutputStore(lambda output: float(output["loss"])).attach(engine, "losses")
    engine.run(rows((1, 0), (2, 0)))
    assert engine.state.losses == ([1.0, 2.0] if engine.state.optimizer_step == 0 else [1.0, 0.0])


def test_ignites_nan_guard_ends_the_run():
    trainer, _ = linear_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run(rows((1, 0), (float("nan"), 0), (1, 0)))
    assert trainer.state.iteration == 2


def test_ignites_timer_measures_the_phases_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ignite.handlers.timing.perf_counter", lambda: now[0])

    def step(modules, batch):
        now[0] += 3.0
        return linear_step(modules, batch)

    trainer, _ = linear_trainer(step=step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: now.__setitem__(0, now[0] + 100.0))
    timer = Timer(average=True)
    timer.attach(
        trainer,
        resume=TrainEvents.FORWARD_STARTED,
        pause=TrainEvents.FORWARD_COMPLETED,
        step=TrainEvents.FORWARD_COMPLETED,
    )
    trainer.run(BATCHES)
    assert timer.value() == 3.0


def test_ignites_basic_profiler_counts_iterations_and_what_handlers_take():
    trainer, _ = linear_trainer()
    profiler = BasicTimeProfiler()
    profiler.attach(trainer)
    trainer.run(BATCHES, max_epochs=2)
    results = profiler.get_results()
    assert len(profiler.processing_times) == 8 and (profiler.processing_times > 0).all()
    assert results["event_handlers_stats"]["ITERATION_STARTED"]["total"] > 0


def test_ignites_handler_profiler_names_our_handlers_and_they_are_still_saved_and_detached():
    trainer, step = linear_trainer()
    averager = MetricAverager()
    averager.attach(trainer)
    profiler = HandlersTimeProfiler()
    profiler.attach(trainer)
    saved = record(trainer, TrainEvents.CHECKPOINT_READY, lambda engine: list(engine.stateful_handlers()))

    trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda engine: engine.detach(averager))
    trainer.run(BATCHES)
    calls = {(row[0], row[1]) for row in profiler.get_results()}
    assert {("OptimizerStep.step", "LOSS_READY"), ("MetricAverager.add", "ITERATION_COMPLETED")} <= calls
    assert saved == [["OptimizerStep", "MetricAverager"], *[["OptimizerStep"]] * 4]
    assert trainer.stateful_handlers() == {"OptimizerStep": step}


def test_ignites_tensorboard_logger_writes_outputs_metrics_and_learning_rates(tmp_path):
    trainer, step = linear_trainer(log_frequency=2)
    MetricAverager().attach(trainer)
    with TensorboardLogger(log_dir=tmp_path) as logger:
        logger.attach_output_handler(trainer, TrainEvents.OPTIMIZER_STEPPED, tag="step", output_transform=loss_of)
        logger.attach_output_handler(trainer, TrainEvents.METRICS_READY, tag="mean", metric_names="all")
        logger.attach_opt_params_handler(trainer, TrainEvents.OPTIMIZER_STEPPED(every=4), optimizer=step.optimizer)
        trainer.run(BATCHES)
    values = [(tag, step, value.simple_value) for step, tag, value in read_events(tmp_path)]
    assert [each[1:] for each in values if each[0] == "step/output"] == [(1, 1.0), (2, 0.0), (3, -6.0), (4, -20.0)]
    assert [each[1:] for each in values if each[0] == "mean/train/loss"] == [(2, 0.5), (4, -13.0)]
    assert [each[1:] for each in values if each[0] == "lr/group_0"] == [(4, 1.0)]


def test_ignites_weights_and_biases_logger_writes_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer, _ = linear_trainer()
    logger = WandBLogger(dir=str(tmp_path), project="test")
    try:
        logger.attach_output_handler(trainer, TrainEvents.OPTIMIZER_STEPPED, tag="train", output_transform=loss_of)
        trainer.run(BATCHES)
    finally:
        logger.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while len(history := read_wandb(path)[1]) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)  # the service writes its file behind the run's end
    assert [row["train/output"] for row in history] == [1.0, 0.0, -6.0, -20.0]


class Tenfold:
    """A state scheduler's function that a checkpoint can hold."""

    def __call__(self, index):
        return 10.0 * index

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def test_ignites_state_scheduler_counts_optimizer_steps_and_is_resumed():
    def run(*lengths, state=None):
        trainer, _ = linear_trainer(accumulation_steps=2)
        LambdaStateScheduler(Tenfold(), "weight", create_new=True).attach(trainer, TrainEvents.OPTIMIZER_STEPPED)
        if state is not None:
            restore_state(trainer, state)
        for length in lengths:
            trainer.run(BATCHES, max_epochs=length)
        return trainer

    first = run(1)
    assert first.state.weight == 20.0
    assert run(2, state=collect_state(first)).state.weight == 40.0


def test_a_state_scheduler_of_a_function_is_one_line_when_it_is_to_be_saved(tmp_path):
    trainer, _ = linear_trainer()
    LambdaStateScheduler(lambda index: index, "weight", create_new=True).attach(trainer)
    Checkpointer(tmp_path).attach(trainer)
    with pytest.raises(
        CheckpointError, match=r"cannot be saved: handlers\.LambdaStateScheduler\.lambda_obj is of type"
    ):
        trainer.run(BATCHES)


def test_ignites_running_average_is_a_metric_of_the_trainer_and_begins_anew_with_every_run():
    def run(data, epochs, state=None):
        trainer, _ = linear_trainer(lr=0.0)
        RunningAverage(alpha=0.5, output_transform=loss_of).attach(trainer, "running", usage=RunningBatchWise())
        if state is not None:
            assert restore_state(trainer, state) == []  # Ignite's metrics are in the checkpoint, and reset at STARTED
        trainer.run(data, max_epochs=epochs)
        return trainer

    first = run(rows((4, 0), (8, 0)), 1)
    assert first.state.metrics["running"] == 6.0
    assert run(rows((2, 0), (0, 0)), 2, collect_state(first)).state.metrics["running"] == 1.0
    fresh, _ = linear_trainer()
    fresh.run(BATCHES)
    state = collect_state(fresh)
    other, _ = linear_trainer()
    RunningAverage(output_transform=loss_of).attach(other, "running")
    assert "RunningAverage starts afresh" in restore_state(other, state)[0]  # it need not be in a checkpoint


def test_ignites_metrics_on_the_evaluator_are_validation_metrics():
    evaluator = linear_evaluator(lambda modules, batch: {"loss": batch["x"].mean(), "tokens": batch["x"]})
    Average(output_transform=loss_of).attach(evaluator, "average")
    Loss(nn.MSELoss(), output_transform=lambda output: (output["tokens"], torch.zeros(1, 2))).attach(evaluator, "mse")
    trainer, _ = linear_trainer()
    Validation(evaluator, rows((2, 4), (0, 2))).attach(trainer)
    trainer.run(BATCHES)
    assert trainer.state.metrics["val/average"] == 2.0  # of 3 and 1
    assert trainer.state.metrics["val/mse"] == 6.0  # of (4 + 16) / 2 and 4 / 2


# --- Schedulers -------------------------------------------------------------------------------------------------------


def test_ignites_schedulers_drive_one_group_and_ours_another():
    modules = nn.ModuleDict({"model": LinearModel(), "head": LinearModel()})
    trainer = create_trainer(linear_step, modules)
    groups = [{"params": modules["model"].parameters()}, {"params": modules["head"].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.0)
    OptimizerStep(optimizer).attach(trainer)
    linear = PiecewiseLinear(optimizer, "lr", [(0, 0.0), (2, 2.0)], param_group_index=0)
    trainer.add_event_handler(Events.ITERATION_STARTED, ParamGroupScheduler([linear]))
    chosen = optimizer.param_groups[1]
    ParamSchedule(optimizer, "lr", lambda step: 10.0 - step, select=lambda group: group is chosen).attach(trainer)
    first, second = rates(trainer, optimizer, 0), rates(trainer, optimizer, 1)
    trainer.run(BATCHES)
    assert (first, second) == ([0.0, 1.0, 2.0, 2.0], [10.0, 9.0, 8.0, 7.0])
    flat_state(trainer)  # a checkpoint can hold it


def test_a_warm_up_of_ignites_goes_over_into_a_schedule_of_ours():
    trainer, step = linear_trainer()
    schedule = ParamSchedule(step.optimizer, "lr", lambda step: 1.0 - step / 10)
    warm = create_lr_scheduler_with_warmup(schedule, warmup_start_value=0.0, warmup_end_value=1.0, warmup_duration=3)
    trainer.add_event_handler(Events.ITERATION_STARTED, warm)
    seen = rates(trainer, step.optimizer)
    trainer.run(BATCHES, max_epochs=2)
    # The schedule keeps to the optimizer step: it is at 0.8 when two steps of warm-up (and not three, as 1.0 is its own
    # first value) are over.
    assert seen == pytest.approx([0.0, 0.5, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


def test_concatenated_schedules_are_resumed_where_they_were():
    def run(epochs, state=None):
        trainer, step = linear_trainer()
        falling = LinearCyclicalScheduler(step.optimizer, "lr", 1.0, 0.0, 3, monotonic=True)
        ours = ParamSchedule(step.optimizer, "lr", lambda step: 100.0 + step)
        trainer.add_event_handler(Events.ITERATION_STARTED, ConcatScheduler([falling, ours], [3]))
        seen = rates(trainer, step.optimizer)
        if state is not None:
            restore_state(trainer, state)
        trainer.run(rows((1, 0), (1, 0)), max_epochs=epochs)
        return trainer, seen

    first, before = run(1)
    _, after = run(3, collect_state(first))
    assert before + after == run(3)[1] == pytest.approx([1.0, 2 / 3, 1 / 3, 103.0, 104.0, 105.0])


def test_the_learning_rate_finder_runs_before_the_first_run_and_leaves_nothing_behind():
    def run(find):
        trainer, step = linear_trainer(lr=0.001, step=square_step)
        before = weights_of(trainer.modules)
        if find:
            finder = FastaiLRFinder()
            objects = {"model": trainer.modules, "optimizer": step.optimizer}
            with finder.attach(trainer, objects, loss_of, num_iter=20, end_lr=10.0) as searching:
                searching.run(rows(*[(1, 1)] * 4), max_epochs=9)
            losses = finder.get_results()["loss"]
            assert losses[-1] > 5 * min(losses) and 0.001 < finder.lr_suggestion() < 1.0
            assert same_bits(before, weights_of(trainer.modules))
            assert trainer.state.optimizer_step == trainer.state.iteration == 0
        seen = rates(trainer, step.optimizer)
        trainer.run(rows(*[(1, 1)] * 4), max_epochs=2)
        assert trainer.stateful_handlers() == {"OptimizerStep": step}
        return trainer, seen

    searched, seen = run(True)
    plain, expected = run(False)
    assert seen == expected == [0.001] * 8
    assert same_bits(weights_of(searched.modules), weights_of(plain.modules))
    assert same_state(dict(searched.state_dict()), dict(plain.state_dict()))


def square_step(modules, batch):
    return {"loss": modules["model"](batch["x"]).square().mean()}


# --- Runs that end early, go on, and start anew ------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_it_had_not_been():
    def run(interrupt):
        made = pretraining(tiny_config(training__accumulation_steps=2))
        if interrupt:
            made.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.interrupt())
        made.run(max_epochs=2)
        if interrupt:
            assert (made.trainer.state.iteration, made.trainer.is_interrupted) == (3, True)
            made.trainer.run()
        return made

    interrupted, whole = run(True), run(False)
    assert same_bits(interrupted.weights, whole.weights)
    assert (interrupted.trainer.state.epoch, interrupted.trainer.state.iteration) == (2, 10)
    assert not interrupted.trainer.is_interrupted


def test_an_interrupted_evaluation_goes_on_too():
    evaluator = linear_evaluator()
    MetricAverager(prefix="").attach(evaluator)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.interrupt())
    evaluator.run(rows((2, 0), (4, 0), (6, 0)))
    assert evaluator.state.iteration == 2
    assert evaluator.run().metrics == {"loss": 4.0}


def test_a_finished_trainer_goes_on_if_more_is_asked_for():
    def run(*epochs):
        made = pretraining(tiny_config(training__accumulation_steps=2))
        for number in epochs:
            made.run(max_epochs=number)
        return made

    assert same_bits(run(1, 2).weights, run(2).weights)


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_iters": 8}, {}])
def test_a_finished_trainer_starts_anew_from_step_0_if_the_same_is_asked_for(length):
    trainer, step = linear_trainer(accumulation_steps=3)
    ParamSchedule(step.optimizer, "lr", lambda step: 1.0 / (1 + step)).attach(trainer)
    MetricAverager().attach(trainer)
    trainer.add_event_handler(TrainEvents.GRADIENTS_READY(once=1), lambda e: setattr(e.state, "skip_update", True))
    seen = rates(trainer, step.optimizer)
    fresh = weights_of(trainer.modules)
    trainer.run(BATCHES, **length)
    first, state, weights = list(seen), trainer.state_dict(), weights_of(trainer.modules)
    trainer.modules.load_state_dict(fresh)
    seen.clear()
    trainer.run(BATCHES, **length)
    assert seen == first and first[0] == 1.0
    again = trainer.state_dict()
    assert (again["optimizer_step"], again["iteration"]) == (state["optimizer_step"], state["iteration"])
    assert again["metrics"]["values"] == state["metrics"]["values"]
    assert same_bits(weights, weights_of(trainer.modules))


def test_a_trainer_that_is_told_to_forget_its_length_starts_anew():
    trainer, _ = linear_trainer()
    trainer.run(BATCHES, max_epochs=2)
    trainer.state.max_epochs = None
    trainer.run(BATCHES[:3], max_epochs=1)
    assert (trainer.state.optimizer_step, trainer.state.iteration, trainer.state.epoch) == (3, 3, 1)


@pytest.mark.parametrize("ended", ["terminate", "error", "max_iters"])
@pytest.mark.parametrize("iteration", [3, 5, 7])
def test_a_run_that_was_ended_goes_on_at_the_next_iteration_of_its_epoch(ended, iteration):
    def run(end):
        made = pretraining(tiny_config())
        epochs = record(made.trainer, Events.EPOCH_COMPLETED)

        def leave(engine):
            if engine.state.iteration == iteration and ended == "error":
                raise RuntimeError("broken")
            if engine.state.iteration == iteration:
                engine.terminate()

        if not end:
            made.run(max_iters=10)
        elif ended == "max_iters":
            made.run(max_iters=iteration)
            made.run(max_iters=10)
        else:
            with made.trainer.add_event_handler(TrainEvents.CHECKPOINT_READY, leave):
                try:
                    made.run(max_iters=10)
                except RuntimeError:
                    assert ended == "error"
            made.run(max_iters=10)
        return made, epochs

    stopped, epochs = run(True)
    whole, expected = run(False)
    assert epochs == expected == [(1, 5), (2, 10)]
    assert stopped.trainer.state.optimizer_step == 10
    assert same_bits(stopped.weights, whole.weights)


@pytest.mark.parametrize(
    "event", [Events.ITERATION_COMPLETED, TrainEvents.METRICS_READY, TrainEvents.ITERATION_FINALIZED]
)
def test_a_terminated_epoch_is_counted_as_whole_and_the_next_one_starts_at_its_beginning(event):
    trainer, _ = linear_trainer(log_frequency=50 if event is Events.ITERATION_COMPLETED else 1)
    MetricAverager().attach(trainer)
    read = []

    class Sampler:
        def set_position(self, epoch, batch):
            read.append((epoch, batch))

    DataPosition(Sampler()).attach(trainer)

    def leave(engine):
        if engine.state.optimizer_step == 2:
            engine.terminate_epoch()

    trainer.add_event_handler(event, leave)
    epochs = record(trainer, Events.EPOCH_COMPLETED)
    intervals = record(trainer, TrainEvents.METRICS_READY, lambda engine: engine.state.metrics["train/loss"])
    trainer.run(BATCHES, max_epochs=3)
    assert epochs == [(1, 4), (2, 8), (3, 12)]
    assert read == [(0, 0), (1, 0), (2, 0)]
    assert trainer.state.optimizer_step == 2 + 4 + 4
    if event is Events.ITERATION_COMPLETED:
        assert intervals[0] == 0.5  # the epoch's end ends a log interval: of 1 and 0


def test_a_window_that_a_terminated_epoch_cuts_off_leaves_no_gradient():
    trainer, _ = linear_trainer(accumulation_steps=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate_epoch())
    trainer.run(BATCHES, max_epochs=2)
    # (1 + 2) / 2 in the first epoch, where the batch of 3 is dropped; then that again, and (3 + 4) / 2.
    assert trainer.modules["model"].weight.tolist() == [1 - 1.5 - 1.5 - 3.5, 1.0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("saved_at", [3, 6])
def test_a_run_is_resumed_exactly_around_a_terminated_epoch(skip, saved_at):
    def run(state=None):
        made = pretraining(tiny_config())
        saved = {}

        def leave(engine):
            if engine.state.iteration == 3:
                engine.terminate_epoch(skip_epoch_completed=skip)

        def save(engine):
            saved.setdefault(engine.state.optimizer_step, collect_copy(engine))

        made.trainer.add_event_handler(Events.ITERATION_COMPLETED, leave)
        made.trainer.add_event_handler(TrainEvents.CHECKPOINT_READY, save)
        epochs = record(made.trainer, Events.EPOCH_COMPLETED)
        if state is not None:
            restore_state(made.trainer, state)
        made.run(max_epochs=3)
        return made, saved, epochs

    whole, saved, epochs = run()
    resumed, _, later = run(saved[saved_at])
    assert epochs == ([] if skip else [(1, 5)]) + [(2, 10), (3, 15)]
    assert later == [each for each in epochs if each[0] >= 2 or saved_at == 3]
    assert same_bits(resumed.weights, whole.weights)
    assert whole.trainer.state.optimizer_step == resumed.trainer.state.optimizer_step == 13


def collect_copy(trainer):
    buffer = io.BytesIO()
    torch.save(collect_state(trainer), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# --- Data without a length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_iters": 10}])
@pytest.mark.parametrize("given", [False, True])
def test_data_without_a_length_is_counted_in_the_first_epoch_and_trains_the_same(length, given):
    def run(data, **more):
        trainer, _ = linear_trainer(log_frequency=3)
        MetricAverager().attach(trainer)
        intervals = record(
            trainer,
            TrainEvents.METRICS_READY,
            lambda engine: (engine.state.optimizer_step, engine.state.metrics["train/loss"]),
        )
        trainer.run(data, **length, **more)
        return weights_of(trainer.modules), intervals, dict(trainer.state_dict())

    weights, intervals, state = run(NoLength(), **({"epoch_length": 4} if given else {}))
    expected, expected_intervals, expected_state = run(BATCHES)
    assert same_bits(weights, expected) and intervals == expected_intervals and same_state(state, expected_state)


def test_a_loader_of_a_stream_trains_with_the_progress_bar_and_checkpoints_of_this_project(tmp_path):
    from hjepa_engine.handlers import ProgressBar

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batch["x"][0] for batch in BATCHES)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2, collate_fn=lambda samples: {"x": torch.stack(samples)})
    trainer, _ = linear_trainer()
    stream = io.StringIO()
    trainer.attach(ProgressBar(stream=stream), Checkpointer(tmp_path, every_steps=1))
    trainer.run(loader, max_epochs=2)
    assert (trainer.state.epoch_length, trainer.state.iteration) == (2, 4)
    assert "epoch 2/2" in stream.getvalue()
    assert trainer.state.checkpoint.name == "epoch_0002_step_00000004"


def test_accumulation_needs_the_length_of_an_epoch():
    trainer, _ = linear_trainer(accumulation_steps=3)
    with pytest.raises(
        ValueError, match=r"^accumulation_steps 3 needs the length of an epoch: give run\(\) its epoch_length$"
    ):
        trainer.run(NoLength(), max_epochs=1)
    trainer, _ = linear_trainer(accumulation_steps=3)
    trainer.run(NoLength(), max_epochs=1, epoch_length=4)
    assert trainer.modules["model"].weight.tolist() == [1 - 2 - 4, 1.0]  # the mean of 1, 2 and 3, and 4


def test_what_cannot_be_trained_on_is_one_line():
    trainer, _ = linear_trainer()
    with pytest.raises(DataError, match=r"^the data has no batches$"):
        trainer.run(iter([]), max_epochs=2)
    trainer, _ = linear_trainer()
    ended = r"^the data ended after iteration 4, inside epoch 2 of 3 batches, and cannot be read again$"
    with pytest.raises(DataError, match=ended):
        trainer.run(iter(BATCHES), max_epochs=2, epoch_length=3)
    trainer, _ = linear_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch())
    with pytest.raises(ValueError, match=r"terminate_epoch\(\) needs the length of an epoch"):
        trainer.run(NoLength(), max_epochs=2)


def test_a_run_that_stopped_before_its_first_epoch_was_counted_needs_the_length_to_go_on():
    trainer, _ = linear_trainer()
    trainer.add_event_handler(TrainEvents.CHECKPOINT_READY(once=2), lambda engine: engine.terminate())
    trainer.run(NoLength(), max_epochs=2)
    resumed, _ = linear_trainer()
    restore_state(resumed, collect_state(trainer))
    for stopped in (trainer, resumed):
        with pytest.raises(
            ValueError, match=r"to go on at iteration 2 of the first epoch, run\(\) needs its epoch_length"
        ):
            stopped.run(NoLength(), max_epochs=2)
        stopped.run(NoLength(), max_epochs=2, epoch_length=4)
        assert (stopped.state.iteration, stopped.state.epoch) == (8, 2)


# --- State and events -------------------------------------------------------------------------------------------------


def test_a_users_attributes_of_the_state_are_saved_and_restored():
    def make():
        trainer, _ = linear_trainer()
        trainer.state_dict_user_keys.append("alpha")
        trainer.state.alpha = 0.0
        return trainer

    trainer = make()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: setattr(engine.state, "alpha", 0.5))
    trainer.run(BATCHES)
    restored = make()
    restored.load_state_dict(trainer.state_dict())
    assert restored.state.alpha == 0.5
    resumed = make()
    restore_state(resumed, collect_state(trainer))
    assert resumed.state.alpha == 0.5
    other, _ = linear_trainer()
    other.run(BATCHES)
    with pytest.raises(CheckpointError, match=r"the state lacks alpha, of the trainer's state_dict_user_keys"):
        restore_state(make(), collect_state(other))


def test_events_of_both_kinds_combine_and_their_handle_removes_them_all():
    trainer, _ = linear_trainer()
    seen = []
    events = Events.EPOCH_COMPLETED | TrainEvents.OPTIMIZER_STEPPED(every=2) | TrainEvents.EPOCH_FINALIZED
    handle = trainer.add_event_handler(events, lambda engine: seen.append(engine.last_event_name.name))
    trainer.run(BATCHES)
    expected = ["OPTIMIZER_STEPPED", "OPTIMIZER_STEPPED", "EPOCH_COMPLETED", "EPOCH_FINALIZED"]
    assert seen == expected
    handle.remove()
    trainer.run(BATCHES)
    assert seen == expected


class Counter:
    """Counts, and has a state."""

    def __init__(self):
        self.seen = 0

    def count(self, engine):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


def test_a_removed_handler_runs_no_more_and_is_saved_no_more():
    trainer, step = linear_trainer()
    counter = Counter()
    handles = [
        trainer.add_event_handler(event, counter.count)
        for event in (Events.ITERATION_COMPLETED, TrainEvents.OPTIMIZER_STEPPED(every=2))
    ]
    trainer.run(BATCHES)
    assert counter.seen == 6
    handles[0].remove()
    assert trainer.stateful_handlers() == {"OptimizerStep": step, "Counter": counter}
    handles[1].remove()
    assert trainer.stateful_handlers() == {"OptimizerStep": step}
    with trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), counter.count):
        assert list(trainer.stateful_handlers()) == ["OptimizerStep", "Counter"]
    assert list(trainer.stateful_handlers()) == ["OptimizerStep"]
    trainer.run(BATCHES)
    assert counter.seen == 6


@pytest.mark.parametrize("make", [lambda: linear_trainer()[0], linear_evaluator])
@pytest.mark.parametrize("event", [Events.STARTED, Events.ITERATION_COMPLETED(every=2), Events.EPOCH_COMPLETED])
def test_whoever_listens_to_errors_is_told_once_and_the_error_is_raised(make, event):
    def fail():
        raise RuntimeError("broken")

    engine, told = make(), []
    engine.add_event_handler(event, fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(str(error)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^broken$"):
            engine.run(BATCHES)
    engine.detach(fail)
    assert told == ["broken"] * 2 and engine.run(BATCHES).iteration == 4


def test_an_error_is_raised_also_where_a_profiler_has_looked_who_listens_to_errors():
    trainer, _ = linear_trainer()
    HandlersTimeProfiler().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(BATCHES)


# --- What is private in Ignite ----------------------------------------------------------------------------------------

PRIVATE = {
    "_event_handlers",
    "_fire_event",
    "_handle_exception",
    "_internal_run_generator",
    "_dataloader_iter",
    "_setup_dataloader_iter",
    "_is_done",
    "_init_timers",
}


def test_only_one_file_uses_what_is_private_in_ignites_engine():
    names = {name for name in {*vars(Engine), *vars(Engine(print))} if re.fullmatch(r"_[a-z]\w*", name)} | {"_parent"}
    assert names >= PRIVATE
    used = {}
    for path in (path for room in ("hjepa_engine", "handlers", "recipes") for path in (ROOT / room).rglob("*.py")):
        found = (
            set(re.findall(r"(?<=\.)_[a-z]\w*|(?<=def )_[a-z]\w*(?=\(self)", path.read_text(encoding="utf-8"))) & names
        )
        if found:
            used[path.name] = found
    own = {"_process"} if "_process" in names else set()
    assert {name: found - own for name, found in used.items() if found - own} == {
        "ignite_private.py": PRIVATE | {"_parent"}
    }


def test_ignites_engine_is_built_as_we_use_it():
    fired, engine = [], Engine(lambda engine, batch: None)

    def handler(engine, word):
        fired.append(word)

    engine.add_event_handler(Events.ITERATION_STARTED(every=2), handler, "filtered")
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler, word="keyword")
    ((wrapper, (reference, word), keywords),) = engine._event_handlers[Events.ITERATION_STARTED]
    assert (wrapper._parent(), reference(), word, keywords) == (handler, engine, "filtered", {})
    assert engine._event_handlers[Events.ITERATION_COMPLETED][0][0] is handler
    assert list(inspect.signature(Engine._fire_event).parameters) == [
        "self",
        "event_name",
        "event_args",
        "event_kwargs",
    ]
    assert inspect.isgeneratorfunction(Engine._internal_run_as_gen)
    assert engine._internal_run_generator is None and engine._dataloader_iter is None
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.interrupt())
    engine.run(range(3))
    assert engine._internal_run_generator is not None and next(engine._dataloader_iter) == 1
    engine.run()
    assert Engine._is_done(engine.state) and engine._internal_run_generator is None
    Engine._init_timers(engine.state)
    assert engine.state.times == {"EPOCH_COMPLETED": 0.0, "COMPLETED": 0.0}


def test_ignite_fires_every_event_through_the_method_that_we_override():
    fired = []

    class Listening(Engine):
        def _fire_event(self, event_name, *args, **kwargs):
            fired.append(event_name.name)
            super()._fire_event(event_name, *args, **kwargs)

    engine = Listening(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate_epoch())
    engine.run(range(2), max_epochs=2)
    epoch = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"]
    first = ["EPOCH_STARTED", *epoch, *epoch, "EPOCH_COMPLETED"]
    loading = ["GET_BATCH_STARTED", "DATALOADER_STOP_ITERATION", "GET_BATCH_COMPLETED"]
    second = ["EPOCH_STARTED", *loading, *epoch[2:], "TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED"]
    # Iteration 3 of 4: Ignite has not read what it was to read, and goes on with a third epoch that is none of ours.
    assert fired[: len(first) + len(second) + 1] == ["STARTED", *first, *second]
