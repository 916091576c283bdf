"""Steps of an evaluation: what probes read of an encoder, and many heads that are trained at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import as_tokens, pool_disjoint
from hjepa_engine.types import Batch, Outputs, unwrap

#: Of a level's cells, the most that are read side by side; of more, their mean is.
MAX_CELLS = 16


def readings_step(
    modules: nn.ModuleDict, batch: Batch, levels: Sequence[Level] = (), last_blocks: int = 4, patches: bool = False
) -> Outputs:
    """Compute what probes read of whole images, without gradients.

    Args:
        modules: ``encoder``, from images to tokens (B, N, D) or features (B, D); one with ``features(images, depths=...)``,
            ``depth`` and ``grid`` is read at every depth. Without an encoder, the pixels are read.
        batch: ``images`` (B, C, H, W), normalized.
        levels: levels of the hierarchy.
        last_blocks: of how many blocks the mean tokens are concatenated; fewer, where the encoder has fewer.
        patches: compute ``patches`` alone.

    Returns:
        ``pixels`` (B, C * H * W) without an encoder. Else ``patches`` (B, N, D), the tokens; or the readings: ``last``
        (B, D), the mean token; ``last_<n>`` (B, n * D), the mean tokens of the last n blocks, I-JEPA's and DINO's reading
        with n = 4; ``level_<l>`` at the depth of that level, (B, D), or (B, cells * D) where it pools patches to at most 16
        cells. A level that would be the same as an earlier reading is left out, and one of pixels. All float32.
    """
    images = batch["images"]
    if "encoder" not in modules:
        return {"pixels": images.flatten(1)}
    encoder = unwrap(modules["encoder"])
    with torch.no_grad():
        if patches or not hasattr(encoder, "features"):
            tokens = as_tokens(encoder(images)).float()
            return {"patches": tokens} if patches else {"last": tokens.mean(dim=1)}
        number = min(last_blocks, encoder.depth)
        shares = [1 - above / encoder.depth for above in reversed(range(number))]
        depths = sorted({level.depth for level in levels if level.depth} | set(shares))
        found = dict(zip(depths, encoder.features(images, depths=depths), strict=True))
    found = {depth: tokens.float() for depth, tokens in found.items()}
    outputs = {"last": found[1.0].mean(dim=1)}
    if number > 1:
        outputs[f"last_{number}"] = torch.cat([found[share].mean(dim=1) for share in shares], dim=1)
    known = {(1.0, 1)}
    for index, level in enumerate(levels):
        kind = level.depth, _cells_side(level, encoder.grid)
        if level.depth and kind not in known:
            outputs[f"level_{index}"] = _cells(found[level.depth], encoder.grid, kind[1])
        known.add(kind)
    return outputs


def _cells_side(level: Level, grid: tuple[int, int]) -> int:
    """The side of the cells that are read side by side; 1: the mean of all tokens is read."""
    side = 1 if level.pool == "image" else level.pool
    cells = -(-grid[0] // side) * -(-grid[1] // side)
    return side if 1 < cells <= MAX_CELLS else 1


def _cells(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    return tokens.mean(dim=1) if side == 1 else pool_disjoint(tokens, grid, side).flatten(1)


def patch_pixels_step(modules: nn.ModuleDict, batch: Batch, grid: tuple[int, int] = (1, 1)) -> Outputs:
    """The pixels of each patch, (B, N, C * height * width), as ``patches``: what an encoder of patches is compared with.

    Args:
        modules: not used.
        batch: ``images`` (B, C, H, W).
        grid: patches in a column and in a row; they divide H and W.
    """
    images: Tensor = batch["images"]
    number, channels, height, width = images.shape
    rows, columns = grid
    cut = images.view(number, channels, rows, height // rows, columns, width // columns)
    return {"patches": cut.permute(0, 2, 4, 1, 3, 5).reshape(number, rows * columns, -1).float()}


def probe_heads_step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
    """Classify frozen features with G heads at once, none of which knows of the others.

    Args:
        modules: ``heads``, from features to logits (G, B, C), with ``penalty()`` ().
        batch: ``features`` (B, ...) and ``labels`` (B,).

    Returns:
        ``loss`` (), the sum of the heads' cross-entropies in nats and of their penalties; ``logits`` (G, B, C).
    """
    heads: Any = modules["heads"]
    labels = batch["labels"]
    logits = heads(batch["features"])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum") / len(labels)
    return {"loss": losses + heads.penalty(), "logits": logits}
