"""The encoder of a run, written for other projects: a folder that is whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import nn

from hjepa_engine.checkpoint.folder import find_checkpoint
from hjepa_engine.config.loading import load_config
from hjepa_engine.errors import CheckpointError, ConfigError, ExportError
from hjepa_engine.export import DESCRIPTION, load_encoder, save_encoder
from hjepa_engine.interop.card import CARD, Facts, Format, figures_in, write_card
from hjepa_engine.interop.graphs import check_onnx, write_onnx, write_program
from hjepa_engine.interop.huggingface import write_huggingface
from hjepa_engine.interop.timm import write_timm
from hjepa_engine.models import ContextEncoder, encoder_name
from hjepa_engine.utils.files import remove, sync_folder

FORMATS: tuple[Format, ...] = get_args(Format)


class Written(NamedTuple):
    """What :func:`export_encoder` wrote."""

    path: Path
    size: int
    """Bytes of all files."""
    weights: str
    """Where they are from, in words."""


def _write_own(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    save_encoder(encoder, folder, {"encoder": encoder.arguments, "stats": stats})


_WRITERS: dict[Format, Callable[[ContextEncoder, Path, tuple[Any, Any]], None]] = {
    "safetensors": _write_own,
    "timm": write_timm,
    "huggingface": write_huggingface,
    "onnx": write_onnx,
    "torch_export": write_program,
}


def export_encoder(
    run: Path, kind: Format, output: Path | None = None, *, checkpoint: str | None = None, module: str | None = None
) -> Written:
    """Write an encoder of a run with its configuration, its normalization and a model card.

    Args:
        run: the run folder; the run may be going on.
        kind: one of :data:`FORMATS`.
        output: a folder that does not exist or is empty; ``export/<kind>`` in the run folder by default.
        checkpoint: ``latest``, ``best`` or a name; by default the encoder that the finished run exported, or the newest one.
        module: name of the encoder; by default the one that the run measures, the target encoder.

    Raises:
        ConfigError: ``output`` holds something, or a library is missing.
        CheckpointError: there is no such checkpoint.
        ExportError: there is no such encoder, the format has no place for it, or it cannot be written.
    """
    if kind not in _WRITERS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {kind!r}")
    folder = output or run / "export" / kind
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--output {folder} holds something already: give another one, or remove it")
    if kind == "onnx":
        check_onnx()
    encoder, facts, stats, weights = _read(run, checkpoint, module)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if os.path.lexists(temporary):  # of an export that was killed
            remove(temporary)
        temporary.mkdir(parents=True)
        _WRITERS[kind](encoder, temporary, stats)
        write_card(temporary, folder.name, kind, encoder, facts, stats)
        for path in temporary.iterdir():
            shutil.copymode(temporary / CARD, path)  # safetensors writes files for their owner alone
        size = sum(path.stat().st_size for path in temporary.iterdir())
        sync_folder(temporary)
        os.replace(temporary, folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, (OSError, SafetensorError)):
            raise ExportError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        raise
    return Written(folder, size, weights)


def _read(run: Path, checkpoint: str | None, module: str | None) -> tuple[ContextEncoder, Facts, tuple[Any, Any], str]:
    saved = run / "config.yaml"
    if not saved.is_file():
        raise ExportError(f"{run} is no run folder: {saved.name} is missing")
    config = load_config(saved)
    if config.model.class_path is not None:
        raise ExportError(
            f"{run} trained a model of its own, {config.model.class_path}: only H-JEPA's encoders are exported"
        )
    has_export = (run / "encoder" / DESCRIPTION).is_file()
    if checkpoint is None and (module is not None or not has_export):
        checkpoint = "latest"
    try:
        # What the finished run exported is of its newest checkpoint, and of no other.
        found = find_checkpoint(run, checkpoint or "latest", allow_damaged=checkpoint is not None)
    except CheckpointError:
        if checkpoint is not None:
            raise
        found = None
    known = ("context_encoder", "target_encoder")
    if module is not None and module not in known:
        raise ConfigError(f"--module must be an encoder, {' or '.join(known)}, got {module!r}")
    taken = None if checkpoint is None or found is None else found.record.name
    encoder: nn.Module = load_encoder(run, taken, module=module)
    assert isinstance(encoder, ContextEncoder)
    data, stats = _json(run / "data.json"), None
    if "stats" in data:
        stats = (tuple(data["stats"]["mean"]), tuple(data["stats"]["std"]))
    elif isinstance(own := _json(run / "encoder" / DESCRIPTION).get("stats"), list):
        stats = (tuple(own[0]), tuple(own[1]))
    if stats is None:
        raise ExportError(f"{run} does not say how its images are normalized: data.json is missing")
    name = module or encoder_name(config, known) or known[1]
    # A checkpoint may hold the very weights that the finished run exported and measured.
    is_final = taken is None or (has_export and _same_weights(encoder, run))
    figures = (
        {} if module not in (None, known[1]) else figures_in(run, taken) or (figures_in(run, None) if is_final else {})
    )
    weights = "the exported encoder" if taken is None else f"{name} of checkpoint {taken}"
    return encoder, Facts(config, name, found, data, figures), stats, weights


def _same_weights(encoder: nn.Module, run: Path) -> bool:
    """Whether the run exported these weights."""
    try:
        final = load_encoder(run).state_dict()
    except ExportError:
        return False
    own = encoder.state_dict()
    return own.keys() == final.keys() and all(torch.equal(tensor, final[name]) for name, tensor in own.items())


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} is damaged: {error}") from error
