"""The trained encoder, out of a run and in again: safetensors beside a JSON that says how to build it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hjepa_engine.errors import ExportError
from hjepa_engine.models.encoder import TargetEncoder
from hjepa_engine.types import unwrap

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def save_encoder(encoder: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``.

    Args:
        encoder: a :class:`~hjepa_engine.models.TargetEncoder` or :class:`~hjepa_engine.models.ContextEncoder`.
        folder: made if need be.
        description: ``encoder``, the arguments that build it, and whatever a user of the weights has to know
            (``stats``, mean and standard deviation of each channel).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in unwrap(encoder).state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(dict(description), indent=2) + "\n", encoding="utf-8")


def load_encoder(run_dir: str | Path) -> TargetEncoder:
    """The target encoder of a finished run, in evaluation mode: normalised images (B, C, H, W) to tokens (B, N, D).

    Args:
        run_dir: a run folder, or the ``encoder`` folder in it.

    Raises:
        ExportError: there is none, or its files do not fit together.
    """
    folder = Path(run_dir)
    if not (folder / DESCRIPTION).is_file():
        folder = folder / "encoder"
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        encoder = TargetEncoder(**description["encoder"])
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        raise ExportError(f"{run_dir} holds no exported encoder: {error.filename or error} is missing") from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"the encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return encoder.requires_grad_(False).eval()
