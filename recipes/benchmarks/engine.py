"""Measure what the engine itself costs: events and handlers around a step that does nothing, the EMA, the optimizer.

    OMP_NUM_THREADS=1 python recipes/benchmarks/engine.py

docs/benchmarks.md quotes the output.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_engine import create_trainer
from hjepa_engine.handlers import (
    Checkpointer,
    CollapseGuard,
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
from hjepa_engine.models import ContextEncoder
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.schedules import CosineScheduler
from hjepa_engine.types import Batch, Outputs
from hjepa_engine.utils.gradients import clip_gradients, gradient_norm

ITERATIONS = 400

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "one by one": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


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


def bare_loop(iterations: int = ITERATIONS) -> float:
    """Seconds of an iteration of a plain loop around the empty step, the lowest tenth."""
    modules = nn.ModuleDict({"context_encoder": _Nothing()})
    optimizer = torch.optim.AdamW(modules.parameters())
    moments = []
    for batch in _batches(iterations):
        moments.append(time.perf_counter())
        _step(modules, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _usual_distance(moments)


def _usual_distance(moments: list[float]) -> float:
    # The lowest tenth: other work on the machine only ever adds to a time.
    return statistics.quantiles((second - first for first, second in pairwise(moments)), n=10)[0]


def handlers_of_a_run(modules: nn.ModuleDict, folder: Path, with_masks: bool) -> dict[str, list[Any]]:
    """The handlers of a pretraining run that do something in every iteration, by their names in the table.

    Args:
        modules: encoders of the empty step.
        folder: of checkpoints.
        with_masks: sample masks too.
    """
    optimizer = torch.optim.AdamW(modules["context_encoder"].parameters())
    ema = TargetEncoderEMA(modules["context_encoder"], modules["target_encoder"])
    schedule = CosineScheduler(1e-3, 0.0, 1, ITERATIONS)
    schedules = [
        ParamSchedule(optimizer, "lr", schedule, metric="train/lr"),
        ParamSchedule(optimizer, "weight_decay", schedule),
        ParamSchedule(ema, "momentum", schedule),
    ]
    return {
        "OptimizerStep, no clipping": [OptimizerStep(optimizer)],
        "OptimizerStep, clipping": [OptimizerStep(optimizer, clip_grad=1.0)],
        "NonFiniteGuard": [NonFiniteGuard()],
        "TargetEncoderEMA": [ema],
        "ParamSchedule, three of them": schedules,
        "StepSeed": [StepSeed()],
        "MetricAverager": [MetricAverager()],
        "Throughput": [Throughput()],
        "DamagedImages": [DamagedImages()],
        "Preemption": [Preemption()],
        "Checkpointer": [Checkpointer(folder, RetentionPolicy(keep_best_n=0), every_minutes=15.0)],
        "CollapseGuard": [CollapseGuard()],
        **({"MaskSampler, 14 x 14, batch 128": [MaskSampler(MultiBlockMasks((14, 14)))]} if with_masks else {}),
    }


def engine_loop(with_masks: bool, folder: Path, last: str | None = None, iterations: int = ITERATIONS) -> float:
    """Seconds of an iteration of the engine with the handlers of a pretraining run around the empty step, the lowest tenth.

    Args:
        with_masks: sample masks too.
        folder: of checkpoints.
        last: leave out the handlers behind this one; None: all take part.
        iterations: of the run.
    """
    modules = nn.ModuleDict({"context_encoder": _Nothing(), "target_encoder": _Nothing()})
    modules["target_encoder"].requires_grad_(False)
    moments: list[float] = []

    def step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
        moments.append(time.perf_counter())
        return _step(modules, batch)

    trainer = create_trainer(step, modules)
    parts = handlers_of_a_run(modules, folder, with_masks)
    unused = "OptimizerStep, " + ("clipping" if last == "OptimizerStep, no clipping" else "no clipping")
    for name, handlers in parts.items():
        trainer.attach(*([] if name == unused else handlers))
        if name == last:
            break
    trainer.run(_batches(iterations), max_epochs=1)
    return _usual_distance(moments)


def engine_table(rounds: int = 30) -> None:
    """Cost of engine and handlers: each row adds a handler to those above; rounds of all rows are taken in turn."""
    modules = nn.ModuleDict({"context_encoder": _Nothing(), "target_encoder": _Nothing()})
    with tempfile.TemporaryDirectory() as folder:
        names = list(handlers_of_a_run(modules, Path(folder), with_masks=True))
        rows: list[tuple[str, Callable[[], float]]] = [("bare loop with AdamW", bare_loop)]
        rows += [(f"+ {name}", partial(engine_loop, True, Path(folder), name)) for name in names]
        rows[1] = f"engine, {names[0]}", rows[1][1]
        best = [min(times) for times in zip(*([row() for _, row in rows] for _ in range(rounds)), strict=True)]
    print(
        f"microseconds of an iteration, the least of {rounds} rounds     in all   over the row above   over the bare loop"
    )
    for number, (name, _) in enumerate(rows):
        above, bare = (1e6 * (best[number] - best[other]) for other in (max(number - 1, 0), 0))
        print(f"{name:55}   {1e6 * best[number]:6.0f}   {above:18.0f}   {bare:18.0f}")


def ema_table() -> None:
    """Time of an EMA update, beside that of reading what it has to read."""
    print(
        "EMA update             parameters   ms, least of many   the same bytes read and written by one add_()   ratio"
    )
    for name, repeats in (("vit_tiny_patch16_224", 200), ("vit_small_patch16_224", 60), ("vit_large_patch16_224", 15)):
        context = ContextEncoder(name, 224)
        target = copy.deepcopy(context).requires_grad_(False)
        ema = TargetEncoderEMA(context, target)
        number = sum(parameter.numel() for parameter in target.parameters())
        one, other = torch.zeros(number), torch.zeros(number)
        update, read = least((ema.update, lambda a=one, b=other: a.add_(b)), repeats)  # type: ignore[misc]
        print(f"{name:20}   {number / 1e6:8.1f} M   {1e3 * update:17.2f}   {1e3 * read:45.2f}   {update / read:5.2f}")


def optimizer_table() -> None:
    """Time of AdamW's step and of gradient norm and clipping, for the parameters of one encoder."""
    encoder = ContextEncoder("vit_tiny_patch16_224", 224)
    parameters = list(encoder.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    steps: dict[str, Callable[[], object]] = {
        f"AdamW, {name}": torch.optim.AdamW(parameters, **arguments).step for name, arguments in IMPLEMENTATIONS.items()
    }
    steps["norm and clipping, torch"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    steps["norm and clipping, ours"] = lambda: clip_gradients(gradients, gradient_norm(gradients), 1.0)
    print(f"update of vit_tiny, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters   ms, least of many")
    for name, seconds_each in zip(steps, least(tuple(steps.values()), 100), strict=True):
        print(f"{name:40}   {1e3 * seconds_each:17.2f}")


def least(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least wall time of each of several actions, taken in turn."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, of_action in zip(actions, times, strict=True):
            began = time.perf_counter()
            action()
            of_action.append(time.perf_counter() - began)
    return [min(of_action) for of_action in times]


if __name__ == "__main__":
    print(machine() + "\n")
    engine_table()
    print()
    ema_table()
    print()
    optimizer_table()
