"""The pretraining step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from hjepa_engine.levels import pool_target
from hjepa_engine.losses import REGULARIZERS, smooth_l1
from hjepa_engine.types import Batch, LossFunction, Outputs, unwrap
from hjepa_engine.utils.distributed import gather_samples


def hjepa_step(
    modules: nn.ModuleDict,
    batch: Batch,
    loss_fn: LossFunction = smooth_l1,
    regularizers: Mapping[str, float] | None = None,
) -> Outputs:
    """Predict the target encoder's features of the masked blocks, at every level, from the visible patches.

    With one level of pool 1 and depth 1.0 this is I-JEPA (arXiv:2301.08243). Targets are pooled, then layer-normed over
    D without affine parameters, so shrinking the features does not lower the loss.

    Args:
        modules: ``context_encoder``, ``target_encoder`` and ``predictor`` (which knows the levels).
        batch: ``images`` (B, C, H, W), normalized; ``masks``, a :class:`~hjepa_engine.masking.Masks`.
        loss_fn: mean distance between predictions and targets, both (..., D).
        regularizers: weight of each of :data:`~hjepa_engine.losses.REGULARIZERS`, computed on the mean context token of
            each image (B, D), over all processes: on single tokens, differences between positions would count as
            variance.

    Returns:
        ``loss`` (), ``loss_level_{l}`` () and, for each regularizer, ``loss_{regularizer}`` (); ``context_tokens`` (B, K, D)
        and their patches ``context_idx`` (B, K); ``target_tokens`` (B, N, D); ``predictions`` and ``targets``, one
        (B, M, cells, D) per level, with the pixels of a patch for D where its depth is 0. Where all levels are pixels, the
        target encoder does not run, and there are no ``target_tokens``.
    """
    images, masks = batch["images"], batch["masks"]
    levels = unwrap(modules["predictor"]).levels
    depths = {level.depth for level in levels}
    depths |= {1.0} if any(depths) else set()
    with torch.no_grad():
        found = unwrap(modules["target_encoder"]).features(images, depths=sorted(depths))
        features = dict(zip(sorted(depths), found, strict=True))
        pooled = [pool_target(features[level.depth].float(), masks, level) for level in levels]
        targets = [F.layer_norm(target, target.shape[-1:]) for target in pooled]
    context = modules["context_encoder"](images, masks.context_idx)
    predictions = modules["predictor"](context, masks)
    outputs: Outputs = {
        f"loss_level_{number}": loss_fn(prediction.float(), target)
        for number, (prediction, target) in enumerate(zip(predictions, targets, strict=True))
    }
    loss = torch.stack([level.weight * outputs[f"loss_level_{number}"] for number, level in enumerate(levels)]).sum()
    summary = context.mean(dim=1).float()
    if regularizers:  # what they measure, they measure of the whole batch
        summary = gather_samples(summary[:0] if batch.get("is_filler") else summary)
    for name, weight in (regularizers or {}).items():
        outputs[f"loss_{name}"] = REGULARIZERS[name](summary)
        loss = loss + weight * outputs[f"loss_{name}"]
    return {
        **outputs,
        "loss": loss,
        "context_tokens": context,
        "context_idx": masks.context_idx,
        **({"target_tokens": features[1.0]} if 1.0 in features else {}),
        "predictions": predictions,
        "targets": targets,
    }
