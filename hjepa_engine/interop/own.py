"""What this project wrote: a run folder, a checkpoint, an exported encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hjepa_engine.checkpoint.folder import list_checkpoints, load_one
from hjepa_engine.checkpoint.state import load_on_all_ranks, modules_in
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.config.loading import config_from
from hjepa_engine.errors import ConfigError
from hjepa_engine.export import DESCRIPTION, WEIGHTS, check_description
from hjepa_engine.interop.source import Source, read_json, read_safetensors, refuse
from hjepa_engine.models import TargetEncoder, encoder_arguments

Stats = tuple[tuple[float, ...], tuple[float, ...]]


def read_own(path: Path) -> Source:
    """The weights in a checkpoint, a run folder (its newest checkpoint), or an exported encoder, for both encoders.

    Collective where it is a checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    candidates = (path, path / WEIGHTS, path / "encoder" / WEIGHTS)
    exported = next((file for file in candidates if file.is_file()), None)
    if exported is None or list_checkpoints(path / "checkpoints"):
        found = load_on_all_ranks(lambda: load_one(path))
        assert found is not None
        return _of_checkpoint(found[0], modules_in(found[1]))
    weights = read_safetensors(exported)
    description: dict[str, Any] = {}
    if (exported.parent / DESCRIPTION).is_file():
        description = read_json(exported.parent / DESCRIPTION)
    arguments = description.get("encoder")
    try:
        check_description(description)
    except ValueError as error:
        raise refuse(exported.parent, str(error)) from error
    if not description and not any(name.startswith("vit.") for name in weights):
        raise refuse(exported.parent / DESCRIPTION, "is missing: it says whose weights lie beside it")
    arguments = arguments if isinstance(arguments, dict) else None
    num_heads, norm_eps = _not_in_shapes(arguments)
    return Source(
        str(exported),
        "an export of this project",
        {"context_encoder": weights, "target_encoder": weights},
        is_own=True,
        num_heads=num_heads,
        norm_eps=norm_eps,
        stats=_stats(description),
        arguments=arguments,
    )


def _of_checkpoint(found: Checkpoint, parts: dict[str, dict[str, Tensor]]) -> Source:
    arguments = None
    try:
        config = config_from(found.config)
        if config.model.class_path is None:
            arguments = encoder_arguments(config)
    except ConfigError:
        pass  # of another version: weights alone
    num_heads, norm_eps = _not_in_shapes(arguments)
    return Source(
        str(found.path),
        "a checkpoint of this project",
        parts,
        is_own=True,
        num_heads=num_heads,
        norm_eps=norm_eps,
        stats=_stats(found.data),
        arguments=arguments,
    )


def _not_in_shapes(arguments: dict[str, Any] | None) -> tuple[int | None, float | None]:
    """Attention heads, and what the layer norms add, of the encoder that is built with ``arguments``; None: not known."""
    if arguments is None:
        return None, None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # one block, no memory
            plain: Any = TargetEncoder(**{**arguments, "pos_embed": "learned", "depth": 1, "drop_path_rate": 0.0})
    except Exception:  # arguments in a file may be anything; whoever builds the encoder says what is wrong
        return None, None
    block = plain.vit.blocks[0]
    return block.attn.num_heads, block.norm1.eps


def _stats(described: Any) -> Stats | None:
    try:
        mean, std = described["stats"].values() if isinstance(described["stats"], dict) else described["stats"]
        return tuple(map(float, mean)), tuple(map(float, std))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
