"""Linear heads on frozen features, trained with the same engine and handlers as pretraining."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hjepa_engine import create_evaluator, create_trainer
from hjepa_engine.config.schema import ProbeConfig
from hjepa_engine.data import FeatureBatches, mean_and_std
from hjepa_engine.handlers import (
    DataPosition,
    MetricAverager,
    MetricsLogger,
    OptimizerStep,
    ParamSchedule,
    ProgressBar,
    Validation,
)
from hjepa_engine.loggers.base import Writer
from hjepa_engine.schedules import CosineScheduler
from hjepa_engine.steps import linear_probe_step
from hjepa_engine.types import Labeled
from hjepa_engine.utils.rng import derive_seed, preserve_rng_state


def standardized(train: Labeled, val: Labeled) -> tuple[Labeled, Labeled]:
    """Standardize both by the mean and standard deviation of the training features (as in MAE, arXiv:2111.06377)."""
    mean, std = mean_and_std(train[0])
    return ((train[0] - mean) / std, train[1]), ((val[0] - mean) / std, val[1])


def train_head(
    train: Labeled,
    val: Labeled,
    num_classes: int,
    settings: ProbeConfig,
    seed: int,
    device: torch.device,
    writers: Sequence[Writer] = (),
    bar: str | None = None,
) -> float:
    """Train a linear head; returns its accuracy on ``val`` after the last epoch, from 0 to 1.

    The result depends only on the arguments; the global random generators are left as they were.

    Args:
        train: standardized training features and labels.
        val: standardized validation features and labels.
        num_classes: number of classes.
        settings: epochs, batch size, learning rate and weight decay.
        seed: seed of the initial weights and the order.
        device: device to train on.
        writers: writers of losses and accuracies.
        bar: name of the progress bar; None: no bar.
    """
    batches = FeatureBatches(*train, min(settings.batch_size, len(train[0])), seed)
    with preserve_rng_state():
        torch.manual_seed(derive_seed(seed, "linear probe"))
        modules = nn.ModuleDict({"head": nn.Linear(train[0].shape[1], num_classes)}).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), settings.lr, weight_decay=settings.weight_decay)

    trainer = create_trainer(linear_probe_step, modules, device)
    evaluator = create_evaluator(linear_probe_step, modules, device)
    MetricAverager(prefix="").attach(evaluator)
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
    if bar is not None:
        ProgressBar(("train/loss", "train/accuracy", "val/accuracy"), name=bar, summaries=False).attach(trainer)
    accuracy = trainer.run(batches, max_epochs=settings.epochs).metrics["val/accuracy"]
    logger.close()
    return float(accuracy)
