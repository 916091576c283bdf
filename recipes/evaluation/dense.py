"""Dense probes: the class of each patch, from its token alone, on pages of mixed digits."""

from __future__ import annotations

from functools import partial

from hjepa_engine.data import mean_and_std
from hjepa_engine.metrics.segmentation import accuracy, confusion_matrix, mean_iou
from hjepa_engine.recipes.evaluation.sweep import Samples, choose_and_judge, linear_heads
from hjepa_engine.recipes.evaluation.task import Encoder, Readings, Row, Settings, as_choices


def dense(encoder: Encoder, readings: Readings, settings: Settings) -> list[Row]:
    """A linear head on each patch token, (n, N, D), for labels (n, N); of raw pixels, on the patch's own."""
    patches = readings.train["patches"].shape[1]
    train, test = (
        Samples(part["patches"].flatten(0, 1), part["labels"].flatten()) for part in (readings.train, readings.test)
    )
    make, classes = partial(linear_heads, *mean_and_std(train.features)), readings.num_classes
    accuracies, overlaps, chosen = [], [], []
    for seed in settings.seeds():
        judged = choose_and_judge(make, settings.linear_grid, train, test, classes, settings, seed, patches)
        confusion = confusion_matrix(judged.predictions, test.labels, classes)
        accuracies.append(accuracy(confusion))
        overlaps.append(mean_iou(confusion))
        chosen.append(judged.setting)
    choices = as_choices(chosen)
    return [
        Row("dense", "patches", encoder.name, "patch accuracy", accuracies, choices),
        Row("dense", "patches", encoder.name, "mean IoU", overlaps, choices),
    ]
