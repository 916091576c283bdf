"""The phases of a training iteration, as events."""

from __future__ import annotations

from ignite.engine import EventEnum


class TrainEvents(EventEnum):
    """What the engine fires besides Ignite's own events; docs/architecture.md has the whole timeline.

    Filters count the number in brackets: ``TrainEvents.OPTIMIZER_STEPPED(every=50)`` runs at optimizer steps 50, 100, ...
    """

    FORWARD_STARTED = "forward_started"
    """Batch, masks and parameters are as the step will see them; the step comes next. [iteration]"""
    FORWARD_COMPLETED = "forward_completed"
    """The step has run, nothing else has yet: clocks. [iteration]"""
    LOSS_READY = "loss_ready"
    """The step has run, ``state.output`` still has its graph: backward. [iteration]"""
    GRADIENTS_READY = "gradients_ready"
    """The accumulation window is complete, gradients are unscaled and not yet clipped. [optimizer_step]"""
    OPTIMIZER_STEPPED = "optimizer_stepped"
    """Parameters have changed; never fired for a skipped update. [optimizer_step]"""
    LOG_INTERVAL_COMPLETED = "log_interval_completed"
    """A log interval has ended: handlers write its floats to ``state.metrics``. [optimizer_step]"""
    METRICS_READY = "metrics_ready"
    """The floats of the log interval are complete: progress bars and your own handlers read them. [optimizer_step]"""
    LOG_METRICS = "log_metrics"
    """Loggers write what is new. Fires behind ``METRICS_READY`` and behind an epoch's end, and when a new run starts, for
    what is measured before its first step. [optimizer_step]"""
    ITERATION_FINALIZED = "iteration_finalized"
    """Last of an iteration, after every handler of ``ITERATION_COMPLETED`` and ``METRICS_READY``. [iteration]"""
    VALIDATION_COMPLETED = "validation_completed"
    """``state.metrics`` has fresh ``val/`` values, within ``EPOCH_COMPLETED``. [epoch]"""
    EPOCH_FINALIZED = "epoch_finalized"
    """Last of an epoch, after every handler of ``EPOCH_COMPLETED``: summaries. [epoch]"""
    CHECKPOINT_READY = "checkpoint_ready"
    """Every other handler has run and no accumulation window is open: checkpoints and stop requests, which change nothing.
    Fires behind an iteration, and once more behind its epoch. [iteration]"""
    PREEMPTED = "interrupted"
    """A stop request is about to end the run: save now. [iteration]"""


#: The counter of ``engine.state`` that an event's filters look at.
EVENT_TO_ATTR = {
    TrainEvents.FORWARD_STARTED: "iteration",
    TrainEvents.FORWARD_COMPLETED: "iteration",
    TrainEvents.LOSS_READY: "iteration",
    TrainEvents.GRADIENTS_READY: "optimizer_step",
    TrainEvents.OPTIMIZER_STEPPED: "optimizer_step",
    TrainEvents.LOG_INTERVAL_COMPLETED: "optimizer_step",
    TrainEvents.METRICS_READY: "optimizer_step",
    TrainEvents.LOG_METRICS: "optimizer_step",
    TrainEvents.ITERATION_FINALIZED: "iteration",
    TrainEvents.VALIDATION_COMPLETED: "epoch",
    TrainEvents.EPOCH_FINALIZED: "epoch",
    TrainEvents.CHECKPOINT_READY: "iteration",
    TrainEvents.PREEMPTED: "iteration",
}
