"""Image folders: their layouts, classes and splits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.contents import fingerprint_folders
from hjepa_engine.data.decode import IMAGE_EXTENSIONS, open_image
from hjepa_engine.data.split import Contents, DatasetSplit, ImageDataset, SplitName, Stats
from hjepa_engine.data.subset import Subset, random_split
from hjepa_engine.errors import DataError

IMAGENET_STATS: Stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_STATS: Stats = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def data_root(config: DataConfig) -> Path:
    """Where the dataset lies."""
    return Path(config.data_path or "data")


def _open(path: str) -> Any:
    return open_image(Path(path), path)


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


def open_folder(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    """Images as ``<data_path>/train/<class>/*`` and ``<data_path>/{val,test}/<class>/*``, or ``<data_path>/<class>/*``."""
    root = data_root(config)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    where = (held_out if held_out and split == "val" else root / "train") if (root / "train").is_dir() else root
    folder = datasets.ImageFolder(str(where), loader=_open, is_valid_file=_is_image)
    if where == held_out and folder.classes != (expected := datasets.folder.find_classes(root / "train")[0]):
        raise DataError(
            f"data.data_path: {where} must have the {len(expected)} class folders of {root / 'train'}, got "
            f"{', '.join(folder.classes[:5])}{', ...' if len(folder.classes) > 5 else ''}"
        )
    images: ImageDataset = folder
    indices: Sequence[int] = range(len(folder))
    if held_out is None:
        indices = random_split(len(folder), split, config.val_fraction, seed)
        images = Subset(folder, indices)
    stats = CIFAR_STATS if max(config.size) <= 32 else IMAGENET_STATS
    paths = [Path(folder.samples[index][0]) for index in indices]
    contents = Contents(
        fingerprint_folders((path.relative_to(where).as_posix(), path.stat().st_size) for path in paths)
    )
    return DatasetSplit(images, tuple(folder.classes), stats, partial(_path_of, paths), contents)


def _path_of(paths: Sequence[Path], index: int) -> str:
    return str(paths[index])
