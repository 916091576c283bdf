"""Which learning rate suits a run, before it begins: ``recipes/pretrain.py --find_lr``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from torch.optim import Optimizer

from hjepa_engine import Config, TrainEvents
from hjepa_engine.devices import process_group
from hjepa_engine.engine import Trainer
from hjepa_engine.handlers import (
    DamagedImages,
    DataPosition,
    MaskSampler,
    OptimizerStep,
    ParamSchedule,
    StepSeed,
    TargetEncoderEMA,
)
from hjepa_engine.recipes.common.preview import save_preview
from hjepa_engine.visualization.figures import draw_lr_sweep

#: What a step needs. All else of this project that is attached to the trainer would write, measure or stop.
_NEEDED = (DamagedImages, DataPosition, MaskSampler, OptimizerStep, ParamSchedule, StepSeed, TargetEncoderEMA)


class LearningRateSweep:
    """Raise the learning rate of all parameters from step to step and note the loss of each (arXiv:1506.01186).

    Listens to: ``ITERATION_STARTED``, ``TrainEvents.OPTIMIZER_STEPPED``.
    Reads: ``engine.state.window_loss`` (); the mean over ranks counts.
    Writes: ``lr`` of all parameter groups, ``start`` * (``end`` / ``start``) ** (step / (``steps`` - 1)); ends the run when
    the smoothed loss is above ``diverged`` times its lowest value, or not finite.

    Args:
        optimizer: of the run.
        start: first learning rate.
        end: last one.
        steps: optimizer steps, at least 2.
        diverged: see above.
    """

    def __init__(
        self, optimizer: Optimizer, *, start: float = 1e-6, end: float = 1.0, steps: int = 100, diverged: float = 4.0
    ) -> None:
        if not 0 < start < end or steps < 2:
            raise ValueError(f"start must be above 0 and below end, steps at least 2, got {start}, {end} and {steps}")
        self.optimizer, self.diverged = optimizer, diverged
        self.lrs = [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]
        self.losses: list[float] = []

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer; no other handler may write ``lr``."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.set_lr)
        engine.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, self.note)

    def set_lr(self) -> None:
        """Write the learning rate of the coming step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[min(len(self.losses), len(self.lrs) - 1)]

    def note(self, engine: Trainer) -> None:
        """Note the loss of the step. Collective."""
        loss: Any = idist.all_reduce(engine.state.window_loss.item() / idist.get_world_size())
        self.losses.append(loss)
        values = smoothed(self.losses)
        if len(values) == len(self.lrs) or not values[-1] <= self.diverged * min(values):
            engine.terminate()

    def suggestion(self) -> float | None:
        """The learning rate at which the smoothed loss falls fastest; None: it does not fall.

        What follows once the loss has risen by a tenth does not count: at rates that are far too high it may fall again,
        because the encoder collapses.
        """
        falls: list[float] = []
        for value in smoothed(self.losses):
            if not (math.isfinite(value) and value <= 1.1 * min([*falls, value])):
                break
            falls.append(value)
        falls = falls[: falls.index(min(falls)) + 1] if falls else []
        slopes = [after - before for before, after in zip(falls, falls[2:], strict=False)]
        if not slopes or min(slopes) >= 0:
            return None
        return self.lrs[1 + slopes.index(min(slopes))]


def smoothed(losses: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential means of ``losses`` up to each: the previous mean has weight ``keep``, with bias correction."""
    values, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = keep * mean + (1 - keep) * loss
        values.append(mean / (1 - keep**number))
    return values


def find_lr(config: Config, build: Callable[[Config], Any], steps: int = 100) -> None:
    """Train ``steps`` steps at rising learning rates, print and draw the loss; only ``<run_dir>/preview/`` is written.

    Args:
        config: of the run.
        build: makes the :class:`~hjepa_engine.recipes.pretrain.Run`, whose trainer is used up.
        steps: optimizer steps.

    Raises:
        ConfigError: the picture cannot be written.
    """
    with process_group(config.device, config.distributed.timeout):
        run = build(config)
        sweep = sweep_lr(run.trainer, run.data, steps)
        if idist.get_rank() == 0:
            lrs = sweep.lrs[: len(sweep.losses)]
            figure = draw_lr_sweep(lrs, sweep.losses, smoothed(sweep.losses), sweep.suggestion())
            path = save_preview(figure, run, "lr_finder.png")
            print(f"{run.describe()}\n\n{describe(sweep, config.training.lr, path)}")


def sweep_lr(trainer: Trainer, data: Any, steps: int) -> LearningRateSweep:
    """Train at rising learning rates with nothing attached but what a step needs, and handlers of your own."""
    step = None
    for handler in trainer.handlers():
        is_ours = type(handler).__module__.startswith("hjepa_engine.handlers.")
        writes_lr = isinstance(handler, ParamSchedule) and handler.param_name == "lr"
        if (is_ours and not isinstance(handler, _NEEDED)) or writes_lr:
            trainer.detach(handler)
        step = handler if isinstance(handler, OptimizerStep) else step
    if step is None:
        raise ValueError("the trainer needs an OptimizerStep")
    sweep = LearningRateSweep(step.optimizer, steps=steps)
    sweep.attach(trainer)
    trainer.run(data, max_iters=steps * step.accumulation_steps + len(data))  # ends by itself
    return sweep


def describe(sweep: LearningRateSweep, lr: float, path: Path) -> str:
    """A table of the sweep, ten lines or so, and the suggestion."""
    values = smoothed(sweep.losses)
    every = max(1, len(values) // 10)
    rows = [
        f"{'lr':>12}{'loss':>12}",
        *(f"{sweep.lrs[i]:12.2g}{values[i]:12.4g}" for i in range(0, len(values), every)),
    ]
    found = sweep.suggestion()
    said = "the loss falls at no learning rate" if found is None else f"try --training.lr {found:.2g} (now {lr:g})"
    return "\n".join([*rows, "", said, f"drawn: {path}"])
