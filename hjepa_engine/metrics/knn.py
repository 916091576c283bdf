"""Accuracy of weighted nearest neighbors, which need no training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Similarities held at once: validation samples of a chunk x training samples.
_SIMILARITIES = 2**22


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    neighbors: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the validation samples that their nearest training samples classify rightly (arXiv:1805.01978).

    The ``neighbors`` training samples with the largest cosine similarity vote for their class with the weight
    exp(similarity / temperature). Ties go to the first samples and to the class with the smallest number, so that equal
    features give equal accuracies.

    Args:
        features: (n, F), of the training samples, on the device that does the work.
        labels: (n,), class numbers from 0.
        val_features: (m, F).
        val_labels: (m,).
        neighbors: how many vote; all, where there are fewer samples.
        temperature: the smaller it is, the more the very nearest count.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: there are no samples, the shapes do not fit, or ``neighbors`` or ``temperature`` is not positive.
    """
    if neighbors < 1 or not temperature > 0:
        raise ValueError(f"neighbors and temperature must be positive, got {neighbors} and {temperature}")
    for name, (rows, classes) in {"training": (features, labels), "validation": (val_features, val_labels)}.items():
        if rows.ndim != 2 or classes.shape != rows.shape[:1] or not len(rows):
            raise ValueError(
                f"{name} samples must be features (n, F) and labels (n,), n at least 1, "
                f"got {tuple(rows.shape)} and {tuple(classes.shape)}"
            )
    device = features.device
    known, labels = F.normalize(features.float(), dim=1), labels.to(device)
    num_classes = int(max(labels.max(), val_labels.max())) + 1
    right = 0
    chunk = max(1, _SIMILARITIES // len(known))
    for rows, classes in zip(val_features.split(chunk), val_labels.split(chunk), strict=True):
        similarity = F.normalize(rows.to(device).float(), dim=1) @ known.T
        # topk() may take any of equal ones.
        nearest = similarity.sort(dim=1, descending=True, stable=True)
        values, idx = nearest.values[:, :neighbors].double(), nearest.indices[:, :neighbors]
        # Relative to the nearest one, or small temperatures overflow.
        weights = ((values - values[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), num_classes, dtype=weights.dtype, device=device)
        for neighbor in range(idx.shape[1]):  # one by one: adding in parallel would round differently from time to time
            votes.scatter_add_(1, labels[idx[:, neighbor, None]], weights[:, neighbor, None])
        right += int((votes.argmax(dim=1) == classes.to(device)).sum())
    return right / len(val_features)
