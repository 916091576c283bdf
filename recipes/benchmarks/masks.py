"""Measure the sampler of masks: its time, where targets lie, what is thrown away.

    OMP_NUM_THREADS=1 python recipes/benchmarks/masks.py

docs/masks.md quotes the output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hjepa_engine import create_trainer
from hjepa_engine.handlers import OptimizerStep
from hjepa_engine.masking import MultiBlockMasks
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.recipes.benchmarks.parts import TimedSampler
from hjepa_engine.types import Batch, Outputs

#: Grid, batch size, other arguments: the defaults, the reference sampler's share, and digit_pages.yaml.
SETTINGS: tuple[tuple[tuple[int, int], int, dict[str, Any]], ...] = (
    ((8, 8), 256, {}),
    ((14, 14), 128, {}),
    ((16, 16), 128, {}),
    ((12, 20), 128, {}),
    ((16, 16), 128, {"context_keep": (0.267, 0.267)}),
    ((4, 4), 64, {"num_targets": 2, "target_scale": (0.25, 0.35)}),
)


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


def waiting_table(iterations: int = 300) -> None:
    """What an iteration waits for its masks, beside a step that multiplies matrices."""
    matrix = torch.randn(700, 700)
    images: list[Batch] = [{"images": torch.zeros(128, 1)}] * iterations

    def step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
        return {"loss": modules["model"](torch.ones(1)).sum() + (matrix @ matrix).sum()}

    for name, ahead in (("in place", False), ("beside the step", True)):
        sampler = TimedSampler(MultiBlockMasks((14, 14)))
        sampler.ahead = ahead
        trainer = create_trainer(step, modules := nn.ModuleDict({"model": nn.Linear(1, 1)}))
        trainer.attach(sampler, OptimizerStep(torch.optim.SGD(modules.parameters(), 0.0)))
        trainer.run(images, max_epochs=1)
        waited = 1e3 * statistics.median(sampler.times)
        print(f"an iteration waits {waited:.2f} ms for masks that are sampled {name} (14 x 14, batch 128)")


if __name__ == "__main__":
    print(machine() + "\n")
    masks_table()
    print()
    waiting_table()
