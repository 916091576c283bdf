"""Measure what the engine itself costs: mask sampling, and events and handlers around a step that does nothing.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hjepa_engine import create_trainer
from hjepa_engine.engine import StepEngine
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

#: Grid, batch size, other arguments: the defaults, the reference sampler's share, and digit_pages.yaml.
SETTINGS: tuple[tuple[tuple[int, int], int, dict[str, Any]], ...] = (
    ((8, 8), 256, {}),
    ((14, 14), 128, {}),
    ((16, 16), 128, {}),
    ((12, 20), 128, {}),
    ((16, 16), 128, {"context_keep": (0.267, 0.267)}),
    ((4, 4), 64, {"num_targets": 2, "target_scale": (0.25, 0.35)}),
)
ITERATIONS = 400

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "one by one": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call, after a warm-up of a tenth of the repeats."""
    times = []
    for number in range(repeats + repeats // 10):
        began = time.perf_counter()
        action()
        if number >= repeats // 10:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


class Placement(NamedTuple):
    """Where sampled target blocks lie, averaged over steps; ``independent``: those that are placed independently."""

    length: str
    kept: float
    overlap: float
    independent_overlap: float
    edge: float
    """How often blocks lie on the first and last rows and columns, relative to the middle ones."""
    independent_edge: float


def placement(masks: MultiBlockMasks, batch_size: int, steps: int = 300) -> Placement:
    """Measure the context's length and the positions of target blocks.

    Independent ones are computed: each of the positions where a block fits has the same probability.
    """
    lengths, means = [], []
    for step in range(steps):
        drawn = masks.sample(batch_size, 0, step)
        lengths.append(drawn.context_idx.shape[1])
        corner = drawn.target_idx[:, :, 0]
        pairs = torch.triu_indices(corner.shape[1], corner.shape[1], 1)
        overlaps, edges = [], []
        for first, size, side in zip(
            (corner // masks.grid[1], corner % masks.grid[1]), drawn.block, masks.grid, strict=True
        ):
            places = torch.arange(side - size + 1)
            apart = ((first[:, pairs[0]] - first[:, pairs[1]]).abs(), (places[:, None] - places).abs())
            overlaps.append([(1 - each / size).clamp(min=0) for each in apart])
            edges.append([_edge_over_middle(each, size, side) for each in (first, places)])
        ours, independent = zip(*overlaps, strict=True)
        means.append(
            [
                (ours[0] * ours[1]).mean().item(),
                (independent[0].mean() * independent[1].mean()).item(),
                *(statistics.mean(both) for both in zip(*edges, strict=True)),
            ]
        )
    number = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
    return Placement(
        number, statistics.mean(lengths) / masks.num_patches, *map(statistics.mean, zip(*means, strict=True))
    )


def _edge_over_middle(first: Tensor, size: int, side: int) -> float:
    counts = torch.zeros(side)
    for row in (0, side - 1, (side - 1) // 2, side // 2):
        counts[row] = ((first <= row) & (row < first + size)).sum()
    return ((counts[0] + counts[-1]) / (counts[(side - 1) // 2] + counts[side // 2])).item()


def masks_table() -> None:
    """Time of mask sampling, what it throws away, and where targets lie."""
    print(
        "masks    batch  context (share)       thrown away  overlap (independent)  edge / middle (independent)  ms per batch"
    )
    for (height, width), batch_size, arguments in SETTINGS:
        masks, steps = MultiBlockMasks((height, width), **arguments), iter(range(10**6))
        found, share = placement(masks, batch_size), masks.thrown_away(batch_size)
        milliseconds = 1e3 * seconds(lambda m=masks, b=batch_size, s=steps: m.sample(b, 0, next(s)), 300)  # type: ignore[misc]
        print(
            f"{height:2} x {width:<2}  {batch_size:5}  {found.length:>10} ({100 * found.kept:.1f} %)  {100 * share:9.1f} %"
            f"      {found.overlap:.3f} ({found.independent_overlap:.3f})           "
            f"{found.edge:.3f} ({found.independent_edge:.3f})         {milliseconds:10.2f}"
        )


class _TimedSampler(MaskSampler):
    """Remembers how long each iteration waited for its masks."""

    def __init__(self, ahead: bool) -> None:
        super().__init__(MultiBlockMasks((14, 14)))
        self.ahead, self.times = ahead, list[float]()

    def sample(self, engine: StepEngine) -> None:
        began = time.perf_counter()
        super().sample(engine)
        self.times.append(time.perf_counter() - began)

    def _sample_ahead(self, *draw: Any) -> None:
        if self.ahead:
            super()._sample_ahead(*draw)


def waiting_table(iterations: int = 300) -> None:
    """What an iteration waits for its masks, beside a step that multiplies matrices."""
    matrix = torch.randn(700, 700)
    images: list[Batch] = [{"images": torch.zeros(128, 1)}] * iterations

    def step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
        return {"loss": modules["model"]() + (matrix @ matrix).sum()}

    for name, ahead in (("in place", False), ("beside the step", True)):
        sampler = _TimedSampler(ahead)
        trainer = create_trainer(step, modules := nn.ModuleDict({"model": _Nothing()}))
        trainer.attach(sampler, OptimizerStep(torch.optim.SGD(modules.parameters(), 0.0)))
        trainer.run(images, max_epochs=1)
        waited = 1e3 * statistics.median(sampler.times)
        print(f"an iteration waits {waited:.2f} ms for masks that are sampled {name} (14 x 14, batch 128)")


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
    masks_table()
    print()
    waiting_table()
    print()
    engine_table()
    print()
    ema_table()
    print()
    optimizer_table()
