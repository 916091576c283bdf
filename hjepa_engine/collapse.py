"""How much features still say: streamed covariance, and what is read off its spectrum.

Everything here is of *centred* features: a mean says nothing of the image. Where features come as a map, each place of
it has a mean of its own, since features that differ between places and not between images are collapsed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from torch import Tensor

#: Rounding of a network's features, in units of their last place; less than this is no variation.
_ROUNDING = 16


class FeatureStatistics:
    """Mean and covariance of features (samples, D), streamed in float64: D x D numbers are kept, never the samples.

    Batches are merged by the update of Chan, Golub and LeVeque (1983), which a large mean does not make inexact.

    Args:
        dim: D.
        places: places of a feature map, each with a mean of its own; 1: one mean for all.
        device: where the sums are kept.

    Raises:
        ValueError: ``dim`` or ``places`` is not positive.
    """

    def __init__(self, dim: int, places: int = 1, device: torch.device | str = "cpu") -> None:
        if dim < 1 or places < 1:
            raise ValueError(f"dim and places must be positive, got {dim} and {places}")
        self.dim, self.places = dim, places
        zeros = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros(places, **zeros)  # type: ignore[call-overload]
        self.mean = torch.zeros(places, dim, **zeros)  # type: ignore[call-overload]
        self.scatter = torch.zeros(dim, dim, **zeros)  # type: ignore[call-overload]
        self.precision = torch.finfo(torch.float64).eps

    def add(self, features: Tensor, place_idx: Tensor | None = None) -> None:
        """Take features in.

        Args:
            features: (..., D); without ``place_idx`` the dimension before D runs over the places, if there are several.
            place_idx: the place of each feature (...).
        """
        self.precision = max(self.precision, torch.finfo(features.dtype).eps)
        flat = features.detach().reshape(-1, self.dim).to(self.mean.device, torch.float64)
        if not len(flat):
            return
        if place_idx is None:
            place_idx = torch.arange(self.places, device=flat.device).repeat(len(flat) // self.places)
        place_idx = place_idx.reshape(-1).to(flat.device)
        count = torch.bincount(place_idx, minlength=self.places).double()
        mean = torch.zeros_like(self.mean).index_add_(0, place_idx, flat) / count.clamp(min=1)[:, None]
        centred = flat - mean[place_idx]
        total = self.count + count
        shift = mean - self.mean
        weight = self.count * count / total.clamp(min=1)
        self.scatter += centred.T @ centred + shift.T @ (weight[:, None] * shift)
        self.mean += shift * (count / total.clamp(min=1))[:, None]
        self.count = total

    def reduced(self) -> FeatureStatistics:
        """The statistics of all ranks' samples together. Collective."""
        if idist.get_world_size() == 1:
            return self
        whole = FeatureStatistics(self.dim, self.places, self.mean.device)
        whole.count = _sum_of_ranks(self.count)
        whole.mean = _sum_of_ranks(self.mean * self.count[:, None]) / whole.count.clamp(min=1)[:, None]
        shift = self.mean - whole.mean
        whole.scatter = _sum_of_ranks(self.scatter + shift.T @ (self.count[:, None] * shift))
        whole.precision = float(idist.all_reduce(self.precision, op="MAX"))
        return whole

    @property
    def samples(self) -> int:
        """Features taken in."""
        return int(self.count.sum())

    @property
    def freedom(self) -> int:
        """Samples less the means that were taken from them: the rank cannot be larger."""
        return self.samples - int((self.count > 0).sum())

    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D), float64; zero of fewer than two samples."""
        return self.scatter / max(1, self.freedom)

    def singular_values(self) -> Tensor:
        """Singular values (D,) of the centred samples divided by the square root of their number, largest first.

        What is below the rounding of the features (the largest ``eps`` among their types) is 0.
        """
        values = torch.linalg.eigvalsh(self.scatter).flip(0) / max(1, self.samples)
        square = values.clamp(min=0).sum() + (self.count[:, None] * self.mean.square()).sum() / max(1, self.samples)
        rounding = (_ROUNDING * self.precision) ** 2 * square / self.dim
        noise = values[0].clamp(min=0) * self.dim * torch.finfo(torch.float64).eps
        return torch.where(values > torch.maximum(rounding, noise), values, 0.0).sqrt()

    def summary(self) -> dict[str, float]:
        """``std``, ``norm``, ``rank``, ``rank_share`` and ``rank_me``, each smallest for features that say nothing.

        ``std``: standard deviation of a dimension, averaged over D. ``norm``: root of the mean squared L2 norm of the
        centred features. ``rank``: effective rank, from 1 to D (see :func:`spectrum_rank`). ``rank_share``: what of the
        way from 1 to the largest possible rank it is, from 0 to 1. ``rank_me``: as :func:`rank_me`.
        """
        values = self.singular_values()
        covariance, most = self.covariance(), min(self.dim, max(1, self.freedom))
        rank = spectrum_rank(values)
        return {
            "std": float(covariance.diagonal().clamp(min=0).sqrt().mean()),
            "norm": float(values.square().sum().sqrt()),
            "rank": rank,
            "rank_share": (rank - 1) / (most - 1) if most > 1 else 0.0,
            "rank_me": rank_me(values),
        }

    def state_dict(self) -> dict[str, Any]:
        """All sums of this rank."""
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter, "precision": self.precision}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name in ("count", "mean", "scatter"):
            setattr(self, name, state_dict[name].to(self.mean.device, copy=True))
        self.precision = state_dict["precision"]


def _sum_of_ranks(value: Tensor) -> Tensor:
    return idist.all_reduce(value.clone())  # type: ignore[return-value]


def spectrum_rank(singular_values: Tensor) -> float:
    """Effective rank of a spectrum (D,): the exponential of the entropy of its shares (Roy and Vetterli, EUSIPCO 2007).

    >>> spectrum_rank(torch.tensor([1.0, 1.0, 0.0])), spectrum_rank(torch.zeros(3))
    (2.0, 1.0)
    """
    total = singular_values.sum()
    share = singular_values / torch.where(total > 0, total, 1.0)
    return float(torch.special.entr(share).sum().exp())


def rank_me(singular_values: Tensor, eps: float = 1e-7) -> float:
    """RankMe (arXiv:2210.02885) of a spectrum (D,): as :func:`spectrum_rank`, with ``eps`` added to every share.

    The paper takes uncentred embeddings, where a mean counts as one large singular value; here they are centred.
    """
    total = singular_values.sum()
    share = singular_values / torch.where(total > 0, total, 1.0) + eps
    return float((-(share * share.log()).sum()).exp()) if total > 0 else 1.0


def alpha_req(singular_values: Tensor, first: int = 3, last: int = 100) -> float:
    """Exponent of the power law that the eigenvalues of the covariance follow (alpha-ReQ, arXiv:2202.05808).

    ``eigenvalue_i ~ i ** -alpha``; around 1 is what good representations have, large is collapsed. The line through the
    logarithms is fitted with weights 1 / i.

    Args:
        singular_values: (D,), largest first.
        first: rank of the first eigenvalue of the fit, from 1: the very largest follow no law.
        last: rank of the last one.

    Returns:
        alpha; infinity where less than two eigenvalues are left to fit.
    """
    eigenvalues = singular_values.double().square()
    positive = int((eigenvalues > 0).sum())
    rank = torch.arange(first, min(last, positive) + 1, dtype=torch.float64, device=eigenvalues.device)
    if len(rank) < 2:
        return float("inf")
    weight, x, y = 1 / rank, rank.log(), eigenvalues[first - 1 : first - 1 + len(rank)].log()
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


class ViewStatistics:
    """LiDAR (arXiv:2312.04000), streamed: the rank of what tells images apart, relative to how views of one differ.

    The effective rank of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, where S_b is the covariance of the images' mean
    embeddings and S_w that of their views around it, plus ``delta``.

    Args:
        dim: D.
        device: where the sums are kept.
        delta: added to the diagonal of S_w.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu", delta: float = 1e-4) -> None:
        self.between, self.within = FeatureStatistics(dim, device=device), FeatureStatistics(dim, device=device)
        self.delta = delta

    def add(self, views: Tensor) -> None:
        """Take the embeddings of the views of some images in: (views, images, D), at least two views."""
        views = views.detach().double()
        mean = views.mean(dim=0)
        self.between.add(mean)
        self.within.add(views - mean)

    def lidar(self) -> float:
        """LiDAR, from 1 to D. Collective."""
        between, within = self.between.reduced(), self.within.reduced()
        images, dim = max(1, between.samples), between.dim
        noise = within.scatter / max(1, within.samples)
        values, vectors = torch.linalg.eigh(
            noise + self.delta * torch.eye(dim, dtype=torch.float64, device=noise.device)
        )
        whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        spectrum = torch.linalg.eigvalsh(whiten @ (between.scatter / images) @ whiten).clamp(min=0)
        # Images that are all alike differ by rounding alone.
        square = between.mean.square().sum() + between.scatter.trace() / images
        rounding = (_ROUNDING * torch.finfo(torch.float32).eps) ** 2 * square / dim / values.max()
        return spectrum_rank(torch.where(spectrum > rounding, spectrum, 0.0))
