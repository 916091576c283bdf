"""What single parts of a run cost: the engine, masks, the EMA, the optimizer, a save, a collapse reading."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.handlers import CollapseMonitor, DamagedImages, MaskSampler, OptimizerStep, TargetEncoderEMA
from hjepa_engine.recipes.benchmarks.products import best_time
from hjepa_engine.recipes.benchmarks.sizes import iterate, optimizer_of
from hjepa_engine.recipes.common.monitoring import build_monitors
from hjepa_engine.recipes.common.run import Run
from hjepa_engine.types import Batch
from hjepa_engine.utils.tensors import move_to

Timer = Callable[[], float]


class TimedSampler(MaskSampler):
    """Remembers how long each iteration waited for its masks, in seconds."""

    ahead = True

    def sample(self, engine: StepEngine) -> None:
        """As the other's."""
        began = time.perf_counter()
        super().sample(engine)
        self.times.append(time.perf_counter() - began)

    def attach(self, engine: StepEngine) -> None:
        """As the other's."""
        self.times = list[float]()
        super().attach(engine)

    def _sample_ahead(self, *draw: Any) -> None:
        if self.ahead:
            super()._sample_ahead(*draw)


class _Replay:
    """As many batches as a run's loader has, of a few that are ready."""

    def __init__(self, batches: list[Batch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[number % len(self.batches)] for number in range(self.length))


def time_masks(run: Run) -> TimedSampler:
    """Put a sampler that takes its times in the place of the run's."""
    old = run.handler(MaskSampler)
    timed = TimedSampler(old.masks, old.seed, old.accumulation_steps)
    run.trainer.detach(old)
    run.trainer.attach(timed)
    return timed


def bare_loop(run: Run, batches: list[Batch], number: int, clock: Timer) -> float:
    """Least seconds of an iteration of a plain loop over the run's step: backward, clipping, optimizer and EMA by hand."""
    trainer, optimizer = run.trainer, optimizer_of(run)
    context, target = (
        [parameter.data for parameter in run.modules[f"{name}_encoder"].parameters()] for name in ("context", "target")
    )
    clip = run.handler(OptimizerStep).clip_grad
    times = []
    for position in range(number):
        began = clock()
        batch = move_to(batches[position % len(batches)], trainer.device)
        with torch.autocast(trainer.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype is not None):
            loss = trainer.step(run.modules, batch)["loss"]
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(target, context, 0.001)
        if trainer.device.type == "cuda":
            loss.item()  # as reading a loss for the log does; a loop that never waits would only be timed at its launches
        times.append(clock() - began)
    return min(times)


def overhead(run: Run, seconds: float, each: float, clock: Timer, rounds: int = 3) -> dict[str, float]:
    """Milliseconds of an iteration of a bare loop, and those that engine and handlers add to it, over the same batches.

    Both take turns. The least time of each counts, because other work only ever adds to a time.

    Args:
        run: trained on; its masks are those of its last two batches from then on.
        seconds: time for all rounds.
        each: seconds of an iteration.
        clock: which times are taken from.
        rounds: of both.
    """
    batches: list[Batch] = []
    trainer, data = run.trainer, run.data
    handle = trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: batches.append(trainer.state.batch))
    iterate(run, 1, clock)
    handle.remove()
    for sampler in [known for known in trainer.handlers() if isinstance(known, MaskSampler)]:
        trainer.detach(sampler)
    number = max(len(batches), 2 * round(seconds / each / rounds / 4))
    times: list[tuple[float, float]] = []
    run.data = _Replay(batches, len(data))  # type: ignore[assignment]
    for _ in range(rounds):
        times.append((bare_loop(run, batches, number, clock), iterate(run, number, clock).least))
    run.data = data
    bare, engine = (1e3 * min(column) for column in zip(*times, strict=True))
    return {"bare_ms": bare, "overhead_ms": engine - bare}


def update_costs(run: Run, clock: Timer) -> dict[str, float]:
    """Milliseconds of an EMA update, of an optimizer step, and of sampling the masks of a batch."""
    optimizer, ema, masks = optimizer_of(run), run.handler(TargetEncoderEMA), run.handler(MaskSampler).masks
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    batch, steps, device = run.config.data.batch_size, iter(range(10**6)), run.trainer.device
    found = {
        "ema_ms": 1e3 * best_time(ema.update, device, 20, clock),
        "optimizer_ms": 1e3 * best_time(optimizer.step, device, 20, clock),
        "masks_ms": 1e3 * statistics.median(_each(lambda: masks.sample(batch, 0, next(steps)), 30, clock)),
    }
    optimizer.zero_grad(set_to_none=True)
    return found


def _each(action: Callable[[], object], number: int, clock: Timer) -> list[float]:
    times = []
    for _ in range(number):
        began = clock()
        action()
        times.append(clock() - began)
    return times


def save_stall(run: Run, number: int = 3) -> float:
    """Milliseconds that training waits for a save: the median of some behind a run's end, where one is always due."""
    times = []
    for _ in range(number):
        run.checkpointer.wait(run.trainer)
        began = time.perf_counter()
        run.checkpointer.save_if_due(run.trainer)
        times.append(time.perf_counter() - began)
    run.checkpointer.wait(run.trainer)
    return 1e3 * statistics.median(times)


def collapse_reading(run: Run, clock: Timer) -> float:
    """Seconds of one reading of the fixed images, which have been loaded."""
    config = replace(run.config, collapse=replace(run.config.collapse, enabled=True))
    parts = (run.data.split, run.val_data.split, run.preemption, DamagedImages())
    monitor = next(m for m in build_monitors(config, run.trainer, *parts) if isinstance(m, CollapseMonitor))
    next(iter(monitor.images))
    return best_time(lambda: monitor.read(run.trainer), run.trainer.device, 1, clock)
