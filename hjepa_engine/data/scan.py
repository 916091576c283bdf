"""Walk a folder once: which files are images, and what is left out."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hjepa_engine.data.decode import IMAGE_EXTENSIONS

#: Files and folders that file managers and operating systems leave behind; hidden ones are ignored too.
_IGNORED = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir"}
#: A folder with these files is a run's, whose pictures are no data.
_OF_A_RUN = {"config.yaml", "status.json"}


class ImageFile(NamedTuple):
    """An image: its path relative to the root, with forward slashes, and its size in bytes."""

    path: str
    size: int


@dataclass
class Scan:
    """What a folder holds."""

    files: list[ImageFile] = field(default_factory=list)
    """Images, in the order of their paths' components."""
    other_kinds: Counter[str] = field(default_factory=Counter)
    """Number of files that are no images, by extension."""
    notes: list[str] = field(default_factory=list)
    """What was skipped, by name."""


def scan_folder(root: Path, exclude: Mapping[Path, str] | None = None) -> Scan:
    """Find the images below ``root``.

    Hidden files and folders are no data. A link to a folder is followed, unless that folder is read anyway: a loop does not
    multiply images.

    Args:
        root: the folder.
        exclude: folders to skip, and what a note says of each; empty: nothing.

    Raises:
        OSError: ``root`` cannot be read.
    """
    scan, skipped = Scan(), {os.path.realpath(path): why for path, why in (exclude or {}).items()}
    seen = {os.path.realpath(root)}

    def walk(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        names = {entry.name for entry in found}
        if prefix and names >= _OF_A_RUN:
            scan.notes.append(f"{prefix[:-1]} is left out: it is the folder of a run")
            return
        # Links after real folders: of two ways to a folder, the link is left out.
        linked = []
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in _IGNORED:
                continue
            if entry.is_dir(follow_symlinks=False):
                enter(entry, prefix)
            elif entry.is_dir():
                linked.append(entry)
            else:
                add(entry, prefix)
        for entry in linked:
            enter(entry, prefix)

    def enter(entry: os.DirEntry[str], prefix: str) -> None:
        name, real = f"{prefix}{entry.name}", os.path.realpath(entry.path)
        if real in skipped:
            if skipped[real]:
                scan.notes.append(f"{name} is left out: {skipped[real]}")
        elif real in seen or (entry.is_symlink() and _contains(real, seen)):
            scan.notes.append(f"{name} is a link to a folder that is read already")
        else:
            seen.add(real)
            try:
                walk(entry.path, f"{name}/")
            except OSError as error:
                scan.notes.append(f"{name} cannot be read: {error.strerror}")

    def add(entry: os.DirEntry[str], prefix: str) -> None:
        extension = os.path.splitext(entry.name)[1].lower()
        if extension not in IMAGE_EXTENSIONS:
            scan.other_kinds[extension or "without extension"] += 1
            return
        name = f"{prefix}{entry.name}"
        try:
            found = entry.stat()
        except OSError as error:  # a broken link
            scan.notes.append(f"{name} cannot be read: {error.strerror}")
            return
        if stat.S_ISREG(found.st_mode):
            scan.files.append(ImageFile(name, found.st_size))
        else:  # opening a pipe would wait for its other end
            scan.notes.append(f"{name} is left out: it is a pipe, a socket or a device")

    walk(str(root), "")
    scan.files.sort(key=lambda file: file.path.split("/"))
    return scan


def _contains(folder: str, paths: Iterable[str]) -> bool:
    """Whether one of ``paths`` lies in ``folder``."""
    return any(path.startswith(f"{folder.rstrip('/')}/") for path in paths)
