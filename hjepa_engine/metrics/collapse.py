"""Collapse metrics: a streamed covariance of features, and ranks and sizes of its spectrum.

All features are *centered*: a mean carries no information on the image. Feature maps are centered per position, since
features that differ between positions and not between images are collapsed too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from torch import Tensor


def samples_needed(dim: int) -> int:
    """Samples needed to estimate a rank of up to D."""
    return max(2 * dim, 2048)


def images_needed(dim: int, samples_per_image: int) -> int:
    """Images that have max(2 D, 2048) samples: at least 128, so that no single one decides the mean at a position."""
    return max(128, math.ceil(samples_needed(dim) / samples_per_image))


def rounding_of(dtype: torch.dtype) -> float:
    """Rounding of features that a network computes in ``dtype``, relative to their root mean square; rounded up.

    Measured on vision transformers of 3 to 12 blocks: up to 5 units of the last place in float32, 0.6 in bfloat16 (where
    autocast rounds factors and keeps sums in float32).
    """
    return torch.finfo(dtype).eps * (1 if dtype.itemsize < 4 else 16)


class FeatureStatistics:
    """Mean and covariance of features (samples, D), streamed in float64: D x D numbers are kept, never the samples.

    Batches are merged by the update of Chan, Golub and LeVeque (1983), which stays exact for features with a large mean.
    The sums are on the device of the features.

    Args:
        dim: D.
        positions: of a feature map, each with its own mean; 1: one mean for all.
        computed_in: the type of autocast, if the features were computed in less precision than their own type has.

    Raises:
        ValueError: ``dim`` or ``positions`` is not positive.
    """

    def __init__(self, dim: int, positions: int = 1, computed_in: torch.dtype | None = None) -> None:
        if dim < 1 or positions < 1:
            raise ValueError(f"dim and positions must be positive, got {dim} and {positions}")
        self.dim, self.positions, self.samples = dim, positions, 0
        self.count = torch.zeros(positions, dtype=torch.float64)
        self.mean = torch.zeros(positions, dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self.rounding = rounding_of(computed_in or torch.float64)

    def add(self, features: Tensor, position_idx: Tensor | None = None) -> None:
        """Add features.

        Args:
            features: (..., D); without ``position_idx`` the dimension before D is the position, if there are several.
            position_idx: the position of each feature (...).
        """
        self.rounding = max(self.rounding, rounding_of(features.dtype))
        if not features.numel():
            return
        self._move(features.device)
        flat = features.detach().reshape(-1, self.dim).double()
        if position_idx is None:
            maps = flat.view(-1, self.positions, self.dim)
            count, mean = torch.full_like(self.count, len(maps)), maps.mean(dim=0)
            centered = (maps - mean).view(-1, self.dim)
        else:
            position_idx = position_idx.reshape(-1).to(flat.device)
            count = torch.zeros_like(self.count).index_add_(0, position_idx, torch.ones_like(flat[:, 0]))
            mean = torch.zeros_like(self.mean).index_add_(0, position_idx, flat) / count.clamp(min=1)[:, None]
            centered = flat - mean[position_idx]
        share = count / (self.count + count).clamp(min=1)
        shift = mean - self.mean
        self.scatter = self.scatter + centered.T @ centered + shift.T @ ((self.count * share)[:, None] * shift)
        self.mean = self.mean + shift * share[:, None]
        self.count = self.count + count
        self.samples += len(flat)

    def reduced(self) -> FeatureStatistics:
        """The statistics of all ranks' samples together. Collective."""
        if idist.get_world_size() == 1:
            return self
        whole = FeatureStatistics(self.dim, self.positions)
        whole.samples = int(idist.all_reduce(self.samples))
        whole.rounding = float(idist.all_reduce(self.rounding, op="MAX"))
        whole.count = _sum_of_ranks(self.count)
        whole.mean = _sum_of_ranks(self.mean * self.count[:, None]) / whole.count.clamp(min=1)[:, None]
        shift = self.mean - whole.mean
        whole.scatter = _sum_of_ranks(self.scatter + shift.T @ (self.count[:, None] * shift))
        return whole

    @property
    def degrees_of_freedom(self) -> int:
        """Samples minus the means subtracted from them: the rank cannot be larger."""
        return self.samples - int((self.count > 0).sum())

    def singular_values(self) -> Tensor:
        """Singular values (D,) of the centered samples divided by the square root of their number, largest first.

        Values below the rounding of the features (see :func:`rounding_of`) or of the eigenvalues (5e-7 of the largest for
        D = 1280) are 0. All are NaN if a feature was not finite.
        """
        if not self.scatter.isfinite().all():
            return torch.full_like(self.scatter[0], torch.nan)
        number = max(1, self.samples)
        values = torch.linalg.eigvalsh(self.scatter / number).flip(0).clamp(min=0)
        mean_square = (values.sum() + (self.count / number) @ self.mean.square().sum(dim=1)) / self.dim
        least = torch.maximum(self.rounding**2 * mean_square, self.dim * torch.finfo(torch.float64).eps * values[0])
        return torch.where(values > least, values, 0.0).sqrt()

    def summary(self, singular_values: Tensor | None = None) -> dict[str, float]:
        """``std``, ``norm``, ``rank``, ``rank_share`` and ``rank_me``, each smallest for collapsed features.

        ``std``: standard deviation of a dimension, averaged over D. ``norm``: root of the mean squared L2 norm of the
        centered features. ``rank``: effective rank, from 1 to D (see :func:`spectrum_rank`). ``rank_share``: (rank - 1)
        / (largest possible rank - 1), from 0 to 1. ``rank_me``: as :func:`rank_me`. All are NaN if a feature was not
        finite.

        Args:
            singular_values: of these statistics, if they are known already: computing them takes most of the time.
        """
        values = self.singular_values() if singular_values is None else singular_values
        degrees_of_freedom = self.degrees_of_freedom
        rank, most = spectrum_rank(values), min(self.dim, max(1, degrees_of_freedom))
        variances = self.scatter.diagonal() / max(1, degrees_of_freedom)
        return {
            "std": float(variances.clamp(min=0).sqrt().mean()),
            "norm": float(values.square().sum().sqrt()),
            "rank": rank,
            "rank_share": (rank - 1) / max(1, most - 1),
            "rank_me": rank_me(values),
        }

    def _move(self, device: torch.device) -> None:
        self.count, self.mean, self.scatter = (t.to(device) for t in (self.count, self.mean, self.scatter))

    def state_dict(self) -> dict[str, Any]:
        """All sums of this rank."""
        names = ("samples", "count", "mean", "scatter", "rounding")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> FeatureStatistics:
        """The statistics with the state ``state_dict``."""
        positions, dim = state_dict["mean"].shape
        statistics = cls(dim, positions)
        for name, value in state_dict.items():
            setattr(statistics, name, value.clone() if isinstance(value, Tensor) else value)
        return statistics


def _sum_of_ranks(value: Tensor) -> Tensor:
    return idist.all_reduce(value.clone())  # type: ignore[return-value]


def spectrum_rank(singular_values: Tensor) -> float:
    """Effective rank of a spectrum (D,): the exponential of the entropy of its shares (Roy and Vetterli, EUSIPCO 2007).

    >>> spectrum_rank(torch.tensor([1.0, 1.0, 0.0])), spectrum_rank(torch.zeros(3))
    (2.0, 1.0)
    """
    total = singular_values.sum()
    share = singular_values / torch.where(total == 0, 1.0, total)
    return float(torch.special.entr(share).sum().exp())


def rank_me(singular_values: Tensor, eps: float = 1e-7) -> float:
    """RankMe (arXiv:2210.02885) of a spectrum (D,): as :func:`spectrum_rank`, with ``eps`` added to every share.

    The paper takes uncentered embeddings, where a mean counts as one large singular value; here they are centered. 1 where
    all singular values are 0.
    """
    total = singular_values.sum()
    if total == 0:
        return 1.0
    share = singular_values / total + eps
    return float((-(share * share.log()).sum()).exp())


def alpha_req(singular_values: Tensor, first: int = 3, last: int = 100) -> float:
    """Exponent of the power law that the eigenvalues of the covariance follow (alpha-ReQ, arXiv:2202.05808).

    ``eigenvalue_i ~ i ** -alpha``; around 1 is what good representations have, large is collapsed. The line through the
    logarithms is fitted with weights 1 / i.

    Args:
        singular_values: (D,), largest first.
        first: rank of the first eigenvalue of the fit, from 1: the very largest follow no law.
        last: rank of the last one.

    Returns:
        alpha; infinity where less than two eigenvalues are left to fit, NaN where one is NaN.
    """
    eigenvalues = singular_values.double().square()
    if eigenvalues.isnan().any():
        return math.nan
    positive = int((eigenvalues > 0).sum())
    if min(last, positive) <= first:
        return math.inf
    rank = torch.arange(first, min(last, positive) + 1, dtype=torch.float64, device=eigenvalues.device)
    weight, x, y = 1 / rank, rank.log(), eigenvalues[first - 1 : first - 1 + len(rank)].log()
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


class ViewStatistics:
    """LiDAR (arXiv:2312.04000), streamed: the rank of the variation between images, relative to that between their views.

    The effective rank of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, where S_b is the covariance of the images' mean
    embeddings and S_w that of their views around it, plus ``delta``. It is a rank, not a ratio: where views differ as
    much as images, it does not become small.

    Args:
        dim: D.
        computed_in: as of :class:`FeatureStatistics`.
        delta: added to the diagonal of S_w.
    """

    def __init__(self, dim: int, computed_in: torch.dtype | None = None, delta: float = 1e-4) -> None:
        self.between, self.within = FeatureStatistics(dim, 1, computed_in), FeatureStatistics(dim)
        self.delta = delta

    def add(self, views: Tensor) -> None:
        """Add the embeddings of the views of some images: (views, images, D), at least two views."""
        self.between.rounding = max(self.between.rounding, rounding_of(views.dtype))
        views = views.detach().double()
        mean = views.mean(dim=0)
        self.between.add(mean)
        self.within.add(views - mean)

    def lidar(self) -> float:
        """LiDAR, from 1 to D; NaN where an embedding was not finite. Collective."""
        between, within = self.between.reduced(), self.within.reduced()
        if not between.scatter.isfinite().all():
            return math.nan
        images = max(1, between.samples)
        noise = within.scatter / max(1, within.samples)
        noise.diagonal().add_(self.delta)
        values, vectors = torch.linalg.eigh(noise)
        whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        spectrum = torch.linalg.eigvalsh(whiten @ (between.scatter / images) @ whiten).clamp(min=0)
        # Images that are all alike differ by rounding alone.
        mean_square = (between.mean.square().sum() + between.scatter.trace() / images) / between.dim
        least = between.rounding**2 * mean_square / values.max()
        return spectrum_rank(torch.where(spectrum > least, spectrum, 0.0))
