"""Training with labels, to know what the same encoder reaches with them in the same time.

The variant ``labels`` of recipes/ablations/cifar10.yaml names ``supervised_step`` and ``build_modules``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from hjepa_engine import Config
from hjepa_engine.errors import DataError
from hjepa_engine.models import ContextEncoder, encoder_arguments
from hjepa_engine.types import Batch, Outputs


def build_modules(config: Config, num_classes: int = 10) -> nn.ModuleDict:
    """``encoder`` as ``model`` in the configuration describes it, and a linear ``head`` on its mean token."""
    encoder = ContextEncoder(**encoder_arguments(config))
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.embed_dim, num_classes)})


def supervised_step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
    """Classify the mean token.

    Args:
        modules: ``encoder`` and ``head``, as :func:`build_modules` makes them.
        batch: ``images`` (B, C, H, W), normalized, and ``labels`` (B,), all from 0 to ``num_classes`` - 1.

    Returns:
        ``loss`` (), the cross-entropy in nats; ``accuracy`` (), from 0 to 1; ``target_tokens`` (B, N, D).

    Raises:
        DataError: an image has no label (-1), or one of a class beyond ``num_classes``.
    """
    tokens, labels = modules["encoder"](batch["images"]), batch["labels"]
    logits = modules["head"](tokens.mean(dim=1)).float()
    # A GPU is waited for here, in every step: a baseline may be a little slower.
    if wrong := [label for label in labels.tolist() if not 0 <= label < logits.shape[1]]:
        last = logits.shape[1] - 1
        raise DataError(f"labels must be from 0 to {last} (model.init_args has num_classes), got {wrong[0]}")
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy, "target_tokens": tokens}
