"""Linear probes of every reading, on all labels or on few of them."""

from __future__ import annotations

from functools import partial

import torch

from hjepa_engine.data import mean_and_std, sample_share
from hjepa_engine.recipes.evaluation.sweep import Samples, choose_and_judge, linear_heads
from hjepa_engine.recipes.evaluation.task import Encoder, Readings, Row, Settings, as_choices


def linear(encoder: Encoder, readings: Readings, settings: Settings, task: str = "linear") -> list[Row]:
    """A linear probe of each reading, on all labels."""
    return [_probe(encoder, readings, settings, name, task, None) for name in readings.names]


def few_label(encoder: Encoder, readings: Readings, settings: Settings) -> list[Row]:
    """A linear probe of the plainest reading on a share of the labels, at least one of each class; seeds draw them.

    Features are standardized by those of all training images, which takes no labels.
    """
    shares = settings.label_shares
    return [_probe(encoder, readings, settings, readings.names[0], f"{100 * s:g} % of labels", s) for s in shares]


def _probe(
    encoder: Encoder, readings: Readings, settings: Settings, reading: str, task: str, share: float | None
) -> Row:
    train = Samples(readings.train[reading], readings.train["labels"])
    test = Samples(readings.test[reading], readings.test["labels"])
    make = partial(linear_heads, *mean_and_std(train.features))
    values, chosen = [], []
    for seed in settings.seeds():
        part = train if share is None else train.part(sample_share(train.labels, share, seed))
        judged = choose_and_judge(make, settings.linear_grid, part, test, readings.num_classes, settings, seed)
        values.append(float((judged.predictions == test.labels).to(torch.float64).mean()))
        chosen.append(judged.setting)
    return Row(task, reading, encoder.name, "accuracy", values, as_choices(chosen))
