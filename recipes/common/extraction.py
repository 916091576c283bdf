"""Features of the images of a data set, of an encoder that is frozen, into shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from hjepa_engine import Config, create_evaluator
from hjepa_engine.config.schema import Level, resolve_levels
from hjepa_engine.data import DatasetSplit, ImageLoader, open_split
from hjepa_engine.data.sampler import SampleKey
from hjepa_engine.data.split import SplitName
from hjepa_engine.devices import choose_device
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.evaluator import for_each_output
from hjepa_engine.handlers import DamagedImages
from hjepa_engine.models import ContextEncoder
from hjepa_engine.recipes.common.digest import weights_digest
from hjepa_engine.recipes.common.probe_encoder import open_foreign
from hjepa_engine.recipes.common.probe_run import identity_of, open_encoder
from hjepa_engine.recipes.common.shards import Format, ShardWriter, describe_once, locked
from hjepa_engine.run.folder import own_folders
from hjepa_engine.steps.extraction import extraction_step
from hjepa_engine.types import Batch, Outputs
from hjepa_engine.utils.bars import Bar

#: What can be given with an encoder that is no run's.
_FREE = ("data.", "device", "seed", "logging.progress_bar", "model.num_heads")


@dataclass(frozen=True)
class Request:
    """What to extract, and how it is saved."""

    features: Literal["patches", "mean"] = "mean"
    layers: tuple[int, ...] = ()
    """Blocks, from 1, besides the last norm's output."""
    levels: bool = False
    """Every level of the run's hierarchy too."""
    kind: Format = "safetensors"
    dtype: Literal["float32", "float16"] = "float32"
    shard_images: int = 1024
    splits: tuple[SplitName, ...] = ("train", "val")


class ShardSampler(Sampler[list[SampleKey]]):
    """Batches of the images of some shards, in order, none of which spans two: the same, whichever shards are asked for.

    Args:
        writer: knows which images a shard has.
        numbers: of the shards.
        batch_size: the last batch of a shard may be smaller.
    """

    def __init__(self, writer: ShardWriter, numbers: Sequence[int], batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches = [
            [(0, index) for index in images[first : first + batch_size]]
            for images in map(writer.images_of, numbers)
            for first in range(0, len(images), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.batches)


def open_export(place: str, overrides: Sequence[str]) -> tuple[Config, nn.Module]:
    """An encoder that is no run's, and a configuration of images with its channels and normalization.

    Args:
        place: see :func:`~hjepa_engine.interop.reading.read_source`.
        overrides: command-line overrides; they must name the data.

    Raises:
        CheckpointError: there is none.
        ConfigError: the overrides name what is the encoder's own.
    """
    config, _, encoder, _ = open_foreign(place, overrides, _FREE)
    return config, encoder


def extract(config: Config, encoder: nn.Module, output: Path, request: Request) -> dict[str, int]:
    """Write the features of each split into ``<output>/<split>/shard_*``; those that are there already are kept.

    Returns:
        The number of shards that were written, by split.

    Raises:
        ConfigError: ``output`` holds other features, or the request does not fit the encoder.
        DataError: the data cannot be opened, a shard cannot be written, or another extraction is writing there.
    """
    config = replace(config, data=replace(config.data, in_memory=False))  # each image is read once
    step = _step(config, encoder, request)
    exclude = own_folders(config) if config.run_dir else None
    splits = {name: open_split(config.data, name, config.seed, exclude) for name in request.splits}
    description = _describe(config, encoder, request, splits)
    with locked(output):
        describe_once(output, description)
        return _write_missing(config, encoder, output, request, step, splits)


def _levels(config: Config) -> dict[int, Level]:
    """The levels of features, by number: pixels are in the images."""
    return {number: level for number, level in enumerate(resolve_levels(config)) if level.depth}


def _write_missing(
    config: Config, encoder: nn.Module, output: Path, request: Request, step: Any, splits: dict[SplitName, DatasetSplit]
) -> dict[str, int]:
    device = choose_device(config.device)
    evaluator = create_evaluator(step, nn.ModuleDict({"encoder": encoder.to(device)}), device)
    names = ["last", *(f"block_{number}" for number in request.layers)]
    names += [f"level_{number}" for number in _levels(config)] if request.levels else []
    written: dict[str, int] = {}
    for name, split in splits.items():
        writer = ShardWriter(output / name, request.kind, len(split.images), request.shard_images, names)
        numbers = writer.missing()
        written[name] = len(numbers)
        if not numbers:
            continue
        sampler: Any = ShardSampler(writer, numbers, config.data.batch_size)
        loader = ImageLoader(config.data, split, sampler, config.seed, False, device, keep_workers=False)
        damaged = DamagedImages(config.data.max_damaged, len(split.images), name, "damaged")
        damaged.attach(evaluator)
        total = sum(len(writer.images_of(number)) for number in numbers)
        hidden = None if config.logging.progress_bar else True
        with Bar(lambda: "", total=total, unit=" images", desc=name, disable=hidden) as bar:
            shards = _Shards(writer, split, getattr(torch, request.dtype), numbers, bar)
            for_each_output(evaluator, loader, shards.add)
            shards.finish()
        evaluator.detach(damaged)
    return written


class _Shards:
    """Gathers the rows of one shard at a time, and has it written when the next one begins."""

    def __init__(
        self, writer: ShardWriter, split: DatasetSplit, dtype: torch.dtype, numbers: Sequence[int], bar: Bar
    ) -> None:
        self.writer, self.split, self.dtype, self.waiting, self.bar = writer, split, dtype, list(numbers), bar
        self.rows: list[dict[str, Tensor]] = []
        self.index: list[dict[str, Any]] = []

    def add(self, output: Outputs, batch: Batch) -> None:
        """Add a batch; its images are of one shard."""
        if batch.get("is_filler"):
            return
        indices, labels = batch["index"].tolist(), batch["labels"].tolist()
        while indices[0] not in self.writer.images_of(self.waiting[0]):
            self._write()
        self.rows.append({name: value.to("cpu", self.dtype) for name, value in output.items()})
        names = map(self.split.name_of, indices)
        keys = ("index", "name", "label")
        self.index += [dict(zip(keys, line, strict=True)) for line in zip(indices, names, labels, strict=True)]
        self.bar.update(len(indices))

    def finish(self) -> None:
        """Write what is left; a shard without an image that could be read has no rows."""
        while self.waiting:
            self._write()

    def _write(self) -> None:
        names = self.rows[0] if self.rows else ()
        tensors = {name: torch.cat([row[name] for row in self.rows]) for name in names}
        self.writer.write(self.waiting.pop(0), tensors, self.index)
        self.rows, self.index = [], []


def _step(config: Config, encoder: nn.Module, request: Request) -> Any:
    levels = _levels(config) if request.levels else {}
    if (levels or request.layers) and not isinstance(encoder, ContextEncoder):
        raise ConfigError("--layers and --levels need the encoder of this package, not one of your own")
    depth = getattr(encoder, "depth", 0)
    if wrong := [layer for layer in request.layers if not 1 <= layer <= depth]:
        raise ConfigError(f"--layers must be from 1 to {depth}, the blocks of the encoder, got {wrong[0]}")
    return partial(extraction_step, blocks=request.layers, levels=levels, pooled=request.features == "mean")


def _describe(
    config: Config, encoder: nn.Module, request: Request, splits: dict[SplitName, DatasetSplit]
) -> dict[str, Any]:
    """All that the features follow from: shards of an equal description are parts of the same whole."""
    first = next(iter(splits.values()))
    if any(split.stats != first.stats for split in splits.values()):
        raise DataError("the splits have different normalizations")
    return {
        "encoder": weights_digest(encoder),
        "data": identity_of(config),
        "images": {name: len(split.images) for name, split in splits.items()},
        "contents": {name: dict(split.contents.folders) for name, split in splits.items()},
        "classes": list(first.classes),
        "stats": first.stats,
        "batch_size": config.data.batch_size,
        "seed": config.seed,
        "features": request.features,
        "layers": request.layers,
        "levels": request.levels,
        "format": request.kind,
        "dtype": request.dtype,
        "shard_images": request.shard_images,
    }


__all__ = ["Request", "extract", "open_encoder", "open_export"]
