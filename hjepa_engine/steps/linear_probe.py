"""Steps of the linear probe: compute frozen features, train a linear head on them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from hjepa_engine.levels import as_tokens
from hjepa_engine.types import Batch, Outputs


def feature_step(modules: nn.ModuleDict, batch: Batch, features: Literal["mean", "concat"] = "mean") -> Outputs:
    """Compute the features that a probe is trained on.

    Args:
        modules: ``encoder``, from images to tokens (B, N, D) or features (B, D); without one, features are the pixels.
        batch: ``images`` (B, C, H, W), normalized.
        features: ``mean`` averages the patch tokens, ``concat`` concatenates them.

    Returns:
        ``features``: (B, D) for ``mean``, (B, N * D) for ``concat``, (B, C * H * W) for pixels.
    """
    if "encoder" not in modules:
        return {"features": batch["images"].flatten(1)}
    with torch.no_grad():
        tokens = as_tokens(modules["encoder"](batch["images"]))
    return {"features": (tokens.mean(dim=1) if features == "mean" else tokens.flatten(1)).float()}


def linear_probe_step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
    """Classify frozen features with a linear head.

    Args:
        modules: ``head``, from (B, F) to (B, classes).
        batch: ``features`` (B, F) and ``labels`` (B,).

    Returns:
        ``loss`` (), the cross-entropy in nats; ``accuracy`` (), from 0 to 1; ``logits`` (B, classes).
    """
    logits = modules["head"](batch["features"])
    return {
        "loss": F.cross_entropy(logits, batch["labels"]),
        "accuracy": (logits.argmax(dim=1) == batch["labels"]).float().mean(),
        "logits": logits,
    }
