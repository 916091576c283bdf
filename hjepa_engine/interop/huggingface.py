"""Folders of Hugging Face's ``IJepaModel``, ``config.json`` and safetensors, read and written without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hjepa_engine.errors import ExportError
from hjepa_engine.interop.source import Source, Weights, read_json, read_safetensors, refuse
from hjepa_engine.models.encoder import ContextEncoder

WEIGHTS, INDEX, CONFIG, PROCESSOR = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
)
_OUTER = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
#: What an encoder has no use for.
_LEFT_OUT = ("classifier.", "pooler.", "embeddings.mask_token")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
#: Defaults of transformers' IJepaConfig, for what an old file leaves out.
_DEFAULTS = {
    **dict(zip(_SIZES, (768, 12, 12, 3072), strict=True)),
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "qkv_bias": True,
}


def names(depth: int, qkv_bias: bool = True) -> dict[str, tuple[str, ...]]:
    """This project's names of the tensors (in ``vit``), and Hugging Face's: three for queries, keys and values."""
    found: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _OUTER.items()}
    for block in range(depth):
        here, there = f"blocks.{block}", f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            for ours, theirs in _BLOCK.items():
                found[f"{here}.{ours}.{kind}"] = (f"{there}.{theirs}.{kind}",)
            if kind == "weight" or qkv_bias:
                found[f"{here}.attn.qkv.{kind}"] = tuple(f"{there}.{theirs}.{kind}" for theirs in _QKV)
    return found


def read_huggingface(folder: Path, config: Mapping[str, Any]) -> Source:
    """The encoder in a folder, for the context and the target encoder.

    Args:
        folder: with the weights, in one file or in several with an index.
        config: contents of its ``config.json``.

    Raises:
        CheckpointError: it is of another model, or a tensor is missing.
    """
    where = folder / CONFIG
    if config.get("model_type") != "ijepa":
        raise refuse(where, f"model_type must be ijepa, got {config.get('model_type')!r}")
    asked = {**_DEFAULTS, **{key: value for key, value in config.items() if key in _DEFAULTS}}
    if asked["hidden_act"] != "gelu":
        raise refuse(where, f"hidden_act must be gelu, got {asked['hidden_act']!r}")
    for key in _SIZES:
        if type(asked[key]) is not int or not 1 <= asked[key] <= 2**16:
            raise refuse(where, f"{key} must be a positive integer, got {asked[key]!r}")
    (height, width), (down, across) = (_pair(where, key, asked[key]) for key in ("image_size", "patch_size"))
    found = {name.removeprefix("ijepa."): tensor for name, tensor in _weights(folder).items()}
    weights: Weights = {}
    for ours, theirs in names(asked["num_hidden_layers"], bool(asked["qkv_bias"])).items():
        if missing := [name for name in theirs if name not in found]:
            raise refuse(folder, f"{missing[0]} is missing")
        pieces = [found.pop(name) for name in theirs]
        if len({piece.shape for piece in pieces}) > 1:
            raise refuse(folder, f"{theirs[0]}, key and value must be of one shape")
        weights[f"vit.{ours}"] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    extra = [name for name in found if not name.startswith(_LEFT_OUT)]
    if extra:
        raise refuse(folder, f"{extra[0]} has no place: {CONFIG} says num_hidden_layers {asked['num_hidden_layers']}")
    theirs_of = {f"vit.{ours}": theirs[0] for ours, theirs in names(asked["num_hidden_layers"]).items()}
    return Source(
        str(folder),
        "Hugging Face's IJepaModel",
        {"context_encoder": weights, "target_encoder": weights},
        lambda part, name: theirs_of.get(name, name),
        grid=(height // down, width // across),
        num_heads=asked["num_attention_heads"],
        norm_eps=float(asked["layer_norm_eps"]),
        stats=_stats(folder),
        notes=(f"left out: {', '.join(found)}",) if found else (),
    )


def _pair(where: Path, key: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list) else (value, value)
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise refuse(where, f"{key} must be a positive integer, got {value!r}")
    return pair[0], pair[1]


def _weights(folder: Path) -> Weights:
    if not (folder / INDEX).is_file():
        return read_safetensors(folder / WEIGHTS)
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise refuse(folder / INDEX, "weight_map is missing")
    weights: Weights = {}
    for shard in sorted({str(name) for name in shards.values()}):
        if Path(shard).name != shard:
            raise refuse(folder / INDEX, f"weight_map must name files beside it, got {shard!r}")
        if not (folder / shard).is_file():
            raise refuse(folder / shard, f"there is no such file, {INDEX} names it")
        weights |= read_safetensors(folder / shard)
    return weights


def _stats(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if not (folder / PROCESSOR).is_file():
        return None
    processor = read_json(folder / PROCESSOR)
    try:
        return tuple(map(float, processor["image_mean"])), tuple(map(float, processor["image_std"]))
    except (KeyError, TypeError, ValueError):
        return None


def write_huggingface(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    """Write what ``transformers.AutoModel.from_pretrained`` opens, into an empty folder.

    Raises:
        ExportError: ``IJepaModel`` has no such layer.
    """
    vit: Any = encoder.vit
    arguments = encoder.arguments
    has_bias = vit.blocks[0].attn.qkv.bias is not None
    if encoder.stem != "patch":
        raise ExportError(f"IJepaModel of Hugging Face has no model.stem {encoder.stem}: choose another --format")
    table, given = names(encoder.depth, has_bias), vit.state_dict()
    if differ := sorted(table.keys() ^ given.keys()):
        layer = "layer scale (model.layer_scale)" if ".ls" in differ[0] else differ[0]
        raise ExportError(f"IJepaModel of Hugging Face has no {layer}: choose another --format")
    if type(vit.blocks[0].mlp.act) is not nn.GELU:
        raise ExportError(
            f"IJepaModel of Hugging Face has no {type(vit.blocks[0].mlp.act).__name__}: choose another --format"
        )
    tensors: dict[str, Tensor] = {}
    for ours, theirs in table.items():
        pieces = given[ours].detach().cpu().chunk(len(theirs))
        tensors |= {name: piece.contiguous().clone() for name, piece in zip(theirs, pieces, strict=True)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    height, width = size = list(vit.patch_embed.img_size)
    patch = vit.patch_embed.patch_size
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "image_size": height if height == width else size,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": arguments["in_chans"],
        "layer_norm_eps": vit.norm.eps,
        "hidden_act": "gelu",
        "qkv_bias": has_bias,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(stats[0]),
        "image_std": list(stats[1]),
    }
    for name, what in ((CONFIG, config), (PROCESSOR, processor)):
        (folder / name).write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")
