"""Features of all labeled images of a split, in memory or in files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hjepa_engine import Config, create_evaluator
from hjepa_engine.data import DatasetSplit, FeatureStore, build_loader
from hjepa_engine.data.split import SplitName
from hjepa_engine.errors import DataError
from hjepa_engine.evaluator import Evaluator, for_each_output
from hjepa_engine.handlers import DamagedImages
from hjepa_engine.types import Batch, Outputs, Step

logger = logging.getLogger(__name__)

#: Splits that a probe reads, and their names in messages.
SPLITS: dict[SplitName, str] = {"probe": "probe", "val": "validation"}
#: The two splits, opened.
ProbeData = Mapping[SplitName, DatasetSplit]


def gather_splits(
    config: Config, step: Step, encoder: nn.Module | None, device: torch.device, data: ProbeData
) -> list[dict[str, Tensor]]:
    """:func:`gather_labeled` of each of :data:`SPLITS`, in memory up to ``probe.features_in_memory_gb``.

    Args:
        config: configuration of the run.
        step: from images to outputs (B, ...), with ``encoder`` among its modules where there is one.
        encoder: it is moved to ``device``; None: the step reads pixels.
        device: where the step runs.
        data: the splits.
    """
    modules = nn.ModuleDict({} if encoder is None else {"encoder": encoder.to(device)})
    evaluator, found = create_evaluator(step, modules, device), []
    for split, name in SPLITS.items():
        source = data[split]
        loader = build_loader(config.data, source, config.seed, train=False, device=device, replicate=True)
        damaged = DamagedImages(config.data.max_damaged, len(source.images), name, "damaged")
        damaged.attach(evaluator)
        store = FeatureStore(len(source.images), 1e9 * config.probe.features_in_memory_gb)
        found.append(gather_labeled(evaluator, loader, store, name))
        evaluator.detach(damaged)
    return found


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
