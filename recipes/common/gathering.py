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
from hjepa_engine.utils.distributed import gather_samples

logger = logging.getLogger(__name__)

#: Splits that a probe reads, and their names in messages.
SPLITS: dict[SplitName, str] = {"probe": "probe", "val": "validation"}
#: Rows that are put in order at once.
_ROWS = 1024
#: The two splits, opened.
ProbeData = Mapping[SplitName, DatasetSplit]


def gather_splits(
    config: Config, step: Step, encoder: nn.Module | None, device: torch.device, data: ProbeData
) -> list[dict[str, Tensor]]:
    """:func:`gather_labeled` of each of :data:`SPLITS`, in memory up to ``probe.features_in_memory_gb``. Collective.

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
        loader = build_loader(config.data, source, config.seed, train=False, device=device, keep_workers=False)
        damaged = DamagedImages(config.data.max_damaged, len(source.images), name, "damaged")
        damaged.attach(evaluator)
        store = FeatureStore(len(source.images), 1e9 * config.probe.features_in_memory_gb)
        found.append(gather_labeled(evaluator, loader, store, name))
        evaluator.detach(damaged)
    return found


def gather_labeled(evaluator: Evaluator, data: Iterable[Batch], store: FeatureStore, split: str) -> dict[str, Tensor]:
    """All outputs of a step over a split, (samples, ...), and ``labels``; images without a label are left out. Collective.

    Each rank computes its share of every batch, and all ranks get the rows of all, in the order of the images.

    Args:
        evaluator: runs a step whose outputs are (B, ...) each.
        data: batches with ``index`` (B,) and ``labels``, (B,) or, of patches, (B, N); as many on every rank.
        store: where the rows go.
        split: its name in messages.

    Raises:
        DataError: no image has a label, or there is no room.
    """
    total = 0

    def read(output: Outputs, batch: Batch) -> None:
        nonlocal total
        number = 0 if batch.get("is_filler") else len(batch["labels"])
        rows = {name: value.detach()[:number] for name, value in output.items()}
        rows["labels"] = batch["labels"][:number]
        rows["index"] = batch["index"][:number] if number else rows["labels"].new_zeros(0)
        # Collectives of a GPU need its memory.
        found = {name: gather_samples(value.to(evaluator.device)).cpu() for name, value in rows.items()}
        labels = found["labels"]
        has_label = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)
        total += len(labels)
        if has_label.any():
            store.add({name: value[has_label] for name, value in found.items()})

    for_each_output(evaluator, data, read)
    if not store.count:
        raise DataError(f"a linear probe needs labels: none of the {total} {split} images has one")
    if store.count < total:
        left_out = total - store.count
        logger.warning("%d of %d %s images have no label: the probe leaves them out", left_out, total, split)
    found = store.tensors()
    index = found.pop("index")
    if bool((index.diff() < 0).any()):  # ranks have left out damaged images, and were at different batches
        ordered = FeatureStore(store.count, store.max_bytes)  # which may lie in files, too
        for part in index.argsort().split(_ROWS):
            ordered.add({name: value[part] for name, value in found.items()})
        found = ordered.tensors()
    return found
