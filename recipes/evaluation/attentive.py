"""Attentive probes: one cross-attention block and a linear classifier on all patch tokens."""

from __future__ import annotations

from functools import partial

import torch

from hjepa_engine.recipes.evaluation.sweep import Samples, attentive_heads, choose_and_judge
from hjepa_engine.recipes.evaluation.task import Encoder, Readings, Row, Settings, as_choices

#: Width of an attention head, where it divides the tokens' width.
_HEAD_WIDTH = 16


def attentive(encoder: Encoder, readings: Readings, settings: Settings) -> list[Row]:
    """An attentive probe of the patch tokens, (n, N, D)."""
    train = Samples(readings.train["patches"], readings.train["labels"])
    test = Samples(readings.test["patches"], readings.test["labels"])
    dim = train.features.shape[2]
    num_heads = dim // _HEAD_WIDTH if dim % _HEAD_WIDTH == 0 else 1
    values, chosen = [], []
    for seed in settings.seeds():
        make = partial(attentive_heads, dim, num_heads, seed)
        judged = choose_and_judge(make, settings.attentive_grid, train, test, readings.num_classes, settings, seed)
        values.append(float((judged.predictions == test.labels).to(torch.float64).mean()))
        chosen.append(judged.setting)
    return [Row("attentive", "patches", encoder.name, "accuracy", values, as_choices(chosen))]
