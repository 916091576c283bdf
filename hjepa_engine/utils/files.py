"""Files that are whole or absent, folders, free names."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old or the new content, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        write_file(temporary, lambda write: write(text.encode()))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, fill: Callable[[Callable[[Any], None]], None]) -> tuple[int, str]:
    """Write a new file and sync it; its size and SHA-256."""
    size, digest = 0, hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:

        def write(data: Any) -> None:
            nonlocal size
            digest.update(data)
            size += len(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]

        fill(write)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot, and do it by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder and what is in it; of a link, the link."""
    if path.is_symlink() or not path.is_dir():
        return os.unlink(path)
    for name in os.listdir(path):
        remove(path / name)
    return os.rmdir(path)


def free_name(path: Path) -> Path:
    """``path``, or with a number appended where that exists."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free
