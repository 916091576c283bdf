"""Multi-block masks: which patches the context encoder sees and which ones are predicted."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.utils.rng import uniform_rows

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Range = tuple[float, float]

# K is this quantile of the number of visible patches over random layouts of one shape. A lower quantile drops more visible
# patches; a higher one redraws more layouts, which favors overlapping targets. docs/masks.md has the measurements.
_QUANTILE = 0.64
_CALIBRATION_LAYOUTS = 1024
_ATTEMPTS = 24


class Masks(NamedTuple):
    """Indices of patches; the N = H * W patches of an image are numbered row by row."""

    context_idx: Tensor
    """(B, K) int64, ascending: the visible patches, which the context encoder sees."""
    target_idx: Tensor
    """(B, M, h * w) int64: the patches of each target block, row by row."""
    block: tuple[int, int]
    """(h, w): height and width of the target blocks, in patches."""


class _Shape(NamedTuple):
    target: tuple[int, int]
    context: tuple[int, int]


class MultiBlockMasks:
    """Sample I-JEPA's multi-block masks (arXiv:2301.08243) without its sampler's biases.

    Each optimizer step draws one target block shape and one context block shape, scale and aspect ratio independently.
    Each image draws ``num_targets`` target positions and one context position, uniformly over all positions that fit.
    The context is the context block minus all targets of the image.

    The number K of context patches depends only on the two shapes. Layouts with fewer visible patches are redrawn (at
    most 24 attempts; the last one puts all targets at the same position). In layouts with more, K are chosen uniformly.
    All draws are keyed by (seed, step, index of the image in the global batch), so a rank or micro-batch computes its
    slice alone and gets the same masks as in the whole batch.

    Args:
        grid: (H, W), the patch grid, at most 64 wide.
        num_targets: M, the number of target blocks per image, at least 1.
        target_scale: smallest and largest area of a target block, as a fraction of the grid, in (0, 1].
        aspect_ratio: smallest and largest height / width of a target block, in patches, positive.
        context_scale: smallest and largest area of the context block, as a fraction of the grid, in (0, 1]. The
            context block has the aspect ratio of the grid.

    Raises:
        ValueError: a range is invalid, a target block does not fit into the grid, or the context could be empty.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        aspect_ratio: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
    ) -> None:
        if min(grid) < 1 or grid[1] > 64:
            raise ValueError(f"grid must be at least 1 x 1 and at most 64 wide, got {grid}")
        if num_targets < 1:
            raise ValueError(f"num_targets must be at least 1, got {num_targets}")
        for name, (low, high), limit in (
            ("target_scale", target_scale, 1.0),
            ("aspect_ratio", aspect_ratio, math.inf),
            ("context_scale", context_scale, 1.0),
        ):
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} must satisfy 0 < low <= high <= {limit}, got {(low, high)}")
        self.grid, self.num_targets = grid, num_targets
        self.target_scale, self.aspect_ratio, self.context_scale = target_scale, aspect_ratio, context_scale
        self._visible: dict[_Shape, int] = {}
        self._check_feasible()

    @property
    def num_patches(self) -> int:
        """N = H * W."""
        return self.grid[0] * self.grid[1]

    def sample(self, batch_size: int, seed: int, step: int = 0, offset: int = 0) -> Masks:
        """Masks of images ``offset`` to ``offset + batch_size`` of the global batch of optimizer step ``step``.

        Args:
            batch_size: B, the number of images.
            seed: seed of the run.
            step: optimizer step; all images of a step share their block shapes.
            offset: index of the first image in the global batch (all ranks and micro-batches).
        """
        shape = self._draw_shape(seed, step)
        num_visible = self.num_visible(shape)
        tops, lefts, visible = self._draw_layouts(shape, batch_size, seed, step, offset, num_visible)
        scores = uniform_rows(offset, batch_size, self.num_patches, seed, "mask subset", step)
        scores[~visible.reshape(batch_size, -1)] = 2.0  # above all uniform draws, so never among the K smallest
        context = np.sort(np.argpartition(scores, num_visible - 1, axis=1)[:, :num_visible], axis=1)
        (h, w), width = shape.target, self.grid[1]
        corner = tops[:, 1:] * width + lefts[:, 1:]
        cells = (np.arange(h)[:, None] * width + np.arange(w)).reshape(-1)
        targets = corner[:, :, None] + cells
        return Masks(torch.from_numpy(context), torch.from_numpy(targets), (h, w))

    def num_visible(self, shape: _Shape) -> int:
        """K for these block shapes, computed once from random layouts that are the same in every run."""
        if shape not in self._visible:
            draws = uniform_rows(0, _CALIBRATION_LAYOUTS, 2 * (self.num_targets + 1), "mask calibration")
            counts = np.bitwise_count(self._lay_out(shape, draws)[2]).sum(axis=1)
            (h, w), (context_h, context_w) = shape.target, shape.context
            always_visible = context_h * context_w - h * w  # at least this many with all targets at one position
            self._visible[shape] = max(1, min(int(np.quantile(counts, _QUANTILE)), always_visible))
        return self._visible[shape]

    def _draw_shape(self, seed: int, step: int) -> _Shape:
        u = uniform_rows(0, 1, 3, seed, "mask shape", step)[0]
        scale, aspect, context_scale = (
            low + (high - low) * draw
            for (low, high), draw in zip((self.target_scale, self.aspect_ratio, self.context_scale), u, strict=True)
        )
        return _Shape(self._target_shape(scale, aspect), self._context_shape(context_scale))

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
        context_h, context_w = self._context_shape(self.context_scale[0])
        largest = max(math.prod(self._target_shape(scale, aspect)) for aspect in np.linspace(*aspects, 33))
        if context_h * context_w <= largest:
            raise ValueError(
                f"the context must not be empty, but target_scale {self.target_scale} allows target blocks of {largest} "
                f"patches and context_scale {self.context_scale} context blocks of {context_h * context_w}"
            )

    def _draw_layouts(
        self, shape: _Shape, count: int, seed: int, step: int, offset: int, num_visible: int
    ) -> tuple[IntArray, IntArray, BoolArray]:
        """Block positions (B, M + 1), context first, and visible patches (B, H, W), at least K in each image."""
        width = 2 * (self.num_targets + 1)
        draws = uniform_rows(offset, count, width * _ATTEMPTS, seed, "mask place", step).reshape(count, _ATTEMPTS, -1)
        # The last attempt cannot fail: with all targets at one position, at least K patches are visible.
        draws[:, -1, 4:] = np.tile(draws[:, -1, 2:4], self.num_targets - 1)
        chosen, pending = np.zeros(count, np.int64), np.arange(count)
        # Most images need few attempts: a few rounds of growing size are faster than one image or attempt at a time.
        for begin, end in ((0, 1), (1, 5), (5, _ATTEMPTS)):
            if not len(pending):
                break
            attempts = draws[pending, begin:end]
            rows = self._lay_out(shape, attempts.reshape(-1, width))[2]
            enough = np.bitwise_count(rows).sum(axis=1).reshape(attempts.shape[:2]) >= num_visible
            found = enough.any(axis=1)
            chosen[pending[found]] = begin + enough[found].argmax(axis=1)
            pending = pending[~found]
        tops, lefts, rows = self._lay_out(shape, draws[np.arange(count), chosen])
        visible = (rows[:, :, None] >> np.arange(self.grid[1], dtype=np.uint64)) & np.uint64(1)
        return tops, lefts, visible.astype(bool)

    def _lay_out(self, shape: _Shape, draws: FloatArray) -> tuple[IntArray, IntArray, NDArray[np.uint64]]:
        """Block positions (n, M + 1) and each row's visible columns as bits (n, H), from uniform draws (n, 2 (M + 1))."""
        sizes = np.array([shape.context] + [shape.target] * self.num_targets)  # (M + 1, 2)
        positions = (draws.reshape(len(draws), -1, 2) * (np.array(self.grid) - sizes + 1)).astype(np.int64)
        tops, lefts = positions[..., 0], positions[..., 1]
        row = np.arange(self.grid[0])
        inside = (row >= tops[..., None]) & (row < (tops + sizes[:, 0])[..., None])  # (n, M + 1, H)
        columns = np.array([(1 << width) - 1 for width in sizes[:, 1].tolist()], np.uint64) << lefts.astype(np.uint64)
        spans = np.where(inside, columns[..., None], np.uint64(0))
        return tops, lefts, spans[:, 0] & ~np.bitwise_or.reduce(spans[:, 1:], axis=1)
