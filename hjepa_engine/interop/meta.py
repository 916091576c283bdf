"""The checkpoints of Meta's I-JEPA (arXiv:2301.08243): a dict that ``torch.save`` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hjepa_engine.interop.source import IMAGENET, Source, Weights, refuse, tensors_in

#: Modules of this project, and the keys of the file.
_PARTS = {"context_encoder": "encoder", "target_encoder": "target_encoder", "predictor": "predictor"}
#: Names of the predictor's tensors here, and there; that of a block's is followed by what both share.
_PREDICTOR = {
    "embed.": "predictor_embed.",
    "mask_token": "mask_token",
    "blocks.": "predictor_blocks.",
    "norm.": "predictor_norm.",
    "heads.0.": "predictor_proj.",
}
#: The positions of the predictor's tokens, which this project computes; they are compared.
PREDICTOR_POSITIONS = "predictor_pos_embed"


def is_meta(found: Any) -> bool:
    """Whether the contents of a file are laid out so."""
    return isinstance(found, Mapping) and any(isinstance(found.get(key), Mapping) for key in _PARTS.values())


def read_meta(path: Path, found: Mapping[str, Any]) -> Source:
    """The encoders and the predictor in a file's contents; ``opt``, ``epoch`` and others are left alone.

    Raises:
        CheckpointError: there is no encoder, or something in its place is no tensor.
    """
    given = {part: tensors_in(path, found[key], f"{key}.") for part, key in _PARTS.items() if key in found}
    parts: dict[str, Weights] = {
        part: {f"vit.{name}": value for name, value in weights.items()}
        for part, weights in given.items()
        if part != "predictor"
    }
    notes = []
    if not parts:
        raise refuse(path, f"encoder and target_encoder are missing, found {', '.join(map(str, found))}")
    for missing in {"context_encoder", "target_encoder"} - parts.keys():
        parts[missing] = next(iter(parts.values()))
        notes.append(f"{_PARTS[missing]} is missing: {missing} starts as the other encoder")
    if "predictor" in given:
        parts["predictor"] = {_ours(name): value for name, value in given["predictor"].items()}
    positions = parts["target_encoder"].get("vit.pos_embed")
    if positions is None:
        raise refuse(path, f"{_PARTS['target_encoder']}.pos_embed is missing")
    if positions.ndim != 3:
        raise refuse(
            path, f"{_PARTS['target_encoder']}.pos_embed must be (1, patches, width), got {tuple(positions.shape)}"
        )
    side = math.isqrt(positions.shape[1])
    if side * side != positions.shape[1]:
        raise refuse(
            path, f"{_PARTS['target_encoder']}.pos_embed must be of a square, got {positions.shape[1]} patches"
        )
    patches = parts["target_encoder"].get("vit.patch_embed.proj.weight")
    return Source(
        str(path),
        "Meta's I-JEPA checkpoint",
        parts,
        _file_name,
        grid=(side, side),
        stats=IMAGENET if patches is not None and patches.shape[1:2] == (len(IMAGENET[0]),) else None,
        notes=tuple(notes),
    )


def _ours(name: str) -> str:
    for ours, theirs in _PREDICTOR.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _file_name(part: str, name: str) -> str:
    if part != "predictor":
        return f"{_PARTS.get(part, part)}.{name.removeprefix('vit.')}"
    for ours, theirs in _PREDICTOR.items():
        if name.startswith(ours):
            return f"predictor.{theirs}{name.removeprefix(ours)}"
    return f"predictor.{name}"
