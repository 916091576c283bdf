"""Datasets by name: images, labels, number of classes, normalization statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ignite.distributed as idist
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.config.validation import DOWNLOADABLE
from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import generator

#: ``train``: pretraining images, labels unused; ``probe``: labeled images to train a probe on; ``val``: held-out images.
SplitName = Literal["train", "probe", "val"]

IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_STATS = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class ImageDataset(Protocol):
    """A map-style dataset of (PIL image, class index) pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a dataset."""

    images: ImageDataset
    num_classes: int
    stats: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    name_of: Callable[[int], str] = str
    """Name of sample i in messages: its path, if it has one."""


class _ArrayImages:
    """Images in memory."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class _Subset:
    """Some samples of a dataset, like ``torch.utils.data.Subset`` but with the types needed here."""

    def __init__(self, images: ImageDataset, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.indices[index]]


def open_split(config: DataConfig, split: SplitName, seed: int = 0) -> DatasetSplit:
    """Open one split of ``config.dataset``.

    A dataset without a validation split is split at random by ``val_fraction`` and ``seed``.

    Raises:
        DataError: files are missing, or there are no images.
    """
    try:
        # One rank downloads; the others wait for it.
        with idist.one_rank_first(local=True) if config.download else nullcontext():
            return _OPENERS[config.dataset](config, split, seed)
    except (OSError, RuntimeError) as error:  # torchvision's, if files are missing or a download fails
        reason = str(error).splitlines()[0]
        hint = (
            "" if config.download or config.dataset not in DOWNLOADABLE else "; download it with --data.download true"
        )
        raise DataError(f"data.dataset {config.dataset} in {_root(config)}: {reason}{hint}") from error


def _root(config: DataConfig) -> Path:
    return Path(config.data_path or "data")


def _random_split(images: ImageDataset, split: SplitName, fraction: float, seed: int) -> tuple[_Subset, Sequence[int]]:
    order = torch.randperm(len(images), generator=generator(seed, "validation split")).tolist()
    held = max(1, round(fraction * len(images)))
    indices = sorted(order[:held] if split == "val" else order[held:])
    return _Subset(images, indices), indices


def _load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits (UCI): images (n, 8, 8) from 0 to 255, and class indices (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


def _digits(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    subset, _ = _random_split(_ArrayImages(*_load_digits()), split, config.val_fraction, seed)
    return DatasetSplit(subset, 10, ((0.305,), (0.376,)))


class _DigitPages:
    """Pages of ``side`` x ``side`` handwritten digits of one class, each dark on light or light on dark.

    Digits and polarities are drawn from torch's global generator, so :class:`KeyedDataset` draws new pages every epoch.
    The label of page i is i mod 10. A linear classifier cannot read the class from the pixels, because the sign of each
    digit is random; and all that masked and visible digits have in common is their class.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], length: int, side: int = 4) -> None:
        self.by_class = [images[labels == label] for label in range(10)]
        self.length, self.side = length, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label, count = index % 10, self.side**2
        pool = self.by_class[label]
        digits = pool[torch.randint(len(pool), (count,)).numpy()]
        inverted = torch.randint(2, (count, 1, 1)).numpy().astype(bool)
        digits = np.where(inverted, 255 - digits, digits)
        rows = digits.reshape(self.side, self.side, 8, 8).transpose(0, 2, 1, 3)
        return Image.fromarray(rows.reshape(8 * self.side, 8 * self.side)), label


def _digit_pages(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    images, labels = _load_digits()
    held_out = _random_split(_ArrayImages(images, labels), split, config.val_fraction, seed)[1]
    length = _NUM_PAGES[split]
    return DatasetSplit(_DigitPages(images[held_out], labels[held_out], length), 10, ((0.5,), (0.5,)))


def _cifar(cls: type[Any], num_classes: int) -> Callable[[DataConfig, SplitName, int], DatasetSplit]:
    def opener(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
        images = cls(_root(config), train=split != "val", download=config.download)
        return DatasetSplit(images, num_classes, CIFAR_STATS)

    return opener


def _stl10(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    name = {"train": "train+unlabeled", "probe": "train", "val": "test"}[split]
    return DatasetSplit(datasets.STL10(_root(config), name, download=config.download), 10, IMAGENET_STATS)


def _folder(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    """Images as ``<data_path>/train/<class>/*`` and ``<data_path>/{val,test}/<class>/*``, or ``<data_path>/<class>/*``."""
    root = _root(config)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    where = (held_out if held_out and split == "val" else root / "train") if (root / "train").is_dir() else root
    folder = datasets.ImageFolder(str(where))
    if where == held_out and folder.classes != (expected := datasets.folder.find_classes(root / "train")[0]):
        raise DataError(
            f"data.data_path: {where} must have the {len(expected)} class folders of {root / 'train'}, got "
            f"{', '.join(folder.classes[:5])}{', ...' if len(folder.classes) > 5 else ''}"
        )
    images: ImageDataset = folder
    indices: Sequence[int] = range(len(folder))
    if held_out is None:
        images, indices = _random_split(folder, split, config.val_fraction, seed)
    stats = CIFAR_STATS if config.image_size <= 32 else IMAGENET_STATS
    return DatasetSplit(images, len(folder.classes), stats, lambda index: folder.samples[indices[index]][0])


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
    shape = (3, config.image_size, config.image_size)
    offset = {"train": 0, "probe": 0, "val": config.fake_size}[split]
    return DatasetSplit(_Noise(config.fake_size, shape, offset), 10, IMAGENET_STATS)


#: Datasets whose ``probe`` split differs from ``train``.
DATASETS_WITH_PROBE_SPLIT = ("digit_pages", "stl10")
_NUM_PAGES = {"train": 6400, "probe": 2000, "val": 1000}
_OPENERS: dict[str, Callable[[DataConfig, SplitName, int], DatasetSplit]] = {
    "digit_pages": _digit_pages,
    "digits": _digits,
    "cifar10": _cifar(datasets.CIFAR10, 10),
    "cifar100": _cifar(datasets.CIFAR100, 100),
    "stl10": _stl10,
    "imagefolder": _folder,
    "imagenet": _folder,
    "fake": _fake,
}
