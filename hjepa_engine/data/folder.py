"""Image folders as datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.contents import fingerprint_folders
from hjepa_engine.data.decode import open_image
from hjepa_engine.data.layout import Layout, Part, read_layout
from hjepa_engine.data.split import UNLABELED, Contents, DatasetSplit, SplitName, Stats
from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import in_validation, path_hash

IMAGENET_STATS: Stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_STATS: Stats = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def data_root(config: DataConfig) -> Path:
    """Where the dataset lies."""
    return Path(config.data_path or "data")


def folder_stats(config: DataConfig) -> Stats:
    """Normalization of images that have no numbers of their own: CIFAR's up to 32 pixels, else ImageNet's."""
    return CIFAR_STATS if max(config.size) <= 32 else IMAGENET_STATS


class PathList:
    """Paths in one array of bytes: lists of strings would be copied, page by page, into every loader process."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.content = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class FolderImages:
    """Images in files, opened when they are asked for.

    Args:
        root: the folder.
        paths: of the images in it.
        labels: class of each, (n,).
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.root, self.paths, self.labels = str(root), PathList(paths), labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.name(index)
        return open_image(Path(path), path), int(self.labels[index])

    def name(self, index: int) -> str:
        """Path of an image."""
        return f"{self.root}/{self.paths[index]}"


def open_folder(
    config: DataConfig, split: SplitName, seed: int, exclude: Mapping[Path, str] | None = None
) -> DatasetSplit:
    """A split of an image folder; ``probe`` is the training split.

    Without a validation split of its own, images are held out by their paths: others that come later do not move them.

    Args:
        config: the data section.
        split: its name.
        seed: of the split.
        exclude: folders to skip, and why.

    Raises:
        DataError: there are no images, or the folders can be understood in several ways.
        OSError: a folder cannot be read.
    """
    root = data_root(config)
    if not root.is_dir():
        what = "is a file, it must be a folder" if root.exists() else "does not exist"
        raise DataError(f"data.data_path {root} {what}")
    layout = read_layout(root, config.train_dir, config.val_dir, config.labels, exclude)
    held_out = None if layout.val is not None else _held_out(root, layout.train, config.val_fraction, seed)
    return _split(config, layout, split, held_out)


def _held_out(root: Path, part: Part, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are for validation: at least one, and not all."""
    if len(part.files) < 2:
        raise DataError(f"data.data_path {root} must hold at least 2 images, to train on and to validate, got 1")
    prefix = part.root.relative_to(root).as_posix() if part.root.is_relative_to(root) else "."
    prefix = "" if prefix == "." else f"{prefix}/"
    hashes = np.array([path_hash(f"{prefix}{file.path}") for file in part.files], np.uint64)
    return held_out_of(hashes, fraction, seed)


def held_out_of(hashes: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of at least two images are for validation, by the hashes of their paths: at least one, and not all."""
    held = in_validation(hashes, fraction, seed)
    if not held.any():
        held[hashes.argmin()] = True
    elif held.all():
        held[hashes.argmax()] = False
    return held


def _split(config: DataConfig, layout: Layout, name: SplitName, held_out: NDArray[np.bool_] | None) -> DatasetSplit:
    part = layout.val if name == "val" and layout.val is not None else layout.train
    chosen: Sequence[int] = range(len(part.files))
    if held_out is not None:
        chosen = np.flatnonzero(held_out if name == "val" else ~held_out).tolist()
    files = [part.files[index] for index in chosen]
    labels = [UNLABELED] * len(files) if part.labels is None else [part.labels[index] for index in chosen]
    images = FolderImages(part.root, [file.path for file in files], np.array(labels, np.int64))
    notes = list(layout.notes)
    if held_out is not None:
        notes.append(f"validation images are {100 * config.val_fraction:g} % of all, chosen by their paths")
    contents = Contents(fingerprint_folders(files), dict(layout.other_kinds), tuple(notes))
    return DatasetSplit(images, layout.classes, folder_stats(config), images.name, contents)
