"""Loaders: pixels are read in loader processes or taken out of memory, and augmented as whole batches on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import ignite.distributed as idist
import torch
from torch.utils.data import DataLoader

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.augment import EvalTransform, TrainTransform
from hjepa_engine.data.decoded import DecodedImages
from hjepa_engine.data.memory import BatchedImages
from hjepa_engine.data.reading import ImageReader, PixelBatch, as_is
from hjepa_engine.data.sampler import EpochBatchSampler
from hjepa_engine.data.split import DatasetSplit
from hjepa_engine.data.workers import make_worker_init, shutdown_workers
from hjepa_engine.errors import ConfigError, DataError

_CPU = torch.device("cpu")


class ImageLoader:
    """Batches of ``images`` (B, C, H, W), normalized, ``labels`` (B,) and ``damaged``, lines ``name: reason``.

    In an evaluation, ``index`` (B,) says which samples they are, and damaged images are left out; where that would empty a
    batch, another one is split in two. If there are too few images left for that, the last batches are one image again,
    with ``is_filler``: they count in no result. A process that has no share of the last batch has an empty image there, with
    ``is_filler`` too. ``offset`` is the place of a batch's first image in the batch of all processes.

    Args:
        config: the data section.
        split: images and labels.
        sampler: of the keys.
        seed: seed of the run.
        train: augment the images.
        device: where augmentation runs and batches lie.
        keep_workers: loader processes outlive a pass.
    """

    def __init__(
        self,
        config: DataConfig,
        split: DatasetSplit,
        sampler: EpochBatchSampler,
        seed: int,
        train: bool,
        device: torch.device = _CPU,
        keep_workers: bool = True,
    ) -> None:
        if config.on_device and isinstance(split.images, BatchedImages):
            split = replace(split, images=split.images.to(device))
        self.split, self.sampler, self.device = split, sampler, device
        self._augment = TrainTransform(config, split.stats, seed) if train else None
        self._normalize = EvalTransform(config, split.stats)
        self.reader = ImageReader(config, split, seed, self._augment)
        self.processes: DataLoader[PixelBatch] | None = None
        if not self.reader.is_batched:
            self.processes = DataLoader(
                self.reader,
                batch_sampler=sampler,
                num_workers=config.num_workers,
                collate_fn=as_is,
                pin_memory=config.pin_memory and device.type == "cuda",
                persistent_workers=config.num_workers > 0 and keep_workers,
                worker_init_fn=make_worker_init(config.num_workers),
                # Without a generator, every pass would draw from the global one.
                generator=torch.Generator(),
            )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read: Iterable[PixelBatch] = self.processes or map(self.reader.__getitems__, self.sampler)
        batches = map(self._finish, read) if self.device.type == "cpu" else self._prefetch(read)
        return batches if self._augment is not None else _without_empty(batches)

    def prepare(self) -> None:
        """Read now what would be read at the first batch, for good.

        Raises:
            DataError: what ``data.in_memory`` cannot keep.
        """
        if isinstance(self.split.images, DecodedImages):
            self.split.images.decode()

    def close(self) -> None:
        """End idle loader processes."""
        if self.processes is not None:
            shutdown_workers(self.processes)

    def _finish(self, batch: PixelBatch) -> dict[str, Any]:
        pixels = batch.pixels.to(self.device, non_blocking=True)
        if self._augment is not None:
            images = self._augment(pixels, batch.keys, is_cropped=not self.reader.is_batched)
            return {"images": images, "labels": batch.labels, "damaged": batch.damaged}
        index = torch.from_numpy(batch.keys[:, 1])
        found = {"images": self._normalize(pixels), "labels": batch.labels, "index": index, "damaged": batch.damaged}
        if len(index):
            found["offset"] = int(index[0]) % self.sampler.batch_size
        return found

    def _prefetch(self, read: Iterable[PixelBatch]) -> Iterator[dict[str, Any]]:
        """Copy and augment a batch on a stream of its own while the one before is computed with."""
        stream, ready, batches = torch.cuda.Stream(self.device), None, iter(read)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # images that lie there may just have been copied
        while True:
            with torch.cuda.stream(stream):  # taken here, too: images that lie there are gathered on the device
                batch = next(batches, None)
                following = None if batch is None else self._finish(batch)
            if following is None:
                break
            if ready is not None:
                yield ready
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            following["images"].record_stream(current)  # else its memory would be given to the next batch too early
            ready = following
        if ready is not None:
            yield ready


def _without_empty(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """As many batches, none of them empty: engines and other ranks count on their number, so that others are split."""
    held: dict[str, Any] | None = None
    without_share: list[dict[str, Any]] = []
    owed, untold = 0, list[str]()
    for batch in batches:
        if not len(batch["images"]) and not batch["damaged"]:
            without_share.append(_filler(batch["images"], batch["labels"]))
            continue
        if not len(batch["images"]):
            owed, untold = owed + 1, untold + batch["damaged"]
            continue
        if held is not None:
            yield held
        *first, held = _split({**batch, "damaged": untold + batch["damaged"]}, owed + 1)
        owed, untold = owed - len(first), []
        yield from first
    if held is None and without_share and not owed:
        yield from without_share
        return
    if held is None:
        raise DataError(f"no image could be read, the last one: {untold[-1]}")
    parts = _split({**held, "damaged": held["damaged"] + untold}, owed + 1)
    yield from parts
    filler = {
        **parts[-1],
        **{name: value[:1] for name, value in parts[-1].items() if isinstance(value, torch.Tensor)},
        "damaged": [],
        "is_filler": True,
    }
    yield from [filler] * (owed + 1 - len(parts))
    yield from without_share


def _filler(images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """A batch of one empty image, of the shape of those in an empty one."""
    image, label = (each.new_zeros(1, *each.shape[1:]) for each in (images, labels))
    return {"images": image, "labels": label, "damaged": [], "is_filler": True}


def _split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """At most ``parts`` batches; the first one has the damage."""
    number = min(parts, len(batch["images"]))
    tensors = {name: value.tensor_split(number) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    damaged: list[list[str]] = [batch["damaged"], *([] for _ in range(number - 1))]
    found, offset = [], batch.get("offset", 0)
    for part, lines in enumerate(damaged):
        found.append({**{name: cut[part] for name, cut in tensors.items()}, "damaged": lines, "offset": offset})
        offset += len(found[-1]["images"])
    return found


def build_loader(
    config: DataConfig,
    split: DatasetSplit,
    seed: int,
    train: bool,
    device: torch.device = _CPU,
    keep_workers: bool = True,
) -> ImageLoader:
    """Build a loader; its ``sampler`` sets where a pass starts.

    Args:
        config: the data section.
        split: the split to load.
        seed: seed of the run.
        train: augment, shuffle and drop the last partial batch; if False, all samples in order.
        device: where augmentation runs and batches lie.
        keep_workers: loader processes outlive a pass.

    Raises:
        ConfigError: the batch size is not a multiple of the number of processes.
        DataError: the split is smaller than one batch.
    """
    batch_size = config.batch_size
    rank, world = idist.get_rank(), idist.get_world_size()
    if batch_size % world:
        raise ConfigError(f"data.batch_size must be a multiple of the number of processes ({world}), got {batch_size}")
    if (number := len(split.images)) < (batch_size if train else 1):
        what = f"the {'train' if train else 'validation'} split has {number} image{'' if number == 1 else 's'}"
        limit = f"data.batch_size must be at most that, got {batch_size}" if train else "at least one is needed"
        if number < world:
            limit = f"there are {world} processes: each needs one in every batch" if train and world > 1 else limit
        raise DataError(f"{what}, {limit}")
    sampler = EpochBatchSampler(
        len(split.images), batch_size, seed, shuffle=train, drop_last=train, rank=rank, world_size=world
    )
    return ImageLoader(config, split, sampler, seed, train, device, keep_workers)
