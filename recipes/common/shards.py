"""Features in shards: each is a folder that is whole or absent, so that an extraction goes on where it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.utils.files import remove, replace_file, sync_folder, write_file

Format = Literal["safetensors", "npy"]
#: What the shards were asked for, beside them.
DESCRIPTION = "extraction.json"
_LOCK = ".extraction.lock"


class ShardWriter:
    """Writes ``<folder>/shard_<number>/``: features by name, and ``index.jsonl`` with a line for each row.

    Args:
        folder: of one split.
        kind: one file ``features.safetensors``, or a ``<name>.npy`` for each tensor.
        total: number of images.
        size: images of a shard.
        names: of the features.
    """

    def __init__(self, folder: Path, kind: Format, total: int, size: int, names: Sequence[str]) -> None:
        self.folder, self.kind, self.total, self.size, self.names = folder, kind, total, size, set(names)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there; what is left of unfinished or damaged ones is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".shard_*"):
            remove(path)
        numbers = [number for number in range(-(-self.total // self.size)) if not self._is_whole(number)]
        for path in map(self._path, numbers):
            if os.path.lexists(path):
                remove(path)
        return numbers

    def images_of(self, number: int) -> range:
        """Indices of a shard's images."""
        return range(number * self.size, min(self.total, (number + 1) * self.size))

    def write(self, number: int, tensors: Mapping[str, Tensor], index: Sequence[Mapping[str, Any]]) -> None:
        """Write a shard.

        Raises:
            DataError: it cannot be written.
        """
        path = self._path(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.mkdir()
            for name, data in self._files(tensors, index).items():
                _write(temporary / name, data)
            sync_folder(temporary)
            os.rename(temporary, path)
            sync_folder(self.folder)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error

    def _is_whole(self, number: int) -> bool:
        """Whether a shard has all its files, to their ends; the features themselves are not read."""
        path = self._path(number)
        try:
            index = (path / "index.jsonl").read_bytes()
            rows = index.count(b"\n")
            if self.kind == "npy":
                arrays = {file.stem: np.load(file, mmap_mode="r").shape for file in path.glob("*.npy")}
            else:
                with safe_open(path / "features.safetensors", "np") as file:
                    arrays = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):
            return False
        # Of a shard without an image that could be read, there are no features.
        return (index == b"" or index.endswith(b"}\n")) and (
            set(arrays) == (self.names if rows else set()) and all(shape[0] == rows for shape in arrays.values())
        )

    def _path(self, number: int) -> Path:
        return self.folder / f"shard_{number:05d}"

    def _files(self, tensors: Mapping[str, Tensor], index: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        lines = "".join(f"{json.dumps(line)}\n" for line in index)
        files = {"index.jsonl": lines.encode()}
        if self.kind == "safetensors":
            return {"features.safetensors": save(dict(tensors)), **files}
        for name, tensor in tensors.items():
            buffer = io.BytesIO()
            np.save(buffer, tensor.numpy(), allow_pickle=False)
            files[f"{name}.npy"] = buffer.getvalue()
        return files


def _write(path: Path, data: bytes) -> None:
    write_file(path, lambda write: write(data))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other extractions out of ``folder``, which is created; the lock of a dead process is gone.

    Raises:
        DataError: another one is writing there.
        ConfigError: the folder cannot be written to.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be used: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise DataError(f"--output {folder} is in use by {file.read().strip() or 'another process'}") from error
        except OSError as error:
            raise ConfigError(f"--output {folder} cannot be used: {error.strerror}") from error
        # Whoever held it may have removed it between the two calls: then this is no lock.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise DataError(f"--output {folder} was in use until now: run the same command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def describe_once(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what the shards in ``folder`` are of, or see that it is the same as before.

    Raises:
        ConfigError: ``folder`` holds other features, or something else, or cannot be written.
    """
    path = folder / DESCRIPTION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(path.name != _LOCK for path in folder.iterdir()):
                raise ConfigError(f"--output must be a new folder or one that extract.py has begun, got {folder}")
            replace_file(path, json.dumps(description, indent=1) + "\n")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--output {folder} cannot be used: {reason}") from error
    now = json.loads(json.dumps(description))
    if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        raise ConfigError(f"--output {folder} holds other features: {', '.join(differing)} differ; give a new folder")
