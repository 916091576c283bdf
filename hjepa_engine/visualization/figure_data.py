"""The numbers behind the figures: pixels, features as colors, similarities, spectra of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import cell_centers
from hjepa_engine.masking import Masks
from hjepa_engine.metrics.names import SPECTRUM, spectrum_encoder

FloatArray = NDArray[np.float64]

#: Features that vary by less than this part of their norm are drawn in gray, not stretched to full color.
FLAT = 0.1
_GRAY, _CONTRAST = 0.8, 0.12


def to_pixels(images: Tensor, stats: tuple[Sequence[float], Sequence[float]]) -> FloatArray:
    """Normalized images (B, C, H, W), C 1 or 3, as pixels (B, H, W, 3) from 0 to 1.

    Args:
        images: to show.
        stats: mean and standard deviation that the channels were normalized with.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in stats)
    pixels = (images.detach().cpu().double() * std + mean).clamp(0, 1)
    if pixels.shape[1] != 3:  # of two bands the first, of more the first three
        pixels = pixels[:, : 3 if pixels.shape[1] > 3 else 1]
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def dimmed(pixels: FloatArray, patch_idx: Tensor, grid: tuple[int, int]) -> FloatArray:
    """An image (H, W, 3) with all patches but those of ``patch_idx`` turned to a light gray that hardly shows them."""
    seen = np.zeros(grid[0] * grid[1], dtype=bool)
    seen[patch_idx.flatten().cpu().numpy()] = True
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    mask = seen.reshape(grid).repeat(height, axis=0).repeat(width, axis=1)
    gray = pixels.mean(axis=-1, keepdims=True)
    return np.where(mask[..., None], pixels, _GRAY + _CONTRAST * (gray - 0.5))


class PatchColors(NamedTuple):
    """Features as colors."""

    colors: FloatArray
    """(B, N, 3), from 0 to 1; 0.5 is the mean."""
    explained: tuple[float, ...]
    """Part of the variance that each of the three components has; 0 if nothing varies."""
    variation: float
    """Standard deviation of the features at one position, as a part of their norm; from 0 to 1."""


def patch_colors(tokens: Tensor) -> PatchColors:
    """The first three principal components of patch features (B, N, D) as red, green and blue.

    Features are centered per position over the images, since features that differ between positions and not between images
    are collapsed. A component is scaled by the 98th percentile of its size, but never by less than a tenth of the first
    one's or of the features' norm: a component that hardly varies stays gray. Its largest loading is positive.
    """
    features = tokens.detach().float()
    batch, positions, dim = features.shape
    centered = (features - (features.mean(0) if batch > 1 else features.mean((0, 1)))).reshape(-1, dim)
    covariance = (centered.T @ centered).double() / len(centered)
    values, vectors = (each.flip(-1)[..., :3] for each in torch.linalg.eigh(covariance))
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    scores = F.pad(centered.double() @ (vectors * largest.sign()), (0, 3 - vectors.shape[1]))
    length = features.double().square().sum(dim=-1).mean().sqrt()
    total = covariance.trace()
    # A small batch has few values per position: one quantile over all positions.
    size = torch.from_numpy(np.quantile(scores.abs().cpu().numpy(), 0.98, axis=0)).to(scores)
    scale = torch.maximum(size, torch.maximum(FLAT * size[0], FLAT * length)).clamp(min=torch.finfo(torch.float64).tiny)
    colors = 0.5 + 0.5 * (scores / scale).clamp(-1, 1)
    share = F.pad(values.clamp(min=0) / total, (0, 3 - len(values))) if total > 0 else torch.zeros(3)
    variation = float(total.sqrt() / length) if length > 0 else 0.0
    return PatchColors(colors.reshape(batch, positions, 3).cpu().numpy(), tuple(share.tolist()), variation)


class Similarities(NamedTuple):
    """Cosine similarities of predictions with targets."""

    own: FloatArray
    """With the target of the same cell, one for each prediction."""
    others: FloatArray
    """With targets of other images at the same position, one for each such pair."""
    correct: float
    """Part of those pairs in which the own target is the more similar one; 0.5 is chance, NaN if there are none."""


def similarities(predictions: Tensor, targets: Tensor, masks: Masks, level: Level, grid_width: int) -> Similarities:
    """Compare each prediction with its own target, and with the targets at the same position of other images.

    Much of a target follows from its position alone; this asks whether a prediction also knows the image.

    Args:
        predictions: of one level, (B, M, cells, D).
        targets: as ``predictions``.
        masks: of the images.
        level: which one it is.
        grid_width: W, patches in a row.
    """
    predicted, aimed = (F.normalize(each.detach().float(), dim=-1) for each in (predictions, targets))
    batch, dim = len(predicted), predicted.shape[-1]
    if level.pool == "image":
        position = torch.zeros(batch, 1, 1, dtype=torch.int64)
    else:
        rows, columns = cell_centers(masks, level.pool, grid_width)
        position = rows[..., :, None] * 2 * grid_width + columns[..., None, :]
    position = position.reshape(batch, -1).to(predicted.device)
    image = torch.arange(batch, device=position.device)[:, None].expand_as(position).reshape(-1)
    predicted, aimed = predicted.reshape(-1, dim), aimed.reshape(-1, dim)
    own, others, correct = (predicted * aimed).sum(dim=-1), [], []
    order = position.reshape(-1).argsort(stable=True)
    for cells in order.split(position.reshape(-1).unique(return_counts=True)[1].tolist()):
        cosine = predicted[cells] @ aimed[cells].T
        pairs = image[cells][:, None] != image[cells]
        own_here = own[cells][:, None].expand_as(cosine)[pairs]
        others.append(cosine[pairs])
        correct.append((own_here > others[-1]).double() + 0.5 * (own_here == others[-1]))
    found = torch.cat(correct)
    share = float(found.mean()) if len(found) else float("nan")
    return Similarities(own.double().cpu().numpy(), torch.cat(others).double().cpu().numpy(), share)


class Spectrum(NamedTuple):
    """Singular values of features at one step."""

    step: int
    rank: Sequence[int]
    """From 1; some may be left out."""
    share: Sequence[float]
    """Each value divided by the sum of all."""


def read_spectra(path: Path, before: int | None = None) -> dict[str, list[Spectrum]]:
    """Spectra of each encoder that ``collapse/<encoder>_spectrum`` has in a ``metrics.jsonl``, by step.

    Args:
        path: of the file; nothing is found where there is none.
        before: only those of earlier steps.
    """
    found: dict[str, dict[int, Spectrum]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        if SPECTRUM not in line:
            continue  # the file of a long run has many lines, and parsing is slow
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a last line that is being written
        if before is None or record["step"] < before:
            for name, value in record.items():
                if (encoder := spectrum_encoder(name)) is not None:
                    spectrum = Spectrum(record["step"], value["rank"], value["share"])
                    found.setdefault(encoder, {})[record["step"]] = spectrum
    return {encoder: [steps[step] for step in sorted(steps)] for encoder, steps in found.items()}
