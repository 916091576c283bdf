"""Encoders and predictor, and building them from a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hjepa_engine.config.schema import Config, resolve_levels
from hjepa_engine.errors import ConfigError
from hjepa_engine.models.encoder import ContextEncoder, TargetEncoder
from hjepa_engine.models.predictor import Predictor
from hjepa_engine.utils.rng import derive_seed


def encoder_arguments(config: Config) -> dict[str, Any]:
    """Arguments of :class:`ContextEncoder` and :class:`TargetEncoder`, from ``config``."""
    model = config.model
    overrides = {
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "init_values": model.layer_scale,
        "drop_path_rate": model.drop_path or None,
        "norm_eps": model.norm_eps,
    }
    return {
        "name": model.encoder_type,
        "img_size": config.data.image_size,
        "in_chans": config.data.channels,
        "pos_embed": model.pos_embed,
        "stem": model.stem,
        "init": model.init,
        "patch_init": model.patch_init,
        "activation_checkpointing": model.activation_checkpointing,
        **{name: value for name, value in overrides.items() if value is not None},
    }


def encoder_name(config: Config, modules: Iterable[str]) -> str | None:
    """Name of the module that is probed, monitored and exported; None if there is no encoder.

    Args:
        config: configuration of the run; ``model.encoder`` overrides the default name.
        modules: names of all modules.

    Raises:
        ConfigError: ``model.encoder`` is not one of them.
    """
    known, name = list(modules), config.model.encoder
    if name is None:
        return next((name for name in ("target_encoder", "encoder", "context_encoder") if name in known), None)
    if name not in known:
        raise ConfigError(f"model.encoder must be one of the modules {', '.join(known)}, got {name!r}")
    return name


def build_modules(config: Config) -> nn.ModuleDict:
    """Build ``context_encoder``, ``target_encoder`` (its exact copy) and ``predictor``, initialized from ``config.seed``.

    Raises:
        ConfigError: the encoder is unknown, or its sizes are incompatible.
    """
    predictor = config.model.predictor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        try:
            context_encoder = ContextEncoder(**encoder_arguments(config))
        except (ValueError, AssertionError, TypeError, RuntimeError) as error:
            raise ConfigError(_misfit(config, " ".join(str(error).split()))) from error
        return nn.ModuleDict(
            {
                "context_encoder": context_encoder,
                "target_encoder": TargetEncoder.copy_of(context_encoder),
                "predictor": Predictor(
                    grid=context_encoder.grid,
                    embed_dim=context_encoder.embed_dim,
                    levels=resolve_levels(config),
                    width=predictor.width,
                    depth=predictor.depth,
                    num_heads=predictor.num_heads,
                    mlp_ratio=predictor.mlp_ratio,
                    level_depth=predictor.level_depth,
                    targets=predictor.targets,
                    num_pixels=config.data.channels * math.prod(context_encoder.vit.patch_embed.patch_size),
                    init=predictor.init,
                    activation_checkpointing=config.model.activation_checkpointing,
                ),
            }
        )


def _misfit(config: Config, reason: str) -> str:
    """What is wrong with the encoder, in terms of the configuration: its own sizes are known only once it is built."""
    model = config.model
    if "divisible by num_heads" in reason:
        width = "its own" if model.embed_dim is None else model.embed_dim
        heads = "its own" if model.num_heads is None else model.num_heads
        return f"model.num_heads must divide model.embed_dim ({width}) of {model.encoder_type}, got {heads}"
    if reason.startswith("img_size must"):
        return f"{reason.replace('img_size', 'data.image_size')} (model.encoder_type {model.encoder_type})"
    return f"model.encoder_type {model.encoder_type}: {reason}"


__all__ = ["ContextEncoder", "Predictor", "TargetEncoder", "build_modules", "encoder_arguments", "encoder_name"]
