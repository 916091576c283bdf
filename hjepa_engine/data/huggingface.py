"""Data sets that the ``datasets`` library of Hugging Face reads, from this machine or the hub."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import getproxies

import numpy as np

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.arrow import ArrowImages, arrow_split, quiet_datasets, table_of
from hjepa_engine.data.split import DatasetSplit, SplitName
from hjepa_engine.errors import ConfigError
from hjepa_engine.utils.rng import in_validation

#: Names of splits, in any case of letters; of the two last kinds, the first one is preferred.
_TRAIN, _VAL, _TEST = ("train", "training"), ("validation", "valid", "val", "dev", "eval"), ("test", "testing")


class _Source(NamedTuple):
    tables: dict[str, Any]
    """A ``datasets.Dataset`` for each split."""
    files: list[tuple[str, int]] | None
    """Name and bytes of each file; None: the tables' own."""


def open_huggingface(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    """A split of the data set in ``config.data_path``, or of the one that ``config.hub_name`` names on the hub.

    Without a validation (or test) split, ``config.val_fraction`` of the rows are held out by their number and ``seed``: a
    row stays where it is when others are added behind it.

    Raises:
        ConfigError: a column is not there, or it is not clear which one is meant.
        DataError: the library is missing, or the data set.
    """
    where = f"data.hub_name {config.hub_name}" if config.hub_name else f"data.data_path {config.data_path or 'data'}"
    with quiet_datasets(where) as library:
        source = _source(config, library)
        train = _named(source.tables, _TRAIN)
        if train is None and len(source.tables) == 1:
            train = next(iter(source.tables))
        if train is None:
            raise ValueError(f"one split must be called train, got {', '.join(source.tables) or 'none'}")
        held_out = _named(source.tables, _VAL) or _named(source.tables, _TEST)
        held_out = None if held_out == train else held_out
        table = source.tables[held_out if held_out and split == "val" else train]
        image, label = _columns(config, library, source.tables[train])
        for name in (image, label):
            if name is not None and name not in table.column_names:
                raise ValueError(f"the split {held_out} has no column {name}: {', '.join(table.column_names)}")
        feature = table.features[image]
        if isinstance(feature, library.Image):
            table = table.cast_column(image, library.Image(decode=False))
        tables = [source.tables[train], *([source.tables[held_out]] if held_out else [])]
        classes, class_of = _classes(library, label, tables)
        indices: Sequence[int] = range(len(table))
        if held_out is None:
            chosen = in_validation(np.arange(len(table), dtype=np.uint64), config.val_fraction, seed)
            indices = np.flatnonzero(chosen == (split == "val")).tolist()
        if not indices:
            raise ValueError(f"there are no images for the {'val' if split == 'val' else 'train'} split")
        kept = table.select_columns([image] if label is None else [image, label]).with_format(None)
        images = ArrowImages(kept, indices, image, getattr(feature, "dtype", None), label, class_of)
        files = source.files
        if files is None:
            paths = [Path(file["filename"]) for file in table.cache_files]
            files = [(path.name, path.stat().st_size) for path in paths]
        return arrow_split(config, images, classes, files)


def _source(config: DataConfig, library: Any) -> _Source:
    if config.hub_name is not None:
        _check_network()
        return _Source(dict(library.load_dataset(config.hub_name)), None)
    folder = Path(config.data_path or "data")
    if not folder.is_dir():
        raise ValueError("there is no such folder; a data set on the hub is named by data.hub_name")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        loaded = library.load_from_disk(str(folder))
        return _Source(dict(loaded) if isinstance(loaded, library.DatasetDict) else {"train": loaded}, None)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if arrow := [path for path in files if path.suffix == ".arrow"]:
        splits: dict[str, list[Path]] = {}
        for path in arrow:
            splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
        return _Source({name: table_of(library, paths) for name, paths in splits.items()}, None)
    listed = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    return _Source(dict(library.load_dataset(str(folder))), listed)


def _check_network() -> None:
    """Without a network, the library would try for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE") or getproxies():
        return  # only its cache is asked, or the proxy knows the way
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ValueError(f"{host} cannot be reached; HF_HUB_OFFLINE=1 uses what was downloaded before") from error


def _split_of(path: Path) -> str:
    """The name of a split in a path; ``train`` where there is none."""
    words = re.split(r"[-_./\\]", str(path.with_suffix("")).lower())
    return next((word for word in words if word in (*_TRAIN, *_VAL, *_TEST)), "train")


def _named(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    return next((name for word in wanted for name in names if name.lower() == word), None)


def _columns(config: DataConfig, library: Any, table: Any) -> tuple[str, str | None]:
    """Names of the columns with images and with labels."""
    features = table.features
    kinds = (library.Image, library.Array2D, library.Array3D)
    images = [name for name, feature in features.items() if isinstance(feature, kinds)]
    images = images or [name for name, feature in features.items() if isinstance(feature, dict) and "bytes" in feature]
    labels = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    image = _column("image_column", config.image_column, images, list(features))
    if image is None:
        raise ConfigError(f"data.image_column must name the column with images, one of {', '.join(features)}, got null")
    feature = features[image]
    is_bytes = "bytes" in feature if isinstance(feature, dict) else getattr(feature, "dtype", "") == "binary"
    if not (is_bytes or isinstance(feature, kinds)):
        raise ConfigError(f"data.image_column must name a column with images, got {image}, which holds {feature}")
    return image, _column("label_column", config.label_column, labels, list(features))


def _column(key: str, given: str | None, found: Sequence[str], names: Sequence[str]) -> str | None:
    if given is not None and given not in names:
        raise ConfigError(f"data.{key} must be one of {', '.join(names)}, got {given}")
    if given is None and len(found) > 1:
        raise ConfigError(f"data.{key} must be given, one of {', '.join(found)}, got null")
    return given or next(iter(found), None)


def _classes(library: Any, label: str | None, tables: Sequence[Any]) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """Names of the classes, and the class index of each label; None: labels are class indices."""
    if label is None:
        return (), None
    features = [table.features.get(label) for table in tables]
    if isinstance(features[0], library.ClassLabel):
        names = tuple(features[0].names)
        if any(not isinstance(other, library.ClassLabel) or tuple(other.names) != names for other in features):
            raise ValueError(f"the classes of the column {label} differ between the splits")
        return names, None
    if (kind := str(getattr(features[0], "dtype", features[0]))) not in ("string", "bool") and "int" not in kind:
        raise ConfigError(
            f"data.label_column must name a column of whole numbers or names, got {label}, which holds {kind}"
        )
    ordered = sorted({value for table in tables for value in table.unique(label)} - {None, -1, ""})
    return tuple(map(str, ordered)), {value: index for index, value in enumerate(ordered)}
