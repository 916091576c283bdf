"""Multi-block masks: target blocks, and a context block without them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hjepa_engine.masking.masks import Masks, MaskSource, kept_share
from hjepa_engine.utils.rng import uniform_rows

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BitArray = NDArray[np.uint64]
Range = tuple[float, float]

# At most this share of the layouts is redrawn because their targets leave fewer than K patches. More would let K be larger
# and throw less away, and would favor overlapping targets in the middle of the image: docs/masks.md has the measurements.
_MAX_REDRAWN = 0.05
_CALIBRATION_LAYOUTS = 1024
_ATTEMPTS = 24


class _Shape(NamedTuple):
    target: tuple[int, int]
    context: tuple[int, int]


class _Layouts(NamedTuple):
    """Where the blocks of n images lie."""

    tops: IntArray
    """(n, M + 1): first row of each block, the context block first."""
    lefts: IntArray
    """(n, M + 1): first column."""
    context: BitArray
    """(n, H): each row's columns in the context block, as bits."""
    targets: BitArray
    """(n, H): the same for all target blocks together."""

    def num_free(self, num_patches: int) -> IntArray:
        """(n,): the patches in no target block, of ``num_patches``."""
        return num_patches - _count(self.targets)

    def num_visible(self) -> IntArray:
        """(n,): the patches of the context block in no target block."""
        return _count(self.context & ~self.targets)


class MultiBlockMasks(MaskSource):
    """Sample I-JEPA's multi-block masks (arXiv:2301.08243) without its sampler's biases.

    Each optimizer step draws one target block shape and one context block shape, scale and aspect ratio independently.
    Each image draws ``num_targets`` target positions and one context position, uniformly over all positions that fit.

    All images of a step have K context patches, chosen uniformly from the context block minus the targets. Where this has
    fewer, the context block grows by a patch on all sides until there are K, so the context stays one region. Only where
    all targets together leave fewer than K patches of the grid, the layout is redrawn, at most 24 times; the last attempt
    puts all targets at one position. K is never larger than what all but 5 % of the layouts leave.

    All draws are keyed by (seed, step, index of the image in the global batch), so a rank or micro-batch computes its
    slice alone and gets the same masks as in the whole batch.

    Args:
        grid: (H, W), the patch grid, at most 64 wide.
        num_targets: M, the number of target blocks per image, at least 1.
        target_scale: smallest and largest area of a target block, as a fraction of the grid, in (0, 1].
        aspect_ratio: smallest and largest height / width of a target block, in patches, positive.
        context_scale: smallest and largest area of the context block, as a fraction of the grid, in (0, 1]. The
            context block has the aspect ratio of the grid.
        context_keep: smallest and largest K / N, in (0, 1]. Each step draws one of up to eight values, evenly spaced
            between them. None: K depends on the block shapes alone; it is the median number of patches of the context
            block that are in no target, or what 95 % of the layouts leave, whichever is smaller.

    Raises:
        ValueError: a range is invalid, a target block does not fit into the grid, the context could be empty, or
            ``context_keep`` asks for more than 95 % of the layouts with the largest target blocks leave.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        aspect_ratio: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        context_keep: Range | None = None,
    ) -> None:
        if min(grid) < 1 or grid[1] > 64:
            raise ValueError(f"grid must be at least 1 x 1 and at most 64 wide, got {grid}")
        if num_targets < 1:
            raise ValueError(f"num_targets must be at least 1, got {num_targets}")
        for name, (low, high), limit in (
            ("target_scale", target_scale, 1.0),
            ("aspect_ratio", aspect_ratio, math.inf),
            ("context_scale", context_scale, 1.0),
            ("context_keep", context_keep or (1.0, 1.0), 1.0),
        ):
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} must satisfy 0 < low <= high <= {limit}, got {(low, high)}")
        self.grid, self.num_targets = grid, num_targets
        self.target_scale, self.aspect_ratio, self.context_scale = target_scale, aspect_ratio, context_scale
        self.context_keep = context_keep
        self._limits: dict[_Shape, tuple[int, int]] = {}
        self._check_feasible()

    def sample(self, batch_size: int, seed: int, step: int = 0, offset: int = 0) -> Masks:
        """Masks of images ``offset`` to ``offset + batch_size`` of the global batch of optimizer step ``step``.

        Args:
            batch_size: B, the number of images.
            seed: seed of the run.
            step: optimizer step; all images of a step share their block shapes and K.
            offset: index of the first image in the global batch (all ranks and micro-batches).
        """
        shape, num_context = self._draw_step(seed, step)
        layouts = self._draw_layouts(shape, num_context, batch_size, seed, step, offset)
        # The K patches with the lowest scores are the context: nearest to the context block first, then at random.
        scores = self._distances(shape, layouts).reshape(batch_size, -1)
        scores += uniform_rows(offset, batch_size, self.num_patches, seed, "mask subset", step)
        # Uniform numbers are multiples of 2**-24: less than that lets the lower of equal ones go first.
        scores += np.arange(self.num_patches) * (2.0**-25 / self.num_patches)
        scores[self._cells(layouts.targets)] = np.inf
        highest = np.sort(scores, axis=1)[:, num_context - 1, None]
        context = np.flatnonzero(scores <= highest).reshape(batch_size, num_context)
        context -= np.arange(batch_size)[:, None] * self.num_patches
        (h, w), width = shape.target, self.grid[1]
        corner = layouts.tops[:, 1:] * width + layouts.lefts[:, 1:]
        cells = (np.arange(h)[:, None] * width + np.arange(w)).reshape(-1)
        targets = corner[:, :, None] + cells
        return Masks(torch.from_numpy(context), torch.from_numpy(targets), (h, w))

    def thrown_away(self, batch_size: int, seed: int = 0, steps: int = 100) -> float:
        """Share of the visible patches (of the context block, in no target) that are not among the K, from 0 to 1.

        Args:
            batch_size: images per step.
            seed: seed of the run.
            steps: optimizer steps, from 0, that are measured.
        """
        kept = seen = 0
        for step in range(steps):
            shape, num_context = self._draw_step(seed, step)
            visible = self._draw_layouts(shape, num_context, batch_size, seed, step, 0).num_visible()
            kept, seen = kept + int(np.minimum(visible, num_context).sum()), seen + int(visible.sum())
        return 1 - kept / seen

    def _draw_step(self, seed: int, step: int) -> tuple[_Shape, int]:
        """The block shapes of an optimizer step, and K."""
        u = uniform_rows(0, 1, 4, seed, "mask shape", step)[0].tolist()
        scale, aspect, context_scale = (
            low + (high - low) * draw
            for (low, high), draw in zip((self.target_scale, self.aspect_ratio, self.context_scale), u, strict=False)
        )
        shape = _Shape(self._target_shape(scale, aspect), self._context_shape(context_scale))
        if self.context_keep is None:
            return shape, max(1, min(self._measure(shape)))
        kept = self._num_kept(kept_share(self.context_keep, u[3]))
        return shape, min(kept, self.num_patches - math.prod(shape.target))

    def _measure(self, shape: _Shape) -> tuple[int, int]:
        """Median number of visible patches, and the number that all but 5 % of the layouts leave.

        Computed once for each shape, from random layouts that are the same in every run.
        """
        if shape not in self._limits:
            draws = uniform_rows(0, _CALIBRATION_LAYOUTS, 2 * (self.num_targets + 1), "mask calibration")
            layouts = self._lay_out(shape, draws)
            free = np.quantile(layouts.num_free(self.num_patches), _MAX_REDRAWN, method="lower")
            self._limits[shape] = int(np.median(layouts.num_visible())), int(free)
        return self._limits[shape]

    def _num_kept(self, share: float) -> int:
        return round(share * self.num_patches)

    def _target_shape(self, scale: float, aspect: float) -> tuple[int, int]:
        area = scale * self.num_patches
        return max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))

    def _context_shape(self, scale: float) -> tuple[int, int]:
        side = math.sqrt(scale)
        return max(1, round(side * self.grid[0])), max(1, round(side * self.grid[1]))

    def _check_feasible(self) -> None:
        scale, aspects = self.target_scale[1], self.aspect_ratio
        height, width = self._target_shape(scale, aspects[1])[0], self._target_shape(scale, aspects[0])[1]
        if height > self.grid[0] or width > self.grid[1]:
            raise ValueError(
                f"target blocks must fit into the grid {self.grid}, but target_scale {self.target_scale} with aspect_ratio "
                f"{aspects} allows blocks up to {height} high and {width} wide"
            )
        context = self._context_shape(self.context_scale[0])
        shapes = {self._target_shape(scale, aspect) for aspect in np.geomspace(*aspects, 1025).tolist()}
        largest = max(map(math.prod, shapes))
        if math.prod(context) <= largest:
            raise ValueError(
                f"the context must not be empty, but target_scale {self.target_scale} allows target blocks of {largest} "
                f"patches and context_scale {self.context_scale} context blocks of {math.prod(context)}"
            )
        if self.context_keep is None:
            return
        least, most = map(self._num_kept, self.context_keep)
        if least < 1:
            raise ValueError(
                f"context_keep must keep at least one of {self.num_patches} patches, got {self.context_keep}"
            )
        left, shape = min((self._measure(_Shape(shape, context))[1], shape) for shape in shapes)
        if most > left:
            raise ValueError(
                f"context_keep must be at most {math.floor(1000 * left / self.num_patches) / 1000} where {self.num_targets} "
                f"target blocks may be {shape[0]} x {shape[1]} patches of {self.grid[0]} x {self.grid[1]}, "
                f"got {self.context_keep}"
            )

    def _draw_layouts(self, shape: _Shape, num_context: int, count: int, seed: int, step: int, offset: int) -> _Layouts:
        """Layouts of ``count`` images, at least K patches free in each."""

        def drawn(attempt: int) -> FloatArray:
            return uniform_rows(offset, count, 2 * (self.num_targets + 1), seed, "mask place", step, attempt)

        layouts = self._lay_out(shape, drawn(0))
        for attempt in range(1, _ATTEMPTS):
            short = np.flatnonzero(layouts.num_free(self.num_patches) < num_context)
            if not len(short):
                break
            draws = drawn(attempt)[short]
            if attempt == _ATTEMPTS - 1:
                draws[:, 4:] = np.tile(draws[:, 2:4], self.num_targets - 1)  # at one position, targets leave K patches
            for whole, part in zip(layouts, self._lay_out(shape, draws), strict=True):
                whole[short] = part
        return layouts

    def _lay_out(self, shape: _Shape, draws: FloatArray) -> _Layouts:
        """Layouts of n images from uniform draws (n, 2 (M + 1))."""
        sizes = np.array([shape.context] + [shape.target] * self.num_targets)  # (M + 1, 2)
        positions = (draws.reshape(len(draws), -1, 2) * (np.array(self.grid) - sizes + 1)).astype(np.int64)
        tops, lefts = positions[..., 0], positions[..., 1]
        row = np.arange(self.grid[0])
        inside = (row >= tops[..., None]) & (row < (tops + sizes[:, 0])[..., None])  # (n, M + 1, H)
        columns = np.array([(1 << width) - 1 for width in sizes[:, 1].tolist()], np.uint64) << lefts.astype(np.uint64)
        spans = np.where(inside, columns[..., None], np.uint64(0))
        return _Layouts(tops, lefts, spans[:, 0], np.bitwise_or.reduce(spans[:, 1:], axis=1))

    def _cells(self, rows: BitArray) -> BoolArray:
        """Columns as bits (n, H) to patches (n, N)."""
        octets = rows.astype("<u8")[..., None].view(np.uint8)
        bits = np.unpackbits(octets, axis=-1, count=self.grid[1], bitorder="little")
        return bits.reshape(len(rows), -1).view(bool)

    def _distances(self, shape: _Shape, layouts: _Layouts) -> NDArray[np.float64]:
        """How many patches the context block must grow on all sides to reach a patch: (n, H, W)."""
        beyond = []
        for first, size, length in zip((layouts.tops, layouts.lefts), shape.context, self.grid, strict=True):
            before = first[:, :1] - np.arange(length)
            beyond.append(np.maximum(np.maximum(before, 1 - size - before), 0).astype(np.float64))
        return np.maximum(beyond[0][:, :, None], beyond[1][:, None])


def _count(rows: BitArray) -> IntArray:
    return np.bitwise_count(rows).sum(axis=1, dtype=np.int64)
