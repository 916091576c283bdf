"""Data loading: keyed augmentation, replacement of unreadable images, loaders and their workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.decode import DamagedImageError, damage
from hjepa_engine.data.memory import BatchedImages
from hjepa_engine.data.pixels import image_size, to_pixels
from hjepa_engine.data.sampler import EpochBatchSampler, SampleKey
from hjepa_engine.data.split import DatasetSplit
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.utils.process import before_exit
from hjepa_engine.utils.rng import derive_seed, seed_everything

_MAX_ATTEMPTS = 8


class KeyedDataset(Dataset[dict[str, Any]]):
    """Samples by (epoch, index), with augmentation that depends only on (seed, epoch, index).

    An image that cannot be read is replaced by another one, chosen by the same key, and listed in ``damaged``.

    Args:
        split: images and labels.
        transform: from a PIL image to a tensor (C, H, W); may use any global random generator.
        seed: seed of the run.
    """

    def __init__(self, split: DatasetSplit, transform: Any, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, sample: SampleKey) -> dict[str, Any]:
        """Return ``image`` (C, H, W), ``label``, and ``damaged``: names and errors of images that could not be read."""
        epoch, wanted = sample
        damaged: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            index = wanted if attempt == 0 else derive_seed(self.seed, "substitute", epoch, wanted, attempt) % len(self)
            seed_everything(self.seed, "sample", epoch, wanted)
            images = self.split.images
            try:
                with damage():
                    if isinstance(images, BatchedImages):
                        pixels, labels = images.gather(np.array([[epoch, index]]), self.seed)
                        image, label = pixels[0], int(labels[0])
                    else:
                        image, label = images[index]
                return {"image": self.transform(image), "label": label, "damaged": damaged}
            except DamagedImageError as error:
                damaged.append(f"{self.split.name_of(index)}: {error}")
        raise DataError(f"{_MAX_ATTEMPTS} images in a row could not be read, the last one: {damaged[-1]}")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate to ``images`` (B, C, H, W), ``labels`` (B,) and ``damaged``, one list."""
    return {
        "images": default_collate([sample["image"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "damaged": [name for sample in samples for name in sample["damaged"]],
    }


def train_transform(config: DataConfig, split: DatasetSplit) -> v2.Compose:
    """Training augmentation: the random affine map, resized crop, flip and color jitter that ``config`` enables."""
    size = config.size
    steps: list[Any] = []
    if config.random_affine:
        steps += [v2.Resize(size, antialias=True), v2.RandomAffine(**_affine(config.random_affine))]
    if {*config.crop_scale, *config.crop_ratio} == {1.0}:
        steps.append(v2.Resize(size, antialias=True))  # no crop; free if the size is right already
    else:
        steps.append(v2.RandomResizedCrop(size, scale=tuple(config.crop_scale), ratio=tuple(config.crop_ratio)))
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.color_jitter:
        strength = config.color_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4 if config.channels == 3 else 0))
    return v2.Compose([_Pixels(config), *steps, *_normalize(split)])


def eval_transform(config: DataConfig, split: DatasetSplit) -> v2.Compose:
    """Evaluation transform: resize the shorter side, center-crop, normalize."""
    return v2.Compose([resize_and_crop(config), *_normalize(split)])


def resize_and_crop(config: DataConfig) -> v2.Compose:
    """Evaluation transform without normalization: resize the shorter side, center-crop; uint8."""
    size = config.size
    return v2.Compose([_Pixels(config), _Cover(size), v2.CenterCrop(size)])


def _affine(strength: float) -> dict[str, Any]:
    return {
        "degrees": 30 * strength,
        "translate": (0.2 * strength, 0.2 * strength),
        "scale": (1 - 0.2 * strength, 1 + 0.2 * strength),
        "shear": 15 * strength,
    }


def _normalize(split: DatasetSplit) -> list[Any]:
    mean, std = split.stats
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


class _Cover(torch.nn.Module):
    """Resize images so that they just cover ``size`` (H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        (height, width), (rows, columns) = image.shape[-2:], self.size
        by_height = rows * width >= columns * height
        size = (rows, int(rows * width / height)) if by_height else (int(columns * height / width), columns)
        return v2.functional.resize(image, list(size), antialias=True)


class _Pixels(torch.nn.Module):
    """The pixels of any image, in its own size."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.channels, self.max_pixels = config.channels, config.max_pixels

    def forward(self, image: Any) -> Tensor:
        size = image_size(image, self.channels, self.max_pixels)
        return to_pixels(image, self.channels, size, max_pixels=self.max_pixels)


def build_loader(
    config: DataConfig, split: DatasetSplit, seed: int, train: bool, replicate: bool = False
) -> tuple[DataLoader[dict[str, Any]], EpochBatchSampler]:
    """Build a loader and its batch sampler, which sets where a pass starts.

    Args:
        config: the data section.
        split: the split to load.
        seed: seed of the run.
        train: augment, shuffle and drop the last partial batch; if False, all samples in order.
        replicate: every rank reads all samples instead of its slice of each batch.

    Raises:
        ConfigError: the batch size is not a multiple of the number of processes.
        DataError: the split is smaller than one batch.
    """
    batch_size = config.batch_size
    rank, world = (0, 1) if replicate else (idist.get_rank(), idist.get_world_size())
    if batch_size % world:
        raise ConfigError(f"data.batch_size must be a multiple of the number of processes ({world}), got {batch_size}")
    if len(split.images) < (batch_size if train else world):
        raise DataError(f"data.batch_size must be at most the number of images ({len(split.images)}), got {batch_size}")
    sampler = EpochBatchSampler(
        len(split.images), batch_size, seed, shuffle=train, drop_last=train, rank=rank, world_size=world
    )
    transform = train_transform(config, split) if train else eval_transform(config, split)
    loader = DataLoader(
        KeyedDataset(split, transform, seed),
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        persistent_workers=config.num_workers > 0 and not replicate,  # replicated data is read once
        worker_init_fn=make_worker_init(config.num_workers),
        # Without a generator, every pass would draw from the global one.
        generator=torch.Generator(),
    )
    return loader, sampler


def shutdown_workers(*loaders: DataLoader[Any]) -> None:
    """Shut down idle loader workers now: left to the garbage collector, torch takes up to 5 s for each."""
    for loader in loaders:
        loader._iterator = None  # no public way ends the workers of a loader that lives on


def translate_worker_error(error: BaseException) -> DataError | None:
    """Turn the error that a killed loader worker causes in the main process into a DataError; None for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        what = " ".join(text.split()).rstrip(".")
    elif isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError)):
        what = f"the connection to a DataLoader worker was lost: {text or type(error).__name__}"
    else:
        return None
    hint = "usually memory or /dev/shm ran out: lower data.num_workers, then run the same command again to resume"
    return DataError(f"{what}; {hint}")


def make_worker_init(num_workers: int) -> Callable[[int], None]:
    """Make the ``worker_init_fn`` of a loader: one torch thread, and signals that only the main process handles."""
    is_exiting = multiprocessing.RawValue("b", 0)
    if num_workers:
        before_exit(partial(_announce_exit, is_exiting, os.getpid()))
    return partial(_init_worker, is_exiting)


def _announce_exit(is_exiting: Any, process: int) -> None:
    if os.getpid() == process:  # workers inherit this hook and exit too
        is_exiting.value = 1


def _init_worker(is_exiting: Any, worker: int) -> None:
    """Use one thread, and ignore signals meant for the main process but sent to its whole process group."""
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(is_exiting, os.getppid()), daemon=True).start()


def _exit_with_parent(is_exiting: Any, parent: int) -> None:
    """Exit when the parent sends SIGTERM, is exiting or is gone; ignore SIGTERM from anybody else.

    A pending signal hides later ones of its kind, so the parent's SIGTERM may get lost. That is why its exit is checked
    too: it would wait for this worker forever.
    """
    while os.getppid() == parent and not is_exiting.value:
        taken = signal.sigtimedwait({signal.SIGTERM}, 0.2)
        if taken is not None and taken.si_pid == parent:
            break
    os._exit(0)
