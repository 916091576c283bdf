"""What was read from a file: weights under this project's names, and what else it says of the encoder."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hjepa_engine.errors import CheckpointError

Weights = dict[str, Tensor]
#: Mean and standard deviation of the channels of ImageNet, which most encoders were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Attention heads of the usual encoders by their width, where a file does not say.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
ACCEPTED = (
    "accepted are a run, checkpoint or export of this project, Meta's I-JEPA checkpoint (.pth.tar with encoder, "
    "target_encoder, predictor), a folder of Hugging Face's IJepaModel, a file of a plain timm vision transformer, timm/NAME"
)
_MAX_JSON_BYTES = 2**24


@dataclass(frozen=True)
class Source:
    """Weights that were read, by module of this project and then by this project's names of tensors."""

    where: str
    """The file or folder, for messages."""
    layout: str
    """Whose layout it is, in words."""
    parts: Mapping[str, Weights]
    """``context_encoder``, ``target_encoder`` and perhaps ``predictor``, or the modules of a run."""
    file_name: Callable[[str, str], str] = field(default=lambda part, name: f"{part}.{name}")
    """How the file calls a tensor of a part."""
    is_own: bool = False
    """Whether this project wrote it: what fits is taken then; of others, an encoder has to fit as a whole."""
    grid: tuple[int, int] | None = None
    """Patches of the position embeddings, down and across; None: the file does not say."""
    num_heads: int | None = None
    """Attention heads of the encoder; None: the file does not say."""
    norm_eps: float | None = 1e-6
    """Of its layer norms; None: not known."""
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of the channels of its images; None: the file does not say."""
    arguments: Mapping[str, Any] | None = None
    """Arguments that build the encoder; None: they follow from the shapes."""
    notes: tuple[str, ...] = ()
    """What was left out, in words."""


def refuse(where: object, what: str) -> CheckpointError:
    """The error that names a file and what is wrong with it, in one line."""
    return CheckpointError(f"{where}: {' '.join(what.split())}")


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("it is larger than 16 MB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(path, f"cannot be read: {first_line(error)}") from error
    return found


def read_safetensors(path: Path) -> Weights:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged, or none.
    """
    if not path.is_file():
        raise refuse(path, "there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError, LookupError, MemoryError) as error:
        raise refuse(path, f"holds no weights: {first_line(error)}") from error


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain values. Code in the file is refused, never run.

    Raises:
        CheckpointError: it holds code, is damaged, or is none.
    """
    if kind := _program_in(path):
        raise refuse(path, f"is a program of {kind}, not weights; {ACCEPTED}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on reading files that are refused here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise refuse(path, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # torch raises all kinds of errors on invalid contents
        if code := re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class)\W+([\w.]+)", str(error)):
            raise refuse(path, f"holds code, {code[1] or code[2]}, which is not run: weights alone are read") from error
        # torch speaks of its own workings here, and of loading without weights_only.
        raise refuse(path, f"is no file of torch.save, or is damaged; {ACCEPTED}") from error


def _program_in(path: Path) -> str | None:
    """What wrote a file that holds a program; None: it holds none."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {Path(name).name for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    if files & {"archive_format", "serialized_exported_program.json"}:
        return "torch.export"
    return "torch.jit" if "constants.pkl" in files else None


def tensors_in(where: object, found: Any, prefix: str = "") -> Weights:
    """A dict of tensors, checked; a leading ``module.`` (DistributedDataParallel) is dropped.

    Raises:
        CheckpointError: it is none; the first key that is not a tensor is named.
    """
    if not isinstance(found, Mapping) or not found:
        raise refuse(where, f"{prefix.rstrip('.') or 'it'} holds no weights, {ACCEPTED}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise refuse(where, f"{prefix}{name} is of type {type(value).__name__}, not a tensor; {ACCEPTED}")
        if not value.is_floating_point():
            raise refuse(where, f"{prefix}{name} holds {value.dtype}, not weights")
    return {name.removeprefix("module."): value for name, value in found.items()}
