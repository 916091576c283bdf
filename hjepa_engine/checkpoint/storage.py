"""A checkpoint on disk: whole or absent, verified when read.

A checkpoint is a folder with ``state.safetensors`` and ``manifest.json``; docs/checkpoints.md describes both. It is written
under a temporary name, synced, and renamed into place, so that a folder with its final name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hjepa_engine.checkpoint.retention import Record
from hjepa_engine.checkpoint.serialization import file_digest, read_tensors, unflatten, write_tensors
from hjepa_engine.errors import CheckpointError
from hjepa_engine.utils.files import remove, sync_folder, write_file

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
#: Starts the name of a checkpoint that is being written.
TEMPORARY = ".writing_"


class CorruptCheckpoint(ValueError):
    """A checkpoint differs from what was written; the message says how."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's manifest, read without its tensors."""

    path: Path
    record: Record
    metric: str
    """Name of the metric that ``record.score`` is a value of."""
    metrics: dict[str, float]
    """All metrics at the time of saving."""
    reasons: list[str]
    """Why it was saved: ``epoch``, ``steps``, ``minutes``, ``end``, ``interrupted``, or what ``Checkpointer.save`` was
    told."""
    saved_at: float
    """Seconds since 1970."""
    size: int
    """Bytes of the tensors."""
    digest: str
    """SHA-256 of the state file."""
    config: dict[str, Any]
    """The run's resolved configuration; empty if the run had none."""
    environment: dict[str, Any]
    """Versions, device, number of threads and processes of the run that wrote it."""
    data: dict[str, Any]
    """Description of its data; empty if the run had none."""


def write_checkpoint(
    folder: Path, name: str, structure: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> str:
    """Write a checkpoint; return its name (a number is appended to ``name`` if it is taken).

    Args:
        folder: where the run's checkpoints are; must exist.
        name: of the new checkpoint; only names that start with ``epoch_`` are found again.
        structure: from :func:`~hjepa_engine.checkpoint.serialization.flatten`.
        tensors: from the same function, on the CPU.
        description: the other fields of the manifest.

    Raises:
        OSError: it could not be written; the folder is unchanged.
    """
    taken = set(os.listdir(folder))
    name = next(
        free for number in range(len(taken) + 1) if (free := f"{name}_{number}" if number else name) not in taken
    )
    temporary = folder / (TEMPORARY + name)
    if temporary.name in taken:
        remove(temporary)
    os.mkdir(temporary)
    try:
        size, digest = write_file(temporary / STATE, lambda write: write_tensors(write, structure, tensors))
        files = {STATE: {"bytes": size, "sha256": digest}}
        # As it will be read: JSON turns keys into strings, and the digest sorts them.
        manifest = json.loads(json.dumps({"format": FORMAT, "files": files, **description}))
        text = json.dumps({**manifest, "digest": _digest_of(manifest)}, indent=1)
        write_file(temporary / MANIFEST, lambda write: write(text.encode()))
        sync_folder(temporary)
        os.rename(temporary, folder / name)
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # what is left is removed at the next start; the first error is the one to raise
            remove(temporary)
        raise
    sync_folder(folder)
    return name


def read_manifest(path: Path) -> Checkpoint:
    """Read the manifest of the checkpoint in ``path``; its tensors are not read.

    Raises:
        CorruptCheckpoint: the manifest differs from what was written, or the state file has another size.
        CheckpointError: a newer version of this program wrote it.
        OSError: it cannot be read.
    """
    if os.path.islink(path):
        raise CorruptCheckpoint(f"{path.name} is a symbolic link")
    text = read_regular_file(path / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(text)
        digest = manifest.pop("digest")
        intact = digest == _digest_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{MANIFEST} is not a manifest") from error
    if not intact:
        raise CorruptCheckpoint(f"{MANIFEST} does not match its digest")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r:.50}; this version reads format {FORMAT}")
    try:
        (name,) = manifest["files"]
        if name != STATE:
            raise CorruptCheckpoint(f"{MANIFEST} names a file {name!r}")
        file, score = manifest["files"][STATE], manifest["score"]
        checkpoint = Checkpoint(
            path,
            Record(
                path.name,
                int(manifest["iteration"]),
                int(manifest["step"]),
                int(manifest["epoch"]),
                bool(manifest["ends_epoch"]),
                None if score is None else float(score),
            ),
            str(manifest["metric"]),
            {str(name): float(value) for name, value in manifest["metrics"].items()},
            [str(reason) for reason in manifest["reasons"]],
            float(manifest["saved_at"]),
            int(file["bytes"]),
            str(file["sha256"]),
            dict(manifest["config"]),
            dict(manifest["environment"]),
            dict(manifest.get("data", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise (
            error if isinstance(error, CorruptCheckpoint) else CorruptCheckpoint(f"{MANIFEST} lacks a field: {error}")
        ) from error
    if (size := _regular_file(path / STATE).st_size) != checkpoint.size:
        raise CorruptCheckpoint(f"{STATE} has {size} bytes instead of {checkpoint.size}")
    return checkpoint


def read_state(checkpoint: Checkpoint, mapped: bool = False) -> Any:
    """Load the state of a checkpoint on the CPU after verifying its checksum. Loading runs no code from the file.

    Args:
        checkpoint: which.
        mapped: as of :func:`~hjepa_engine.checkpoint.serialization.read_tensors`.

    Raises:
        CorruptCheckpoint: the file differs from what was written.
        OSError: it cannot be read.
    """
    path = checkpoint.path / STATE
    if file_digest(path) != checkpoint.digest:
        raise CorruptCheckpoint(f"{STATE} does not match its sha256")
    try:
        return unflatten(*read_tensors(path, mapped))
    except ValueError as error:
        raise CorruptCheckpoint(f"{STATE} cannot be decoded: {error}") from error


def _regular_file(path: Path) -> os.stat_result:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpoint(f"{path.name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpoint(f"{path.name} is not a regular file")
    return status


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a file of at most ``limit`` bytes that is no link, pipe or device.

    Raises:
        CorruptCheckpoint: it is missing, larger, or not a regular file.
    """
    if (size := _regular_file(path).st_size) > limit:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes")
    return path.read_bytes()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
