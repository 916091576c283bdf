"""Packed images: an image folder as few memory-mapped files, written by recipes/pack.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.arrow import ArrowImages, arrow_split, quiet_datasets, table_of
from hjepa_engine.data.folder import data_root, held_out_of
from hjepa_engine.data.split import DatasetSplit, SplitName

#: Describes a packed folder; it has ``splits`` once all of it is there.
PACK = "pack.json"


def open_packed(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    """A split of a folder that ``recipes/pack.py`` has made; images, order and splits are those of the image folder.

    Raises:
        DataError: it is not there, not whole, or not as it was packed.
    """
    folder = data_root(config)
    with quiet_datasets(f"data.data_path {folder}") as library:
        pack = read_pack(folder)
        has_val = bool(pack["splits"]["val"])
        shards = pack["splits"]["val" if has_val and split == "val" else "train"]
        for name, size in shards:
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, had {size} when it was packed")
        number = library.Value("int64")
        features = library.Features(image=library.Image(decode=False), label=number, path_hash=number)
        table = table_of(library, [folder / name for name, _ in shards], features)
        indices = np.arange(len(table))
        if not has_val:
            hashes = table.data.column("path_hash").to_numpy().view(np.uint64)
            indices = np.flatnonzero(held_out_of(hashes, config.val_fraction, seed) == (split == "val"))
        return arrow_split(config, ArrowImages(table, indices), tuple(pack["classes"]), map(tuple, shards))


def read_pack(folder: Path) -> dict[str, Any]:
    """The description of a packed folder.

    Raises:
        ValueError: there is none, or packing has not come to its end.
    """
    try:
        pack: dict[str, Any] = json.loads((folder / PACK).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no packed images: there is no {PACK}") from error
    if "splits" not in pack:
        raise ValueError("packing was not finished; the same command of recipes/pack.py goes on with it")
    return pack
