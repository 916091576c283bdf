"""Which data a run is trained on: its description, and how it differs from an earlier one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hjepa_engine.data.split import DatasetSplit

#: What :func:`describe` returns, as JSON keeps it.
Description = dict[str, Any]


class DataChange(NamedTuple):
    """One way in which data is not what it was."""

    text: str
    is_growth: bool
    """Whether there only is more than before."""

    def __str__(self) -> str:
        return self.text


def describe(train: DatasetSplit, val: DatasetSplit) -> Description:
    """What ``data.json`` and checkpoints say of the two splits; equal files give equal fingerprints, wherever they lie.

    Returns:
        ``train`` and ``val``, each with the number of ``images``, ``classes``, ``folders`` (number of files and fingerprint
        of each), ``left_out``, ``notes`` and a ``fingerprint`` of the first three; ``stats``: ``mean`` and ``std`` of the
        normalization.
    """
    mean, std = train.stats
    return {"train": _describe(train), "val": _describe(val), "stats": {"mean": list(mean), "std": list(std)}}


def _describe(split: DatasetSplit) -> Description:
    contents = split.contents
    what = {
        "images": len(split.images),
        "classes": list(split.classes),
        "folders": {name: [count, digest] for name, (count, digest) in sorted(contents.folders.items())},
    }
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {**what, "left_out": dict(contents.left_out), "notes": list(contents.notes), "fingerprint": digest}


def fingerprint_folders(files: Iterable[tuple[str, int]]) -> dict[str, tuple[int, str]]:
    """Number of files in each top folder, and a fingerprint of their paths and sizes, in any order.

    Args:
        files: path of each, relative and with ``/``, and its bytes. One without a folder is in ``.``.
    """
    folders: dict[str, list[tuple[str, int]]] = {}
    for path, size in files:
        folders.setdefault(path.partition("/")[0] if "/" in path else ".", []).append((path, size))
    found = {}
    for name, members in sorted(folders.items()):
        digest = hashlib.blake2b(digest_size=16)
        for path, size in sorted(members):
            digest.update(f"{path}\0{size}\0".encode("utf-8", "surrogateescape"))
        found[name] = len(members), digest.hexdigest()
    return found


def data_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[DataChange]:
    """How the images of ``now`` differ from those of ``saved``, both from :func:`describe`; empty: not at all."""
    return [change for split in ("train", "val") for change in _changes(split, saved[split], now[split])]


def _changes(split: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[DataChange]:
    if old["fingerprint"] == new["fingerprint"]:
        return []
    before, after = old["folders"], new["folders"]
    found = []
    for folder in sorted(before.keys() | after.keys()):
        name = split if folder == "." else f"{split}/{folder}"
        if folder not in after:
            found.append(DataChange(f"{name} ({_images(before[folder][0])}) is gone", False))
        elif folder not in before:
            found.append(DataChange(f"{name} ({_images(after[folder][0])}) is new", True))
        elif before[folder][0] != after[folder][0]:
            text = f"{name} had {_images(before[folder][0])}, has {after[folder][0]} now"
            found.append(DataChange(text, after[folder][0] > before[folder][0]))
        elif list(before[folder]) != list(after[folder]):
            found.append(DataChange(f"{name}: other files than before", False))
    if not found and old["images"] != new["images"]:
        text = f"{split} had {_images(old['images'])}, has {new['images']} now"
        found.append(DataChange(text, new["images"] > old["images"]))
    return found or [DataChange(f"{split}: the classes are others than before", False)]


def _images(number: int) -> str:
    return f"{number} image{'' if number == 1 else 's'}"
