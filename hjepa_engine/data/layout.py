"""What the folders of an image collection mean: which is the training split, which are classes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hjepa_engine.config.paths import expand
from hjepa_engine.data.scan import ImageFile, Scan, scan_folder
from hjepa_engine.errors import DataError

TRAIN_NAMES = ("train", "training")
#: The first one that is there is the validation split.
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
_MAX_NAMED = 10
#: A folder whose name has one of these words in it may be a split.
_SPLIT_WORD = re.compile(r"(^|[^a-z])(train|training|val|valid|validation|test|testing|dev)([^a-z]|$)", re.IGNORECASE)

Labels = Literal["auto", "folders", "none"]


@dataclass
class Part:
    """The images of one split and their labels."""

    root: Path
    """The folder that paths are relative to."""
    files: list[ImageFile]
    labels: list[int] | None = None
    """Class of each; None: there are no classes."""


@dataclass
class Layout:
    """Both splits of an image folder."""

    train: Part
    val: Part | None
    """None: it is to be split off the training images."""
    classes: tuple[str, ...]
    other_kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_layout(
    root: Path,
    train_dir: str | None,
    val_dir: str | None,
    labels: Labels,
    exclude: Mapping[Path, str] | None = None,
) -> Layout:
    """Find the splits and classes of an image folder.

    Args:
        root: the folder.
        train_dir: where the training images are, in ``root`` or anywhere; None: a folder named train or training, or all.
        val_dir: where the validation images are; None: a folder named val, valid, validation, test or testing.
        labels: see ``data.labels``.
        exclude: see :func:`~hjepa_engine.data.scan.scan_folder`.

    Raises:
        DataError: there are no images, or the folders can be understood in several ways.
        OSError: a folder cannot be read.
    """
    train_dir, val_dir = (name if name is None else expand(name) for name in (train_dir, val_dir))
    for key, name in (("train_dir", train_dir), ("val_dir", val_dir)):
        if name is not None and not (root / name).is_dir():
            raise DataError(f"data.{key} {root / name} is no folder")
    if train_dir is None and val_dir is None:
        scan = scan_folder(root, exclude)
        train, val, beside = _find_splits(root, scan)
        layout = Layout(train, val, (), scan.other_kinds, scan.notes + beside)
    else:
        train, val = Part(root / (train_dir or "."), []), None
        scan = scan_folder(train.root, {**(exclude or {}), **({root / val_dir: ""} if val_dir else {})})
        train.files, layout = scan.files, Layout(train, None, (), scan.other_kinds, scan.notes)
        if val_dir is not None:
            held_out = scan_folder(root / val_dir, exclude)
            if not held_out.files:
                raise DataError(f"data.val_dir {root / val_dir} holds no images{_instead(held_out)}")
            layout.val = Part(root / val_dir, held_out.files)
            layout.other_kinds += held_out.other_kinds
            layout.notes += held_out.notes
    if not train.files:
        raise DataError(
            f"data.{'train_dir' if train_dir else 'data_path'} {train.root} holds no images{_instead(scan)}"
        )
    _label(layout, labels)
    return layout


def describe_kinds(kinds: Counter[str]) -> str:
    """``12 files of other kinds: 8 .txt, 4 .mp4``."""
    number = sum(kinds.values())
    named = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(_MAX_NAMED))
    return f"{number:,} {'file' if number == 1 else 'files'} of other kinds: {named}"


def _instead(scan: Scan) -> str:
    found = [describe_kinds(scan.other_kinds)] if scan.other_kinds else []
    return "".join(f"; {each}" for each in [*found, *scan.notes[:3]])


# Splits


def _find_splits(root: Path, scan: Scan) -> tuple[Part, Part | None, list[str]]:
    """Training and validation files of a folder, and notes of what lies beside them."""
    files = scan.files
    while True:
        by_folder = _by_first(files)
        trains, vals = (_named(by_folder, names) for names in (TRAIN_NAMES, VAL_NAMES))
        if trains or vals or len(by_folder) != 1 or "" in by_folder:
            break
        # A folder that holds nothing but another one, as archives do.
        (name,) = by_folder
        root, files = root / name, by_folder[name]
    for found in (trains, vals):
        same = [name for name in found if name.lower() == found[0].lower()]
        if len(same) > 1 or len(trains) > 1:
            raise DataError(
                f"data.data_path {root} has several folders for one split: {', '.join(found)}; name one with "
                f"data.{'train_dir' if found is trains else 'val_dir'}"
            )
    if not trains:
        if vals:
            raise DataError(
                f"data.data_path {root} has a folder {vals[0]} but none named train or training; name the training "
                "images with data.train_dir (. for all of them) or the validation images with data.val_dir"
            )
        return Part(root, files), None, []
    used = {trains[0], *vals[:1]}
    beside = [
        f"{_count(found)} {f'in {name}' if name else 'beside the folders'} left out: "
        f"{trains[0]}{f' and {vals[0]}' if vals else ''} {'are' if vals else 'is'} used"
        for name, found in by_folder.items()
        if name not in used
    ]
    val = Part(root / vals[0], by_folder[vals[0]]) if vals else None
    return Part(root / trains[0], by_folder[trains[0]]), val, beside


def _by_first(files: Sequence[ImageFile]) -> dict[str, list[ImageFile]]:
    """Files by the first folder of their path, relative to it; "" for those directly in the root."""
    found: dict[str, list[ImageFile]] = defaultdict(list)
    for path, size in files:
        first, slash, rest = path.partition("/")
        found[first if slash else ""].append(ImageFile(rest if slash else path, size))
    return dict(found)


def _named(folders: Iterable[str], names: Sequence[str]) -> list[str]:
    """Folders with one of ``names``, in the order of these."""
    return sorted((name for name in folders if name.lower() in names), key=lambda name: names.index(name.lower()))


def _count(files: Sequence[ImageFile]) -> str:
    return f"{len(files):,} {'image' if len(files) == 1 else 'images'}"


# Classes


def _label(layout: Layout, labels: Labels) -> None:
    train, val = layout.train, layout.val
    by_class, why_none = _classes_of(train.files, labels)
    if by_class is None:
        if labels != "none":
            paths = {file.path.rpartition("/")[0] for file in train.files}
            folders = {folder for path in paths if path for folder in path.split("/")}
            hint = f"; data.labels folders takes the folders in {train.root} as classes" if folders else ""
            layout.notes.append(f"no labels: {why_none}{hint}")
            if named := sorted(folder for folder in folders if _SPLIT_WORD.search(folder)):
                layout.notes.append(
                    f"folders that may be splits ({_few(named)}) are read as any other; "
                    "data.train_dir and data.val_dir name those of splits"
                )
        return
    if loose := [file for file in train.files if "/" not in file.path]:
        names = _few([file.path for file in loose])
        layout.notes.append(f"{_count(loose)} directly in {train.root} left out: {names}")
        train.files = [file for file in train.files if "/" in file.path]
    layout.classes = tuple(sorted(by_class))
    train.labels = _labels_of(train.files, layout.classes)
    if val is None:
        return
    known, extra = [], Counter[str]()
    for file in val.files:
        name = file.path.partition("/")[0] if "/" in file.path else ""
        if name in by_class:
            known.append(file)
        else:
            extra[name] += 1
    if not known:
        if len(extra) > 1:
            raise DataError(
                f"{val.root} has none of the classes of {train.root} ({_few(layout.classes)}), but {_few(extra)}; "
                "data.train_dir and data.val_dir name the folders of the splits, data.labels none does without classes"
            )
        layout.notes.append(f"{_count(val.files)} in {val.root} left out: they have no labels")
        layout.val = None
        return
    layout.val = Part(val.root, known, _labels_of(known, layout.classes))
    for name, number in extra.items():
        why = f"in {name}" if name else "in no folder"
        layout.notes.append(f"{number:,} validation images {why} left out: not a class to train on")
    present = {file.path.partition("/")[0] for file in known}
    if missing := [name for name in layout.classes if name not in present]:
        layout.notes.append(f"no validation images of {len(missing)} of {len(by_class)} classes: {_few(missing)}")


def _classes_of(files: Sequence[ImageFile], labels: Labels) -> tuple[set[str] | None, str]:
    """Names of the classes; None: there are none, and why."""
    by_first = _by_first(files)
    loose = by_first.pop("", [])
    if labels == "none":
        return None, ""
    if labels == "folders":
        if not by_first:
            raise DataError("data.labels must be none or auto where images are in no folders, got folders")
        return set(by_first), ""
    if loose:
        folders = f", beside {len(by_first)} folders" if by_first else ""
        return None, f"{_count(loose)} in no folder of a class ({_few([file.path for file in loose])}{folders})"
    if len(by_first) == 1:
        return None, f"all images are in one folder, {next(iter(by_first))}"
    chains = {name: {file.path.rpartition("/")[0] for file in inside} for name, inside in by_first.items()}
    if nested := next((name for name, found in chains.items() if len(found) > 1), None):
        return None, f"images are in folders of folders ({nested}/{max(chains[nested])})"
    if len({next(iter(found)).count("/") if "" not in found else -1 for found in chains.values()}) > 1:
        return None, "images are in folders of different depth"
    return set(by_first), ""


def _labels_of(files: Sequence[ImageFile], classes: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(classes)}
    return [index[file.path.partition("/")[0]] for file in files]


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
