"""An encoder that is no run's: built from what was read alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hjepa_engine.interop.fit import Plan, plan_weights
from hjepa_engine.interop.source import HEADS, Source, Weights, refuse
from hjepa_engine.models import TargetEncoder

_MAX_MORE = 10**7  # positions of larger images


def arguments_of(source: Source, img_size: Sequence[int] | None = None, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of :class:`~hjepa_engine.models.TargetEncoder` for the encoder in ``source``.

    Args:
        source: what was read.
        img_size: H and W in pixels; its own by default.
        num_heads: attention heads, where the source does not say.

    Raises:
        CheckpointError: it does not say what it must.
    """
    if "target_encoder" not in source.parts:
        raise refuse(source.where, f"has no target_encoder, it has {', '.join(source.parts)}")
    weights = source.parts["target_encoder"]
    arguments = dict(source.arguments) if source.arguments is not None else _from_shapes(source, weights, num_heads)
    arguments.pop("drop_path_rate", None)  # of training
    if img_size is not None:
        arguments["img_size"] = list(img_size)
    return arguments


def _from_shapes(source: Source, weights: Weights, num_heads: int | None) -> dict[str, Any]:
    needed = ("vit.patch_embed.proj.weight", "vit.pos_embed", "vit.blocks.0.mlp.fc1.weight")
    for name in needed:
        if name not in weights:
            raise refuse(source.where, f"{source.file_name('target_encoder', name)} is missing")
    patches, positions, hidden = (weights[name] for name in needed)
    if patches.ndim != 4 or positions.ndim != 3 or hidden.ndim != 2:
        raise refuse(source.where, "is not a plain vision transformer: patches, positions or MLPs have other shapes")
    width, channels, down, across = patches.shape
    heads = source.num_heads or num_heads or HEADS.get(width)
    if heads is None:
        raise refuse(source.where, "does not say how many attention heads its encoder has: give --model.num_heads")
    if width % heads:
        raise refuse(source.where, f"model.num_heads must divide the encoder's width ({width}), got {heads}")
    side = int(positions.shape[1] ** 0.5)
    grid = source.grid or (side, side)
    arguments: dict[str, Any] = {
        "name": "vit_base_patch16_224",
        "img_size": [grid[0] * down, grid[1] * across],
        "in_chans": channels,
        "pos_embed": "learned",  # a table that is loaded as it is
        "patch_size": down if down == across else [down, across],
        "embed_dim": width,
        "depth": len({name.split(".")[2] for name in weights if name.startswith("vit.blocks.")}),
        "num_heads": heads,
        "mlp_ratio": (hidden.shape[0] + 0.5) / width,  # timm rounds down
        "qkv_bias": "vit.blocks.0.attn.qkv.bias" in weights,
    }
    if source.norm_eps not in (None, 1e-6):
        arguments["norm_eps"] = source.norm_eps
    if "vit.blocks.0.ls1.gamma" in weights:
        arguments["init_values"] = 1.0
    return arguments


def build_encoder(source: Source, arguments: dict[str, Any]) -> TargetEncoder:
    """The encoder of :func:`plan_encoder`, with its weights."""
    encoder, plan = plan_encoder(source, arguments)
    plan.apply()
    return encoder


def plan_encoder(source: Source, arguments: dict[str, Any]) -> tuple[TargetEncoder, Plan]:
    """The encoder in ``source``, frozen and in eval mode: normalized images (B, C, H, W) to patch tokens (B, N, D).

    Its weights are still random; the plan loads them.

    Args:
        source: what was read.
        arguments: see :func:`arguments_of`.

    Raises:
        CheckpointError: the weights are not those of a plain vision transformer.
    """
    given = sum(tensor.numel() for tensor in source.parts["target_encoder"].values())
    try:
        with torch.device("meta"):  # arguments in a file may ask for any size: look before memory is allocated
            plain = TargetEncoder(**{**arguments, "pos_embed": "learned"})
        if (asked := sum(tensor.numel() for tensor in plain.state_dict().values())) > 4 * given + _MAX_MORE:
            raise refuse(source.where, f"holds {given:,} weights, the encoder that it describes has {asked:,}")
        encoder = TargetEncoder(**arguments)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise refuse(source.where, f"cannot be built: {error}") from error
    if source.is_own:  # what fits is not enough here
        source = replace(source, is_own=False, norm_eps=None)
    plan = plan_weights(nn.ModuleDict({"target_encoder": encoder}), source, ["target_encoder"])
    return encoder.requires_grad_(False).eval(), plan
