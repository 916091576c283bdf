"""Modules of :func:`~hjepa_engine.steps.two_views.two_view_step`."""

from __future__ import annotations

from torch import nn

from hjepa_engine.config.schema import Config
from hjepa_engine.models import ContextEncoder, encoder_arguments


def build_modules(config: Config, dim: int = 16) -> nn.ModuleDict:
    """``encoder`` as ``model`` in the configuration describes it, and a ``projector`` that is thrown away afterwards.

    Args:
        config: of the run.
        dim: width of the embeddings.
    """
    encoder = ContextEncoder(**encoder_arguments(config))
    width = 4 * encoder.embed_dim
    projector = nn.Sequential(nn.Linear(encoder.embed_dim, width), nn.GELU(), nn.Linear(width, dim))
    return nn.ModuleDict({"encoder": encoder, "projector": projector})
