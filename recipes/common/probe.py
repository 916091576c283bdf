"""Linear probes of frozen encoders, compared with a random encoder and raw pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from torch import nn

from hjepa_engine import Config, create_evaluator, load_config, load_encoder
from hjepa_engine.build import build_model, choose_device
from hjepa_engine.data import build_loader, open_split, sample_per_class
from hjepa_engine.evaluator import labeled_features
from hjepa_engine.handlers import DamagedImages
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.metrics.names import FINAL_PROBES, PROBE
from hjepa_engine.models import encoder_name
from hjepa_engine.recipes.common.heads import standardized, train_head
from hjepa_engine.steps import feature_step
from hjepa_engine.types import Labeled


def read_features(config: Config, encoder: nn.Module | None, device: torch.device) -> tuple[Labeled, Labeled, int]:
    """Standardized features (samples, F) and labels of the probe and validation splits, and the number of classes."""
    modules = nn.ModuleDict({} if encoder is None else {"encoder": encoder})
    evaluator = create_evaluator(partial(feature_step, features=config.probe.features), modules, device)
    splits: list[Labeled] = []
    for split in ("probe", "val"):
        source = open_split(config.data, split, config.seed)
        data = build_loader(config.data, source, config.seed, train=False, device=device, replicate=True)
        name = {"probe": "probe", "val": "validation"}[split]
        damaged = DamagedImages(config.data.max_damaged, len(source.images), name, "damaged")
        damaged.attach(evaluator)
        splits.append(labeled_features(evaluator, data, device=torch.device("cpu")))
        evaluator.detach(damaged)
    (features, labels), val = splits
    if config.probe.labels_per_class is not None:
        chosen = sample_per_class(labels, config.probe.labels_per_class, config.seed)
        features, labels = features[chosen], labels[chosen]
    return *standardized((features, labels), val), source.num_classes


def probe(config: Config, encoder: nn.Module | None, name: str, folder: Path | None = None, bar: bool = False) -> float:
    """Train a linear head on frozen features; returns its validation accuracy after the last epoch, from 0 to 1.

    Args:
        config: configuration of the run, with the settings in ``probe``.
        encoder: from images to tokens (B, N, D) or features (B, D); None: raw pixels.
        name: name of the encoder, for the progress bar and the log.
        folder: folder of ``probe_<name>.jsonl``; None: do not write it.
        bar: show a progress bar.
    """
    device = choose_device(config.device)
    train, val, num_classes = read_features(config, None if encoder is None else encoder.to(device), device)
    writers = []
    if folder is not None and idist.get_rank() == 0:
        writers.append(JsonlWriter(folder / f"probe_{name}.jsonl"))
    return train_head(
        train, val, num_classes, config.probe, config.seed, device, writers, f"probe of {name}" if bar else None
    )


def evaluate_encoders(
    config: Config, encoders: Mapping[str, nn.Module | None], folder: Path | None = None, bar: bool = False
) -> dict[str, float]:
    """Probe accuracy of each encoder, by name; see :func:`probe`."""
    return {name: probe(config, encoder, name, folder, bar) for name, encoder in encoders.items()}


def as_metrics(results: dict[str, float]) -> dict[str, float]:
    """Accuracies by their logged names: ``probe/linear``, ``probe/linear_random``, ``probe/linear_pixels``."""
    return {FINAL_PROBES.get(name, f"{PROBE}linear_{name}"): accuracy for name, accuracy in results.items()}


def describe(results: dict[str, float], config: Config) -> str:
    """The table that recipes print."""
    labels = config.probe.labels_per_class
    how = f"{config.probe.features} tokens, {'all labels' if labels is None else f'{labels} labels per class'}"
    names = {"trained": "trained encoder", "random": "random encoder", "pixels": "raw pixels"}
    return "\n".join([f"linear probe ({how}):", *(f"  {names[n]:24}{100 * results[n]:5.1f} %" for n in results)])


def probe_run(folder: Path, checkpoint: str | None, overrides: Sequence[str]) -> tuple[Config, dict[str, float]]:
    """Probe the encoder of a run folder, and write ``linear_probe.json`` there.

    Args:
        folder: the run folder.
        checkpoint: see :func:`~hjepa_engine.load_encoder`.
        overrides: command-line overrides of the run's configuration.
    """
    saved, own = folder / "config.yaml", None
    if saved.is_file() and (before := load_config(saved)).model.class_path is not None:
        own = _initial_encoder(before)
    encoder = load_encoder(folder, checkpoint, own)
    config = load_config(saved, overrides)
    encoders = {"trained": encoder, "random": _initial_encoder(config), "pixels": None}
    results = evaluate_encoders(config, encoders, folder, config.logging.progress_bar)
    record = {"probe": asdict(config.probe), "checkpoint": checkpoint, "accuracy": results}
    (folder / "linear_probe.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return config, results


def _initial_encoder(config: Config) -> nn.Module | None:
    modules = build_model(config)
    name = encoder_name(config, modules)
    return None if name is None else modules[name]
