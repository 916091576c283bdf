"""Judge the frozen encoder of a run with a linear probe, beside a random encoder and raw pixels.

    python recipes/linear_probe.py --run RUN_DIR [--checkpoint best] [--probe.features concat ...]

The probe is trained by the same engine, optimizer step, schedule, averages and progress bar as pretraining. Features are
read once from unaugmented images and standardized (as by MAE's batch norm without affine parameters, arXiv:2111.06377).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch import nn

from hjepa_engine import Config, create_evaluator, load_config, load_encoder
from hjepa_engine.build import choose_device
from hjepa_engine.data import build_loader, open_split, sample_per_class
from hjepa_engine.engine import StepEngine
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.models import build_modules
from hjepa_engine.recipes.common.heads import standardized, train_head
from hjepa_engine.run.cli import command_parser, run_command
from hjepa_engine.steps import feature_step
from hjepa_engine.types import Labeled


def read_features(config: Config, encoder: nn.Module | None, device: torch.device) -> tuple[Labeled, Labeled, int]:
    """Standardized features (samples, F) and labels of the probe and validation splits, and the number of classes."""
    modules = nn.ModuleDict({} if encoder is None else {"encoder": encoder})
    evaluator = create_evaluator(partial(feature_step, features=config.probe.features), modules, device)
    splits: list[Labeled] = []
    found: list[Labeled] = []

    def keep(engine: StepEngine) -> None:
        found.append((engine.state.output["features"].cpu(), engine.state.batch["labels"].cpu()))

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
    for split in ("probe", "val"):
        source = open_split(config.data, split, config.seed)
        evaluator.run(build_loader(config.data, source, config.seed, train=False, replicate=True)[0])
        splits.append((torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])))
        found.clear()
    (features, labels), val = splits
    if config.probe.labels_per_class is not None:
        chosen = sample_per_class(labels, config.probe.labels_per_class, config.seed)
        features, labels = features[chosen], labels[chosen]
    return *standardized((features, labels), val), source.num_classes


def probe(config: Config, encoder: nn.Module | None, name: str, folder: Path | None = None, bar: bool = False) -> float:
    """Train a linear head on frozen features; its accuracy on the validation split after the last epoch, from 0 to 1.

    Args:
        config: of the run; ``probe`` has the settings.
        encoder: from images to tokens (B, N, D); None: read raw pixels.
        name: of the encoder, for the progress bar and the log.
        folder: where ``probe_<name>.jsonl`` is written; None: nowhere.
        bar: whether to show progress.
    """
    device = choose_device(config.device)
    train, val, num_classes = read_features(config, encoder, device)
    writers = []
    if folder is not None and idist.get_rank() == 0:
        writers.append(JsonlWriter(folder / f"probe_{name}.jsonl"))
    return train_head(
        train, val, num_classes, config.probe, config.seed, device, writers, f"probe of {name}" if bar else None
    )


def evaluate_encoder(
    config: Config, encoder: nn.Module, folder: Path | None = None, bar: bool = False
) -> dict[str, float]:
    """Accuracy of the probe on the trained encoder, on the same encoder with its initial weights, and on pixels."""
    encoders = {
        "trained": encoder,
        "random": build_modules(config)["target_encoder"].to(choose_device(config.device)),
        "pixels": None,
    }
    return {name: probe(config, candidate, name, folder, bar) for name, candidate in encoders.items()}


def as_metrics(results: dict[str, float]) -> dict[str, float]:
    """The accuracies as they are logged: ``probe/linear``, ``probe/linear_random``, ``probe/linear_pixels``."""
    return {f"probe/linear_{name}".removesuffix("_trained"): accuracy for name, accuracy in results.items()}


def describe(results: dict[str, float], config: Config) -> str:
    """The table that recipes print."""
    labels = config.probe.labels_per_class
    how = f"{config.probe.features} tokens, {'all labels' if labels is None else f'{labels} labels per class'}"
    names = {"trained": "trained target encoder", "random": "random encoder", "pixels": "raw pixels"}
    return "\n".join([f"linear probe ({how}):", *(f"  {names[n]:24}{100 * results[n]:5.1f} %" for n in results)])


def main(argv: Sequence[str]) -> None:
    """Probe the encoder of a run."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, latest or a name; the exported encoder by default")
    known, overrides = parser.parse_known_args(argv)
    encoder = load_encoder(known.run, known.checkpoint)
    config = load_config(known.run / "config.yaml", overrides)
    results = evaluate_encoder(config, encoder.to(choose_device(config.device)), known.run, config.logging.progress_bar)
    print(describe(results, config))
    (known.run / "linear_probe.json").write_text(
        json.dumps({"probe": asdict(config.probe), "checkpoint": known.checkpoint, "accuracy": results}) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
