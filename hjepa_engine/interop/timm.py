"""Plain vision transformers of timm: a file, a folder with timm's ``config.json``, or a name in the local cache."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from hjepa_engine.errors import ExportError
from hjepa_engine.interop.source import Source, Weights, read_pickle, read_safetensors, refuse, tensors_in
from hjepa_engine.models.encoder import ContextEncoder

WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: Tokens that attend beside the patches; encoders here have none.
_PREFIX_TOKENS = ("cls_token", "reg_token")
#: What comes after the patch tokens; an encoder ends there.
_HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.", "pre_logits.", "mask_token")
#: Arguments of timm that a ``config.json`` may give.
_SIZES = (
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "init_values",
)
#: timm's arguments for an encoder without a head and without tokens beside the patches.
TOKENS = {"num_classes": 0, "global_pool": "", "class_token": False, "reg_tokens": 0}


def read_timm_name(text: str) -> Source:
    """``timm/NAME`` from the local cache; nothing is downloaded.

    Raises:
        CheckpointError: the name is unknown, not a plain vision transformer, or not in the cache.
    """
    name = text.removeprefix("timm/")
    architecture = name.partition(".")[0]
    if architecture not in timm.list_models("vit_*"):
        raise refuse(
            text, "timm has no vision transformer of that name, see timm.list_models('vit_*', pretrained=True)"
        )
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # of a tag that there is not
        config = None
    if config is None or not (repository := config.hf_hub_id):
        raise refuse(
            text, f"timm has no weights of that name, see timm.list_models('{architecture}*', pretrained=True)"
        )
    repository = repository if "/" in repository else f"timm/{repository}"
    for file in (config.hf_hub_filename, WEIGHTS, "pytorch_model.bin"):
        cached = huggingface_hub.try_to_load_from_cache(repository, file) if file else None
        if isinstance(cached, str):
            return _described(text, _load(Path(cached)), architecture, {}, vars(config))
    raise refuse(
        text,
        f"is not in the local cache, and nothing is downloaded: timm.create_model({name!r}, pretrained=True) fetches it",
    )


def read_timm_folder(folder: Path, config: Mapping[str, Any]) -> Source:
    """A folder with weights and timm's ``config.json``, of which ``config`` is the contents.

    Raises:
        CheckpointError: the weights are damaged, or the architecture is not a plain vision transformer.
    """
    architecture, arguments, described = config["architecture"], config.get("model_args"), config.get("pretrained_cfg")
    if architecture not in timm.list_models("vit_*"):
        raise refuse(folder / CONFIG, f"architecture must be a vision transformer of timm, got {architecture!r}")
    kept = {key: value for key, value in arguments.items() if key in _SIZES} if isinstance(arguments, dict) else {}
    described = described if isinstance(described, dict) else config
    return _described(str(folder), _load(folder / WEIGHTS), architecture, kept, described)


def read_timm_file(path: Path, found: Any = None) -> Source:
    """A file of weights, with names that start with ``vit.`` or not.

    Args:
        path: of the file.
        found: its contents, if they are read already.

    Raises:
        CheckpointError: it is damaged, or not a plain vision transformer.
    """
    return _plain(str(path), _load(path) if found is None else _tensors(path, found))


def _load(path: Path) -> Weights:
    return read_safetensors(path) if path.suffix == ".safetensors" else _tensors(path, read_pickle(path))


def _tensors(path: Path, found: Any) -> Weights:
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    return tensors_in(path, found)


def _plain(where: str, given: Weights, grid: tuple[int, int] | None = None) -> Source:
    given = {name.removeprefix("vit."): tensor for name, tensor in given.items()}
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
        if name not in given:
            some = ", ".join(list(given)[:3])
            raise refuse(where, f"{name} is missing: not a plain vision transformer of timm (it has {some}, ...)")
    positions = given["pos_embed"]
    if positions.ndim != 3:
        raise refuse(where, f"pos_embed must be (1, patches, width), got {tuple(positions.shape)}")
    tokens = {name: given[name].shape[1] for name in _PREFIX_TOKENS if name in given and given[name].ndim == 3}
    length, total = positions.shape[1], sum(tokens.values())
    # Tokens beside the patches have position embeddings all of them, in front, or none of them (DeiT III).
    grids = {number: _grid_of(length - number, grid) for number in (0, total)}
    prefix = max((number for number, found in grids.items() if found), default=0)
    found = grids[prefix]
    if found is None:
        raise refuse(
            where, f"pos_embed must be of a square of patches, got {length} positions and {total} other tokens"
        )
    left_out = [name for name in given if name in _PREFIX_TOKENS or name.startswith(_HEADS)]
    weights = {f"vit.{name}": tensor for name, tensor in given.items() if name not in left_out}
    weights["vit.pos_embed"] = positions[:, prefix:]
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    if tokens:
        notes.append(
            f"{' and '.join(tokens)} dropped, with {prefix} positions: patch tokens differ from those of the source"
        )
    return Source(
        where,
        "a vision transformer of timm",
        {"context_encoder": weights, "target_encoder": weights},
        lambda part, name: name.removeprefix("vit."),
        grid=found,
        notes=tuple(notes),
    )


def _described(
    where: str, given: Weights, architecture: str, arguments: dict[str, Any], config: Mapping[str, Any]
) -> Source:
    """The weights of a known architecture, with what its ``pretrained_cfg`` says."""
    vit: Any
    with torch.device("meta"):  # for its sizes alone
        try:
            vit = timm.create_model(architecture, **{**TOKENS, **arguments})
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise refuse(where, f"{architecture}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise refuse(where, f"{architecture} is a {type(vit).__name__}, not a plain vision transformer")
    block: Any = vit.blocks[0]
    mean, std = (config.get(name) if isinstance(config.get(name), (list, tuple)) else None for name in ("mean", "std"))
    return replace(
        _plain(where, given, tuple(vit.patch_embed.grid_size)),
        num_heads=block.attn.num_heads,
        norm_eps=block.norm1.eps,
        stats=(tuple(mean), tuple(std)) if mean and std else None,
        arguments={
            "name": architecture,
            "pos_embed": "learned",  # a table that is loaded as it is
            "img_size": list(vit.patch_embed.img_size),
            **arguments,
        },
    )


def _grid_of(number: int, known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of a number of patches: the known one, or a square."""
    if known is not None and number == known[0] * known[1]:
        return known
    side = math.isqrt(max(number, 0))
    return (side, side) if side and side * side == number else None


def timm_arguments(encoder: ContextEncoder) -> dict[str, Any]:
    """Arguments of ``timm.create_model``, besides the name, that build the encoder's vision transformer."""
    own = ("name", "pos_embed", "activation_checkpointing", "drop_path_rate", "norm_eps")
    return {**{key: value for key, value in encoder.arguments.items() if key not in own}, **TOKENS}


def write_timm(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    """Write what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens, into an empty folder.

    Raises:
        ExportError: timm's architectures have no such layer.
    """
    if encoder.stem != "patch":
        raise ExportError(f"timm's vision transformers have no model.stem {encoder.stem}: choose another --format")
    name, arguments = encoder.arguments["name"], timm_arguments(encoder)
    vit: Any = encoder.vit
    plain: Any = timm.create_model(name, **arguments)
    own, named = vit.blocks[0].norm1.eps, plain.blocks[0].norm1.eps
    if own != named:
        raise ExportError(f"timm's {name} has model.norm_eps {named:g}, the run {own:g}: choose another --format")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.vit.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [encoder.arguments["in_chans"], *encoder.vit.patch_embed.img_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(stats[0]),
            "std": list(stats[1]),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
