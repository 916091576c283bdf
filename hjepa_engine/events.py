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
    """The step has run, ``state.output`` still has its graph: backward pass and update. [iteration]"""
    BACKWARD_COMPLETED = "backward_completed"
    """A micro-batch's backward pass is over; its gradients are added to those of the window. [iteration]"""
    GRADIENTS_READY = "gradients_ready"
    """The accumulation window is complete, gradients are unscaled and not yet clipped. [optimizer_step]"""
    OPTIMIZER_STEPPED = "optimizer_stepped"
    """Parameters have changed; never fired for a skipped update. [optimizer_step]"""
    UPDATE_COMPLETED = "update_completed"
    """Every handler of ``LOSS_READY`` has run: the backward pass and, in a window's last iteration, the update are over, the
    target encoder has followed. [iteration]"""
    LOG_INTERVAL_COMPLETED = "log_interval_completed"
    """A log interval has ended: handlers write its floats to ``state.metrics``. [optimizer_step]"""
    METRICS_READY = "metrics_ready"
    """The floats of the log interval are complete: progress bars, pictures and your handlers read them. [optimizer_step]"""
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
    PREEMPTED = "preempted"
    """A stop request is about to end the run: save now. [iteration]"""
    RUN_FINALIZED = "run_finalized"
    """Last of a run, after every handler of ``COMPLETED``: a stop request that came too late for a checkpoint. [epoch]"""


#: The counter of ``engine.state`` that an event's filters look at.
EVENT_TO_ATTR = {
    TrainEvents.FORWARD_STARTED: "iteration",
    TrainEvents.FORWARD_COMPLETED: "iteration",
    TrainEvents.LOSS_READY: "iteration",
    TrainEvents.BACKWARD_COMPLETED: "iteration",
    TrainEvents.GRADIENTS_READY: "optimizer_step",
    TrainEvents.OPTIMIZER_STEPPED: "optimizer_step",
    TrainEvents.UPDATE_COMPLETED: "iteration",
    TrainEvents.LOG_INTERVAL_COMPLETED: "optimizer_step",
    TrainEvents.METRICS_READY: "optimizer_step",
    TrainEvents.LOG_METRICS: "optimizer_step",
    TrainEvents.ITERATION_FINALIZED: "iteration",
    TrainEvents.VALIDATION_COMPLETED: "epoch",
    TrainEvents.EPOCH_FINALIZED: "epoch",
    TrainEvents.CHECKPOINT_READY: "iteration",
    TrainEvents.PREEMPTED: "iteration",
    TrainEvents.RUN_FINALIZED: "epoch",
}
