"""Judge the frozen encoder of a run with a linear probe, beside a random encoder and raw pixels.

    python recipes/linear_probe.py --run RUN_DIR [--checkpoint best] [--probe.features concat ...]

The probe is trained by the same engine, optimiser step, schedule, averages and progress bar as pretraining. Features are
read once from unaugmented images and standardised (as by MAE's batch norm without affine parameters, arXiv:2111.06377).
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
from torch import Tensor, nn

from hjepa_engine import Config, create_evaluator, create_trainer, load_config, load_encoder
from hjepa_engine.cli import command_parser, run_command
from hjepa_engine.data import FeatureBatches, build_loader, few_labels, open_source
from hjepa_engine.engine import StepEngine
from hjepa_engine.handlers import (
    DataPosition,
    MetricAverager,
    MetricsLogger,
    OptimizerStep,
    ParamSchedule,
    ProgressBar,
    Validation,
)
from hjepa_engine.models import build_modules
from hjepa_engine.parts import choose_device
from hjepa_engine.randomness import key
from hjepa_engine.schedules import CosineScheduler
from hjepa_engine.steps import feature_step, linear_probe_step
from hjepa_engine.writers import JsonlWriter

Labelled = tuple[Tensor, Tensor]


def read_features(config: Config, encoder: nn.Module | None, device: torch.device) -> tuple[Labelled, Labelled, int]:
    """Standardised features (samples, F) and labels of the probe and validation splits, and the number of classes."""
    modules = nn.ModuleDict({} if encoder is None else {"encoder": encoder})
    evaluator = create_evaluator(partial(feature_step, features=config.probe.features), modules, device)
    splits: list[Labelled] = []
    found: list[Labelled] = []

    def keep(engine: StepEngine) -> None:
        found.append((engine.state.output["features"].cpu(), engine.state.batch["labels"].cpu()))

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
    for split in ("probe", "val"):
        source = open_source(config.data, split, config.seed)
        evaluator.run(build_loader(config.data, source, config.seed, train=False, alone=True)[0])
        splits.append((torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])))
        found.clear()
    (features, labels), (val_features, val_labels) = splits
    if config.probe.labels_per_class is not None:
        chosen = few_labels(labels, config.probe.labels_per_class, config.seed)
        features, labels = features[chosen], labels[chosen]
    mean, std = features.mean(dim=0), features.std(dim=0)
    # A feature that is constant in the training images (the border of digits) would blow up in others.
    std = torch.where(std < 1e-4 * std.max(), 1.0, std)
    return ((features - mean) / std, labels), ((val_features - mean) / std, val_labels), source.num_classes


def probe(config: Config, encoder: nn.Module | None, name: str, folder: Path | None = None, bar: bool = False) -> float:
    """Train a linear head on frozen features; its accuracy on the validation split after the last epoch, from 0 to 1.

    Args:
        config: of the run; ``probe`` has the settings.
        encoder: from images to tokens (B, N, D); None: read raw pixels.
        name: of the encoder, for the progress bar and the log.
        folder: where ``probe_<name>.jsonl`` is written; None: nowhere.
        bar: whether to show progress.
    """
    settings, device = config.probe, choose_device(config.device)
    train, val, num_classes = read_features(config, encoder, device)
    batches = FeatureBatches(*train, min(settings.batch_size, len(train[0])), config.seed)
    torch.manual_seed(key(config.seed, "linear probe"))
    modules = nn.ModuleDict({"head": nn.Linear(train[0].shape[1], num_classes)}).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), settings.lr, weight_decay=settings.weight_decay)

    trainer = create_trainer(linear_probe_step, modules, device)
    evaluator = create_evaluator(linear_probe_step, modules, device)
    MetricAverager(prefix="").attach(evaluator)
    writers = []
    if folder is not None and idist.get_rank() == 0:
        writers.append(JsonlWriter(folder / f"probe_{name}.jsonl"))
    logger = MetricsLogger(writers)
    for handler in (
        OptimizerStep(optimizer),
        ParamSchedule(
            optimizer, "lr", CosineScheduler(settings.lr, 0.0, settings.epochs, len(batches)), metric="train/lr"
        ),
        DataPosition(batches.sampler),
        MetricAverager(),
        Validation(evaluator, FeatureBatches(*val, 4096, shuffle=False), every=settings.epochs),
        logger,
    ):
        handler.attach(trainer)
    if bar:
        ProgressBar(("train/loss", "train/accuracy", "val/accuracy"), name=f"probe of {name}", summaries=False).attach(
            trainer
        )
    accuracy = trainer.run(batches, max_epochs=settings.epochs).metrics["val/accuracy"]
    logger.close()
    return float(accuracy)


def judge(config: Config, encoder: nn.Module, folder: Path | None = None, bar: bool = False) -> dict[str, float]:
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
    results = judge(config, encoder.to(choose_device(config.device)), known.run, config.logging.progress_bar)
    print(describe(results, config))
    (known.run / "linear_probe.json").write_text(
        json.dumps({"probe": asdict(config.probe), "checkpoint": known.checkpoint, "accuracy": results}) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
