"""The model card of an exported encoder: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hjepa_engine._version import __version__
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.config.schema import Config
from hjepa_engine.interop.timm import timm_arguments
from hjepa_engine.models.encoder import ContextEncoder

Format = Literal["safetensors", "timm", "huggingface", "onnx", "torch_export"]
CARD = "README.md"
#: Logged metrics that say how good an encoder is.
_FIGURES = ("val/loss", "probe/")
_PROBES = {
    "trained": "linear probe",
    "random": "linear probe of a random encoder",
    "pixels": "linear probe of raw pixels",
}


@dataclass(frozen=True)
class Facts:
    """What a run folder says of an encoder."""

    config: Config
    module: str
    """Name of the encoder in the run."""
    checkpoint: Checkpoint | None
    """That it is from, or the newest one where it was exported at the end of the run; None: it is not known."""
    data: dict[str, Any]
    """Contents of ``data.json``; empty where there is none."""
    figures: dict[str, float]
    """Accuracies of linear probes of these weights, by what was probed; empty where they were not measured."""


def figures_in(run: Path, checkpoint: str | None) -> dict[str, float]:
    """Accuracies of the linear probe of one encoder in a run folder, empty where it was not measured.

    Those of ``recipes/linear_probe.py``, else those at the run's end.

    Args:
        run: the run folder.
        checkpoint: name of the checkpoint that the encoder is from; None: it is the one that the finished run exported.
    """
    for name, key in (("linear_probe.json", "accuracy"), ("status.json", "results")):
        try:
            record = json.loads((run / name).read_text(encoding="utf-8"))
            figures = {_PROBES[probe]: float(value) for probe, value in record[key].items() if probe in _PROBES}
            if figures and (record.get("checkpoint") if key == "accuracy" else None) == checkpoint:
                return figures
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return {}


def write_card(folder: Path, name: str, kind: Format, encoder: ContextEncoder, facts: Facts, stats: Any) -> None:
    """Write ``README.md``.

    Args:
        folder: with the weights, under a temporary name.
        name: the folder's own name.
        kind: the format.
        encoder: what was exported.
        facts: of its run.
        stats: mean and standard deviation of each channel.
    """
    height, width = encoder.vit.patch_embed.img_size
    shape = (1, encoder.arguments["in_chans"], height, width)
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in stats)
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    lines = [
        f"# {facts.config.logging.experiment_name}",
        "",
        f"The `{facts.module}` of an H-JEPA, pretrained without labels by hjepa-engine {__version__}: "
        f"a vision transformer of {parameters:.2f} M parameters, from normalized images to {encoder.num_patches} patch "
        f"tokens of {encoder.embed_dim} numbers.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in _rows(facts)),
        f"| images | {height} x {width} pixels, {shape[1]} channel{'s' if shape[1] > 1 else ''} |",
        f"| normalization | pixels from 0 to 1, minus {mean}, divided by {std} |",
        f"| encoder | {_described(encoder)} |",
        "",
        "## Load it",
        "",
        "From the folder that this one is in:",
        "",
        "```python",
        *_loading(kind, name, shape, encoder),
        "```",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(facts: Facts) -> list[tuple[str, str]]:
    data, checkpoint = facts.config.data, facts.checkpoint
    images = facts.data.get("train", {}).get("images")
    rows = [("data", f"{data.class_path or data.hub_name or data.dataset}{f', {images:,} images' if images else ''}")]
    if checkpoint is not None:
        trained = (
            f"{checkpoint.record.epoch} of {facts.config.training.epochs} epochs, {checkpoint.record.step:,} steps"
        )
        rows += [("trained", f"{trained} with batches of {data.batch_size}")]
        named = {key: value for key, value in checkpoint.metrics.items() if key.startswith(_FIGURES)}
        rows += [(f"`{key}`", f"{value:.4g}") for key, value in sorted(named.items())]
    return rows + [(name, f"{100 * accuracy:.1f} %") for name, accuracy in facts.figures.items()]


def _described(encoder: ContextEncoder) -> str:
    vit: Any = encoder.vit
    patch = vit.patch_embed.patch_size
    return (
        f"{encoder.arguments['name']}: width {encoder.embed_dim}, {encoder.depth} blocks, "
        f"{vit.blocks[0].attn.num_heads} heads, patches of {patch[0]} x {patch[1]} pixels, "
        f"{'fixed' if encoder.arguments['pos_embed'] == 'sincos' else 'learned'} positions, no class token"
    )


def _loading(kind: Format, name: str, shape: tuple[int, ...], encoder: ContextEncoder) -> list[str]:
    images = f"images = torch.zeros{shape}  # normalized"
    if kind == "safetensors":
        load = f'model = load_encoder("{name}")'
        return ["import torch", "from hjepa_engine import load_encoder", "", load, images, "tokens = model(images)"]
    if kind == "huggingface":
        load, run = f'model = AutoModel.from_pretrained("{name}")', "tokens = model(images).last_hidden_state"
        return ["import torch", "from transformers import AutoModel", "", load, images, run]
    if kind == "timm":
        arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(encoder).items())
        architecture = encoder.arguments["name"]
        return [
            "import timm",
            "import torch",
            "",
            f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()',
            "# or with all arguments written out:",
            f'model = timm.create_model("{architecture}", checkpoint_path="{name}/model.safetensors"{arguments}).eval()',
            images,
            "tokens = model(images)",
        ]
    if kind == "onnx":
        session = f'session = onnxruntime.InferenceSession("{name}/model.onnx")'
        zeros = f'images = numpy.zeros({shape}, "float32")  # normalized'
        run = '(tokens,) = session.run(["tokens"], {"images": images})'
        return ["import numpy", "import onnxruntime", "", session, zeros, run]
    load = f'model = torch.export.load("{name}/model.pt2").module()'
    return ["import torch", "", load, images, "tokens = model(images)"]
