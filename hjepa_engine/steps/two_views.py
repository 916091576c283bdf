"""The step of two views: what masks do not teach, agreement between random crops and colors of one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hjepa_engine.data.views import random_views
from hjepa_engine.losses import sigreg
from hjepa_engine.types import Batch, Outputs
from hjepa_engine.utils.distributed import gather_samples


def two_view_step(
    modules: nn.ModuleDict,
    batch: Batch,
    num_views: int = 2,
    sigreg_weight: float = 0.05,
    scale: Sequence[float] = (0.3, 1.0),
    color: float = 0.0,
) -> Outputs:
    """Embeddings of views agree, and are normally distributed (LeJEPA, arXiv:2511.08544).

    No target encoder, no predictor, no stop-gradient: SIGReg alone keeps the embeddings from collapsing. Departure from the
    paper: views of one size instead of several.

    Args:
        modules: ``encoder`` and ``projector``, as :func:`~hjepa_engine.models.two_views.build_modules` makes them.
        batch: ``images`` (B, C, H, W), normalized.
        num_views: views of each image.
        sigreg_weight: from 0 to 1; agreement has the rest.
        scale: smallest and largest area of a view's crop, as a share of the image.
        color: strength of random colors, see :func:`~hjepa_engine.data.views.random_views`.

    Returns:
        ``loss`` (); ``distance`` (), the mean squared distance of the embeddings from the mean of their image's views;
        ``sigreg`` (); ``target_tokens`` (B, N, D), the patch tokens of the first view.
    """
    images = batch["images"]
    seed = int(torch.randint(2**62, ()))  # of the generator that the run seeds at every step
    low, high = scale
    views = random_views(images, num_views, seed, scale=(low, high), color=color)
    tokens = modules["encoder"](torch.cat(views))
    embeddings = modules["projector"](tokens.mean(dim=1)).float().unflatten(0, (num_views, len(images)))
    distance = (embeddings - embeddings.mean(dim=0)).square().mean()
    everywhere = gather_samples(embeddings.transpose(0, 1))  # SIGReg is about the whole batch, of all processes
    isotropy = torch.stack([sigreg(view) for view in everywhere.unbind(1)]).mean()
    loss = (1 - sigreg_weight) * distance + sigreg_weight * isotropy
    return {"loss": loss, "distance": distance, "sigreg": isotropy, "target_tokens": tokens[: len(images)]}
