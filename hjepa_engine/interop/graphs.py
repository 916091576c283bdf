"""Encoders as graphs that need no Python code of this project or of timm: ONNX, and ``torch.export``."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hjepa_engine.errors import ConfigError
from hjepa_engine.models.encoder import ContextEncoder

ONNX, PROGRAM, CONFIG = "model.onnx", "model.pt2", "config.json"
_MAX_ONE_FILE = 1.5e9  # bytes; protobuf ends at 2 GB


class _Tokens(nn.Module):
    """Normalized images (B, C, H, W) to patch tokens (B, N, D), for any B."""

    def __init__(self, encoder: ContextEncoder) -> None:
        super().__init__()
        self.vit = encoder.vit

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.vit.forward_features(images)
        return tokens[:, self.vit.num_prefix_tokens :]


def _traced(encoder: ContextEncoder) -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    height, width = encoder.vit.patch_embed.img_size
    example = torch.zeros(2, encoder.arguments["in_chans"], height, width)
    return _Tokens(encoder).eval(), (example,), {"images": {0: torch.export.Dim("batch", min=1)}}


def check_onnx() -> None:
    """Refuse to begin without the libraries.

    Raises:
        ConfigError: there is none of them.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install 'hjepa-engine[export]'")


def write_onnx(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    """Write ``model.onnx``, from ``images`` to ``tokens``, and ``config.json`` into an empty folder."""
    model, example, shapes = _traced(encoder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with _quiet():
        torch.onnx.export(
            model,
            example,
            folder / ONNX,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["tokens"],
            external_data=size > _MAX_ONE_FILE,
            verbose=False,
        )
    _describe(encoder, folder, stats)


def write_program(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    """Write ``model.pt2`` for ``torch.export.load``, and ``config.json`` into an empty folder."""
    model, example, shapes = _traced(encoder)
    with _quiet():
        torch.export.save(torch.export.export(model, example, dynamic_shapes=shapes), folder / PROGRAM)
    _describe(encoder, folder, stats)


def _describe(encoder: ContextEncoder, folder: Path, stats: tuple[Any, Any]) -> None:
    height, width = encoder.vit.patch_embed.img_size
    config = {
        "input": {"name": "images", "shape": ["batch", encoder.arguments["in_chans"], height, width]},
        "output": {"name": "tokens", "shape": ["batch", encoder.num_patches, encoder.embed_dim]},
        "encoder": encoder.arguments,
        "mean": list(stats[0]),
        "std": list(stats[1]),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own notes, of which none is about the encoder, from the console."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
