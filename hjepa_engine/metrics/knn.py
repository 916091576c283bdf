"""Accuracy of weighted nearest neighbors, which need no training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Similarities held at once: validation samples of a chunk x training samples of a chunk.
_SIMILARITIES = 2**22
#: Numbers of training features held at once.
_KNOWN = 2**27


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
    labels, val_labels = labels.to(device), val_labels.to(device)
    num_classes = int(max(labels.max(), val_labels.max())) + 1
    similarity, idx = _nearest(features, val_features, neighbors)
    # Relative to the nearest one, or small temperatures overflow.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    right, chunk = 0, max(1, _SIMILARITIES // num_classes)
    for weight, numbers, classes in zip(weights.split(chunk), idx.split(chunk), val_labels.split(chunk), strict=True):
        votes = torch.zeros(len(weight), num_classes, dtype=weight.dtype, device=device)
        for neighbor in range(idx.shape[1]):  # one by one: adding in parallel would round differently from time to time
            votes.scatter_add_(1, labels[numbers[:, neighbor, None]], weight[:, neighbor, None])
        right += int((votes.argmax(dim=1) == classes).sum())
    return right / len(val_features)


def _nearest(known: Tensor, asked: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities (m, neighbors), float64, to the most similar of ``known``, and their indices.

    Both are read a part at a time, the known ones once: they may be memory-mapped, and more than fit.
    """
    device, size = known.device, max(1, _KNOWN // known.shape[1])
    values = torch.empty(len(asked), 0, dtype=torch.float64, device=device)
    idx = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    chunk = max(1, _SIMILARITIES // min(size, len(known)))
    for first in range(0, len(known), size):
        part = F.normalize(known[first : first + size].float(), dim=1)
        numbers = torch.arange(first, first + len(part), device=device)
        found = []
        for rows, best, places in zip(asked.split(chunk), values.split(chunk), idx.split(chunk), strict=True):
            similarity = (F.normalize(rows.to(device).float(), dim=1) @ part.T).double()
            # topk() may take any of equal ones. Those found before are of earlier samples, and stand first.
            nearest = torch.cat([best, similarity], dim=1).sort(dim=1, descending=True, stable=True)
            among = torch.cat([places, numbers.expand(len(rows), -1)], dim=1)
            found.append((nearest.values[:, :neighbors], among.gather(1, nearest.indices[:, :neighbors])))
        values, idx = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, idx
