"""Measure what the engine itself costs: mask sampling, and events and handlers around a step that does nothing.

    OMP_NUM_THREADS=1 python recipes/benchmarks/engine.py

docs/benchmarks.md quotes the output.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_engine import create_trainer
from hjepa_engine.handlers import (
    Checkpointer,
    DamagedImages,
    MaskSampler,
    MetricAverager,
    NonFiniteGuard,
    OptimizerStep,
    ParamSchedule,
    Preemption,
    RetentionPolicy,
    StepSeed,
    TargetEncoderEMA,
    Throughput,
)
from hjepa_engine.masking import MultiBlockMasks
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.schedules import CosineScheduler
from hjepa_engine.types import Batch, Outputs

GRIDS = ((8, 8, 256), (14, 14, 128), (16, 16, 128), (12, 20, 128))


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call, after a warm-up of a tenth of the repeats."""
    times = []
    for number in range(repeats + repeats // 10):
        began = time.perf_counter()
        action()
        if number >= repeats // 10:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def thrown_away(masks: MultiBlockMasks, batch_size: int, steps: int = 100) -> float:
    """Share of the visible patches that sub-selection leaves out."""
    kept = seen = 0
    for step in range(steps):
        shape = masks._draw_shape(0, step)
        number = masks.num_visible(shape)
        kept += number * batch_size
        seen += int(masks._draw_layouts(shape, batch_size, 0, step, 0, number)[2].sum())
    return 1 - kept / seen


def masks_table() -> None:
    """Time and waste of mask sampling."""
    print("masks     batch   ms per batch   visible patches thrown away")
    for height, width, batch_size in GRIDS:
        masks = MultiBlockMasks((height, width))
        share, steps = thrown_away(masks, batch_size), iter(range(10**6))
        milliseconds = 1e3 * seconds(lambda m=masks, b=batch_size, s=steps: m.sample(b, 0, next(s)), 300)  # type: ignore[misc]
        print(f"{height:2} x {width:<2}   {batch_size:5}   {milliseconds:12.2f}   {100 * share:26.1f} %")


class _Nothing(nn.Module):
    """One parameter, so that there is something to step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return self.weight.sum()


def _step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
    return {"loss": modules["context_encoder"]()}


def _batches(iterations: int) -> list[Batch]:
    return [{"images": torch.zeros(128, 1), "damaged": []}] * iterations


def bare_loop(iterations: int = 2000) -> float:
    """Seconds per iteration of a plain loop around the empty step."""
    modules = nn.ModuleDict({"context_encoder": _Nothing()})
    optimizer = torch.optim.AdamW(modules.parameters())
    began = time.perf_counter()
    for batch in _batches(iterations):
        _step(modules, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / iterations


def engine_loop(with_masks: bool, folder: Path, iterations: int = 2000) -> float:
    """Seconds per iteration of the engine with the handlers of a pretraining run around the empty step."""
    modules = nn.ModuleDict({"context_encoder": _Nothing(), "target_encoder": _Nothing()})
    modules["target_encoder"].requires_grad_(False)
    optimizer = torch.optim.AdamW(modules["context_encoder"].parameters())
    ema = TargetEncoderEMA(modules["context_encoder"], modules["target_encoder"])
    schedule = CosineScheduler(1e-3, 0.0, 1, iterations)
    trainer = create_trainer(_step, modules)
    handlers: list[Any] = [
        DamagedImages(),
        StepSeed(),
        OptimizerStep(optimizer, clip_grad=1.0),
        NonFiniteGuard(),
        ema,
        ParamSchedule(optimizer, "lr", schedule, metric="train/lr"),
        ParamSchedule(optimizer, "weight_decay", schedule),
        ParamSchedule(ema, "momentum", schedule),
        MetricAverager(),
        Throughput(),
        Preemption(),
        Checkpointer(folder, RetentionPolicy(keep_best_n=0), every_minutes=15.0),
        *([MaskSampler(MultiBlockMasks((14, 14)))] if with_masks else []),
    ]
    for handler in handlers:
        handler.attach(trainer)
    began = time.perf_counter()
    trainer.run(_batches(iterations), max_epochs=1)
    return (time.perf_counter() - began) / iterations


def engine_table(rounds: int = 7) -> None:
    """Cost of engine and handlers, over a bare loop in the same process, rounds taken in turn."""
    extra, masked = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            bare = bare_loop()
            extra.append(engine_loop(False, Path(folder)) - bare)
            masked.append(engine_loop(True, Path(folder)) - bare)
    for name, times in (("engine and handlers", extra), ("the same with masks, 14 x 14, batch 128", masked)):
        low, middle, high = (1e3 * pick(times) for pick in (min, statistics.median, max))
        print(f"{name}: {middle:.2f} ms per iteration (of {rounds} rounds: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    print(machine() + "\n")
    masks_table()
    print()
    engine_table()
