"""Features of all labeled images of a split, in memory or in files."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor

from hjepa_engine.data import FeatureStore
from hjepa_engine.errors import DataError
from hjepa_engine.evaluator import Evaluator, for_each_output
from hjepa_engine.types import Batch, Outputs

logger = logging.getLogger(__name__)


def gather_labeled(evaluator: Evaluator, data: Iterable[Batch], store: FeatureStore, split: str) -> dict[str, Tensor]:
    """All outputs of a step over a split, (samples, ...), and ``labels``; images without a label are left out.

    Args:
        evaluator: runs a step whose outputs are (B, ...) each.
        data: batches with ``labels``, (B,) or, of patches, (B, N).
        store: where the rows go.
        split: its name in messages.

    Raises:
        DataError: no image has a label, or there is no room.
    """
    total = 0

    def read(output: Outputs, batch: Batch) -> None:
        nonlocal total
        if batch.get("is_filler"):
            return
        labels = batch["labels"].cpu()
        has_label = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)
        total += len(labels)
        if has_label.any():
            rows = {name: value.cpu()[has_label] for name, value in output.items()}
            store.add({**rows, "labels": labels[has_label]})

    for_each_output(evaluator, data, read)
    if not store.count:
        raise DataError(f"a linear probe needs labels: none of the {total} {split} images has one")
    if store.count < total:
        left_out = total - store.count
        logger.warning("%d of %d %s images have no label: the probe leaves them out", left_out, total, split)
    return store.tensors()
