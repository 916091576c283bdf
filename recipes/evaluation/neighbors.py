"""Weighted nearest neighbors, which need no training."""

from __future__ import annotations

from hjepa_engine.metrics.knn import knn_accuracy
from hjepa_engine.recipes.evaluation.task import Encoder, Readings, Row, Settings

#: As DINO reports it (arXiv:2104.14294).
NEIGHBORS, TEMPERATURE = 20, 0.07


def knn(encoder: Encoder, readings: Readings, settings: Settings) -> list[Row]:
    """Accuracy of the 20 nearest training images' weighted vote, on the plainest reading; nothing is drawn or chosen."""
    name = readings.names[0]
    known, asked = (part[name].to(settings.device) for part in (readings.train, readings.test))
    labels = readings.train["labels"], readings.test["labels"]
    value = knn_accuracy(known, labels[0], asked, labels[1], NEIGHBORS, TEMPERATURE)
    return [Row("knn", name, encoder.name, "accuracy", [value])]
