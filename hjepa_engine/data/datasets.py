"""Datasets by name: images, labels, number of classes, normalization statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.config.validation import DOWNLOADABLE
from hjepa_engine.data.channel_stats import with_stats
from hjepa_engine.data.contents import Description, describe
from hjepa_engine.data.decoded import DecodedImages
from hjepa_engine.data.digit_maps import DigitMaps
from hjepa_engine.data.folder import CIFAR_STATS, IMAGENET_STATS, data_root, open_folder
from hjepa_engine.data.huggingface import open_huggingface
from hjepa_engine.data.memory import BatchedImages, DigitPages, MemoryImages
from hjepa_engine.data.own import open_own
from hjepa_engine.data.packed import open_packed
from hjepa_engine.data.split import DatasetSplit, SplitName
from hjepa_engine.data.subset import random_split
from hjepa_engine.errors import DataError

#: Classes of the handwritten digits, and of noise.
DIGITS = tuple(map(str, range(10)))


def open_split(
    config: DataConfig, split: SplitName, seed: int = 0, exclude: Mapping[Path, str] | None = None
) -> DatasetSplit:
    """Open one split of the data set that ``config.class_path`` or ``config.dataset`` names.

    A dataset without a validation split is split at random by ``val_fraction`` and ``seed``.

    Args:
        config: the data section.
        split: its name.
        seed: of the split.
        exclude: of an image folder, folders to skip, and why.

    Raises:
        DataError: files are missing, or there are no images.
    """
    try:
        # One rank downloads; the others wait for it.
        with idist.one_rank_first(local=True) if config.download else nullcontext():
            opener = _OPENERS[config.dataset] if config.class_path is None else open_own
            if opener is open_folder:
                opener = partial(open_folder, exclude=exclude)
            opened = opener(config, split, seed)
            train = opened
            if split != "train" and config.measures_stats:
                train = opener(config, "train", seed)
            found = with_stats(config, opened, train, seed)
            if config.in_memory and not isinstance(found.images, BatchedImages):
                found = replace(found, images=DecodedImages(config, found))
            return found
    except (OSError, RuntimeError) as error:  # torchvision's, if files are missing or a download fails
        reason = str(error).splitlines()[0]
        hint = (
            "" if config.download or config.dataset not in DOWNLOADABLE else "; download it with --data.download true"
        )
        if config.class_path is not None:
            raise DataError(f"data.class_path {config.class_path}: {reason}") from error
        raise DataError(f"data.dataset {config.dataset} in {data_root(config)}: {reason}{hint}") from error


def has_probe_split(config: DataConfig) -> bool:
    """Whether the split ``probe`` has other images than ``train``."""
    return config.class_path is None and config.dataset in ("digit_pages", "stl10")


def describe_data(config: DataConfig, seed: int = 0, exclude: Mapping[Path, str] | None = None) -> Description | None:
    """See :func:`~hjepa_engine.data.describe`; None for a dataset that never changes, which is not opened.

    Raises:
        DataError: as :func:`open_split`.
    """
    if config.class_path is None and config.dataset in UNCHANGING_DATASETS:
        return None
    return describe(*(open_split(config, split, seed, exclude) for split in ("train", "val")))


def open_digit_maps(config: DataConfig, split: SplitName, seed: int, grid: tuple[int, int]) -> DatasetSplit:
    """Pages of mixed digits with a class for each patch, whatever data set ``config`` names; its normalization holds.

    Args:
        config: the data section; pages are square, and so must be its images.
        split: its name.
        seed: of the split.
        grid: patches in a column and in a row.
    """
    pages = DigitMaps(*_digits_of(config, split, seed), _NUM_PAGES[split], split, grid)
    opened = DatasetSplit(pages, (*DIGITS, "background"), ((0.5,), (0.5,)))
    return with_stats(config, opened, opened, seed)


def _passed(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    raise DataError(
        "data.dataset passed: the images are passed in Python, to build(config, data=(train, val)); name others with "
        "data.class_path or data.dataset"
    )


def _load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits (UCI): images (n, 8, 8) from 0 to 255, and class indices (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _digits_of(config: DataConfig, split: SplitName, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = _load_digits()
    chosen = random_split(len(images), split, config.val_fraction, seed)
    return images[chosen], labels[chosen]


def _digits(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    images, labels = _digits_of(config, split, seed)
    pixels = torch.from_numpy(images)[:, None]
    return DatasetSplit(MemoryImages(pixels, torch.from_numpy(labels)), DIGITS, ((0.305,), (0.376,)))


def _digit_pages(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    pages = DigitPages(*_digits_of(config, split, seed), length=_NUM_PAGES[split], name=split)
    return DatasetSplit(pages, DIGITS, ((0.5,), (0.5,)))


def _cifar(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.dataset]
    found = cls(data_root(config), train=split != "val", download=config.download)
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return DatasetSplit(MemoryImages(pixels, torch.tensor(found.targets)), tuple(found.classes), CIFAR_STATS)


def _stl10(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    name = {"train": "train+unlabeled", "probe": "train", "val": "test"}[split]
    found = datasets.STL10(data_root(config), name, download=config.download)
    images = MemoryImages(torch.from_numpy(found.data), torch.from_numpy(found.labels).long())
    return DatasetSplit(images, tuple(found.classes), IMAGENET_STATS)


class _Noise:
    """Images of noise, each drawn from a generator of its own.

    The images are those of ``torchvision.datasets.FakeData``, which seeds the global generators for each of them: 0.3 ms.
    """

    def __init__(self, size: int, shape: tuple[int, int, int], offset: int) -> None:
        self.size, self.shape, self.offset = size, shape, offset

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        own = torch.Generator().manual_seed(index + self.offset)
        pixels = torch.randn(self.shape, generator=own).mul(255).byte()
        label = int(torch.randint(10, (1,), generator=own))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy()), label


def _fake(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    shape = (3, *config.size)
    offset = {"train": 0, "probe": 0, "val": config.fake_size}[split]
    return DatasetSplit(_Noise(config.fake_size, shape, offset), DIGITS, IMAGENET_STATS)


#: Datasets whose images follow from their name and the configuration.
UNCHANGING_DATASETS = ("digit_pages", "digits", "cifar10", "cifar100", "stl10", "fake")
_NUM_PAGES = {"train": 6400, "probe": 2000, "val": 1000}
_OPENERS: dict[str, Callable[[DataConfig, SplitName, int], DatasetSplit]] = {
    "digit_pages": _digit_pages,
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "stl10": _stl10,
    "imagefolder": open_folder,
    "imagenet": open_folder,
    "packed": open_packed,
    "huggingface": open_huggingface,
    "fake": _fake,
    "passed": _passed,
}
