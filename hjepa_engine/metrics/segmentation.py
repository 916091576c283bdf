"""Metrics of classes per patch: a confusion matrix, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each class (row) was taken for each (column): (C, C), int64.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]

    Args:
        predictions: (n,), classes from 0 to C - 1.
        labels: (n,).
        num_classes: C.
    """
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """Share of the samples that were classified rightly, from 0 to 1.

    >>> accuracy(torch.tensor([[1, 1], [0, 2]]))
    0.75
    """
    return float(confusion.diagonal().sum() / confusion.sum())


def mean_iou(confusion: Tensor) -> float:
    """Intersection over union, averaged over the classes that were there or predicted, from 0 to 1.

    >>> mean_iou(torch.tensor([[1, 1, 0], [0, 2, 0], [0, 0, 0]]))  # 1 / 2 and 2 / 3
    0.5833333333333333
    """
    hits = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
    return float((hits / union)[union > 0].mean())
