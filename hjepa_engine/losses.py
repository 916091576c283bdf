"""Prediction losses and optional regularizers of the encoder's tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa_engine.types import LossFunction
from hjepa_engine.utils.distributed import of_rank_zero


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth L1: mean of x^2 / 2 where |x| < 1, else |x| - 1/2, with x the difference (the loss of I-JEPA)."""
    return F.smooth_l1_loss(prediction, target)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(prediction, target)


def huber(prediction: Tensor, target: Tensor, delta: float = 0.5) -> Tensor:
    """Huber: mean of x^2 / 2 where |x| < delta, else delta (|x| - delta / 2); with delta 1 it is ``smooth_l1``."""
    return F.huber_loss(prediction, target, delta=delta)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine similarity over D, averaged over the other dimensions: from 0 (same direction) to 2."""
    return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()


#: Losses by name; ``loss.type`` also takes the dotted path of any :class:`~hjepa_engine.types.LossFunction`.
LOSSES: dict[str, LossFunction] = {
    "smooth_l1": smooth_l1,
    "mse": mse,
    "huber": huber,
    "cosine": cosine,
}


def variance(tokens: Tensor, eps: float = 1e-4) -> Tensor:
    """Mean over D of max(0, 1 - std), the standard deviation over ``tokens`` (..., D) (VICReg, arXiv:2105.04906)."""
    samples = tokens.float().flatten(0, -2)
    return F.relu(1 - (samples.var(dim=0, correction=_correction(samples)) + eps).sqrt()).mean()


def covariance(tokens: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances of ``tokens`` (..., D), divided by D (VICReg, arXiv:2105.04906)."""
    samples = tokens.float().flatten(0, -2)
    matrix = torch.cov(samples.T, correction=_correction(samples))
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / samples.shape[1]


def _correction(samples: Tensor) -> int:
    """Unbiased as in the paper; for a single sample biased, which gives 0 instead of 0 / 0."""
    return min(1, len(samples) - 1)


def sigreg(tokens: Tensor, num_slices: int = 256, num_points: int = 17) -> Tensor:
    """Distance of ``tokens`` (..., D) from an isotropic normal distribution (SIGReg, LeJEPA, arXiv:2511.08544).

    Mean over random directions of the Epps-Pulley statistic: the squared distance between the empirical characteristic
    function and exp(-t^2 / 2), weighted by exp(-t^2 / 2), integrated over t from -5 to 5 (trapezoidal rule), times the
    number of samples. Directions are drawn from torch's global generator, which a run seeds before every step; those of
    rank 0 count for all (a collective: all ranks must call this).
    """
    samples = tokens.float().flatten(0, -2)
    drawn = of_rank_zero(torch.randn(samples.shape[1], num_slices, device=samples.device))
    directions = F.normalize(drawn, dim=0)
    t = torch.linspace(-5, 5, num_points, device=samples.device)
    normal = torch.exp(-0.5 * t.square())
    angles = (samples @ directions).unsqueeze(-1) * t  # (samples, slices, points)
    distance = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
    return len(samples) * torch.trapezoid(distance * normal, t, dim=-1).mean()


#: Regularizers by name; each maps tokens (..., D) to a loss (). With several processes, give them the tokens of all
#: (:func:`~hjepa_engine.utils.distributed.gather_samples`).
REGULARIZERS = {"variance": variance, "covariance": covariance, "sigreg": sigreg}
