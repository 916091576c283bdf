"""Export and load the trained encoder: weights as safetensors, and a JSON file with the arguments that build it."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hjepa_engine.checkpoint.folder import find_checkpoint, load_one
from hjepa_engine.config.loading import config_from
from hjepa_engine.errors import ExportError
from hjepa_engine.models import encoder_arguments, encoder_name
from hjepa_engine.models.encoder import ContextEncoder, TargetEncoder
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import rank
from hjepa_engine.utils.sharding import state_of

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
#: timm arguments that load or download a weights file, which some timm versions unpickle.
_LOADING_ARGUMENTS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def save_encoder(encoder: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``.

    Args:
        encoder: a :class:`~hjepa_engine.models.TargetEncoder` or :class:`~hjepa_engine.models.ContextEncoder`.
        folder: created if it does not exist.
        description: contents of ``config.json``: ``encoder``, the arguments that build the encoder, and whatever else a
            user of the weights needs (``stats``, mean and standard deviation of each channel).

    Rank 0 writes. Collective where the encoder is in shards.

    Raises:
        ExportError: the files cannot be written.
    """
    weights = state_of(unwrap(encoder))
    if rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(json.dumps(dict(description), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"the encoder cannot be written to {folder}: {str(error).splitlines()[0]}") from error


def check_description(description: Mapping[str, Any]) -> None:
    """Refuse arguments that would make timm load a file.

    Raises:
        ValueError: there are any.
    """
    arguments = description.get("encoder")
    if isinstance(arguments, dict) and (loads := arguments.keys() & _LOADING_ARGUMENTS):
        raise ValueError(f"{DESCRIPTION} must not make timm load weights, got {min(loads)}")


def load_encoder(
    run_dir: str | Path,
    checkpoint: str | None = None,
    encoder: nn.Module | None = None,
    img_size: int | Sequence[int] | None = None,
    *,
    module: str | None = None,
) -> Any:
    """Load the target encoder of a run, in eval mode: normalized images (B, C, H, W) to patch tokens (B, N, D).

    Args:
        run_dir: a run folder, or the ``encoder`` folder in it.
        checkpoint: ``latest``, ``best`` or a checkpoint's name; works while the run is training. None: the encoder that
            the finished run exported.
        encoder: for runs that train a model of your own: an encoder with the same parameters, to load the weights into.
        img_size: H and W of the images in pixels, or one number, where they are not those of the run: multiples of the patch
            size, for which the position embeddings are interpolated.
        module: name of another encoder of the run, with a ``checkpoint``: ``context_encoder``.

    Raises:
        ExportError: there is no exported encoder, or its files are invalid or do not match, or the patches do not divide
            ``img_size``.
        CheckpointError: there is no such checkpoint, or it is corrupt.
    """
    loaded = _load(Path(run_dir), checkpoint, encoder, module)
    if img_size is not None:
        if not isinstance(loaded, ContextEncoder):
            raise ExportError(
                f"img_size must be null for an encoder of your own, {type(loaded).__name__}, got {img_size}"
            )
        try:
            loaded.set_img_size(img_size)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ExportError(f"the encoder of {run_dir}: {str(error).splitlines()[0]}") from error
    return loaded.requires_grad_(False).eval()


def _load(folder: Path, checkpoint: str | None, encoder: nn.Module | None, module: str | None) -> nn.Module:
    if checkpoint is not None:
        return _from_checkpoint(folder, checkpoint, encoder, module)
    run_dir = folder
    if not (folder / DESCRIPTION).is_file():
        folder = folder / "encoder"
    try:
        return _from_export(folder, encoder)
    except FileNotFoundError as error:
        raise ExportError(
            f"{run_dir} has no exported encoder: {error.filename or error} is missing; before the run ends, load it from a "
            "checkpoint (latest, best)"
        ) from error
    except Exception as error:  # timm, torch and safetensors raise all kinds of errors on invalid contents
        what = (str(error).splitlines() or [repr(error)])[0]
        raise ExportError(f"the encoder in {folder} cannot be loaded: {what}") from error


def _from_checkpoint(folder: Path, checkpoint: str, encoder: nn.Module | None, module: str | None) -> nn.Module:
    found, state = load_one(find_checkpoint(folder, checkpoint).path)
    try:
        config = config_from(found.config)
        name = module or encoder_name(config, state["modules"])
        if encoder is None and config.model.class_path is not None:
            raise KeyError(
                f"the model is {config.model.class_path}: pass load_encoder an encoder to load the weights into"
            )
        if encoder is None:
            encoder = TargetEncoder(**encoder_arguments(config))
        encoder.load_state_dict(state["modules"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        what = (str(error.args[0] if error.args else error).splitlines() or [""])[0]
        raise ExportError(f"{found.path} has no encoder that matches its configuration: {what}") from error
    return encoder


def _from_export(folder: Path, encoder: nn.Module | None) -> nn.Module:
    for path in (folder / DESCRIPTION, folder / WEIGHTS):
        if not path.is_file():  # opening a pipe would block
            raise FileNotFoundError(errno.ENOENT, "no file", str(path))
    if (folder / DESCRIPTION).stat().st_size > 2**20:
        raise ValueError(f"{DESCRIPTION} is larger than 1 MB")
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if encoder is None and "encoder" not in description:
        raise ValueError(
            f"it is {description['module']!r} of a model of your own: pass load_encoder an encoder to load the weights into"
        )
    weights = load_file(folder / WEIGHTS)
    if encoder is None:
        check_description(description)
        with torch.device("meta"):  # the file may ask for any size: compare shapes before memory is allocated
            wanted = TargetEncoder(**{**description["encoder"], "pos_embed": "learned"}).state_dict()
        if {name: item.shape for name, item in wanted.items()} != {name: item.shape for name, item in weights.items()}:
            raise ValueError(f"the tensors in {WEIGHTS} do not match the encoder in {DESCRIPTION}")
        encoder = TargetEncoder(**description["encoder"])
    encoder.load_state_dict(weights)
    return encoder
