"""Checkpoints on disk: whole or absent, verified when read, found by looking at the folder.

A checkpoint is a folder with ``state.safetensors`` and ``manifest.json``; docs/checkpoints.md describes both. It is written
under a temporary name, synced, and renamed into place, so that a folder with its final name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hjepa_engine.checkpoint.retention import Record, RetentionPolicy, best, latest
from hjepa_engine.checkpoint.serialization import file_digest, read_tensors, unflatten, write_tensors
from hjepa_engine.errors import CheckpointError
from hjepa_engine.utils.files import free_name, remove, replace_file, sync_folder, write_file

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, MANIFEST, INDEX = "state.safetensors", "manifest.json", "index.json"
MAX_MANIFEST_BYTES = 16 * 2**20
_PREFIX = "epoch_"  # of every checkpoint's name
_TEMPORARY, _DELETED, _DAMAGED = ".writing_", ".deleted_", "damaged_"


class CorruptCheckpoint(ValueError):
    """A checkpoint is not what was written: the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself, read without its tensors."""

    path: Path
    record: Record
    metric: str
    """Name of the metric behind ``record.score``."""
    metrics: dict[str, float]
    """All metrics when it was saved."""
    reasons: list[str]
    """Why it was saved: ``epoch``, ``steps``, ``minutes``, ``end``, ``interrupted``, ``rollback``."""
    saved_at: float
    """Seconds since 1970."""
    size: int
    """Bytes of the tensors."""
    digest: str
    """SHA-256 of the state file."""
    config: dict[str, Any]
    """The run's resolved configuration; empty where the run had none."""
    environment: dict[str, Any]
    """Versions, device, threads and processes that wrote it."""


def write_checkpoint(
    folder: Path, name: str, structure: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> str:
    """Commit a checkpoint to ``folder``; the name it got (another than ``name`` if that was taken).

    Args:
        folder: of the checkpoints; must exist.
        name: of the new one; others than ``epoch_...`` are not found again.
        structure: from :func:`~hjepa_engine.checkpoint.serialization.flatten`.
        tensors: likewise, on the CPU.
        description: the other fields of the manifest.

    Raises:
        OSError: it could not be written; nothing has changed then.
    """
    taken = set(os.listdir(folder))
    name = next(
        free for number in range(len(taken) + 1) if (free := f"{name}_{number}" if number else name) not in taken
    )
    temporary = folder / (_TEMPORARY + name)
    if temporary.name in taken:
        remove(temporary)
    os.mkdir(temporary)
    try:
        size, digest = write_file(temporary / STATE, lambda write: write_tensors(write, structure, tensors))
        files = {STATE: {"bytes": size, "sha256": digest}}
        # As it will be read: JSON knows no keys but texts, and the digest sorts them.
        manifest = json.loads(json.dumps({"format": FORMAT, "files": files, **description}))
        text = json.dumps({**manifest, "digest": _digest_of(manifest)}, indent=1)
        write_file(temporary / MANIFEST, lambda write: write(text.encode()))
        sync_folder(temporary)
        os.rename(temporary, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):  # what is left is swept up at the next start; the first error counts
            remove(temporary)
        raise
    sync_folder(folder)
    return name


def prune(folder: Path, names: Iterable[str]) -> None:
    """Remove checkpoints; each loses its name first, so that half of one is never taken for a checkpoint."""
    for name in names:
        doomed = folder / (_DELETED + name)
        if os.path.lexists(doomed):
            remove(doomed)
        os.rename(folder / name, doomed)
        remove(doomed)


def sweep(folder: Path) -> None:
    """Remove what interrupted writing and pruning have left behind."""
    for name in os.listdir(folder):
        if name.startswith((_TEMPORARY, _DELETED, f".{INDEX}.")):
            remove(folder / name)


def write_index(folder: Path, found: Sequence[Record], policy: RetentionPolicy) -> None:
    """Write ``index.json``: ``latest``, ``best`` and all checkpoints, for people and scripts; nothing here reads it."""
    newest, foremost, kept = latest(found), best(found, policy.mode), policy(found)
    index = {
        "latest": newest and newest.name,
        "best": foremost and foremost.name,
        "checkpoints": [{**record._asdict(), "kept": kept.get(record.name, [])} for record in found],
    }
    replace_file(folder / INDEX, json.dumps(index, indent=1) + "\n")


def read_manifest(path: Path) -> Checkpoint:
    """What the checkpoint in ``path`` says of itself; its tensors are not looked at.

    Raises:
        CorruptCheckpoint: the manifest is not what was written, or the state file has another size.
        CheckpointError: a newer version of this program wrote it.
        OSError: it cannot be read.
    """
    if os.path.islink(path):
        raise CorruptCheckpoint(f"{path.name} is a link")
    text = _read_plain_file(path / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(text)
        digest = manifest.pop("digest")
        intact = digest == _digest_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{MANIFEST} is none") from error
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
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise (
            error if isinstance(error, CorruptCheckpoint) else CorruptCheckpoint(f"{MANIFEST} lacks a field: {error}")
        ) from error
    if (size := _plain_file(path / STATE).st_size) != checkpoint.size:
        raise CorruptCheckpoint(f"{STATE} has {size} bytes instead of {checkpoint.size}")
    return checkpoint


def read_state(checkpoint: Checkpoint) -> Any:
    """The state in a checkpoint, on the CPU, after its checksum has been verified. No code in it can run.

    Raises:
        CorruptCheckpoint: the file is not what was written.
        OSError: it cannot be read.
    """
    path = checkpoint.path / STATE
    if file_digest(path) != checkpoint.digest:
        raise CorruptCheckpoint(f"{STATE} does not match its sha256")
    try:
        return unflatten(*read_tensors(path))
    except ValueError as error:
        raise CorruptCheckpoint(f"{STATE} cannot be decoded: {error}") from error


def list_checkpoints(folder: Path, on_problem: Callable[[Path, Exception], object] | None = None) -> list[Checkpoint]:
    """Checkpoints with an intact manifest, newest first; empty where there is no folder.

    Args:
        folder: of the checkpoints.
        on_problem: told of each one that is damaged or cannot be read.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(_PREFIX):
            continue
        try:
            found.append(read_manifest(path))
        except (CorruptCheckpoint, OSError) as error:
            if on_problem is not None and os.path.lexists(path):  # else it was pruned by a run that is going on
                on_problem(path, error)
    return sorted(found, key=lambda checkpoint: (checkpoint.record.order, checkpoint.saved_at), reverse=True)


def load_newest(folder: Path) -> tuple[Checkpoint, Any] | None:
    """The newest usable checkpoint and its state; None if there never was one.

    A damaged one is named in a warning and set aside as ``damaged_...``.

    Raises:
        CheckpointError: there are checkpoints, but none is usable.
    """
    problems: list[str] = []

    def report(path: Path, error: Exception) -> None:
        problems.append(_warn(path, error))
        if isinstance(error, CorruptCheckpoint):
            with contextlib.suppress(OSError):  # a read-only folder: it stays where it is, and is named again next time
                os.rename(path, free_name(path.with_name(_DAMAGED + path.name)))

    for checkpoint in list_checkpoints(folder, report):
        try:
            return checkpoint, read_state(checkpoint)
        except (CorruptCheckpoint, OSError) as error:
            report(checkpoint.path, error)
    if problems or any(folder.glob(f"{_DAMAGED}*")):
        raise CheckpointError(
            f"no checkpoint in {folder} is usable{': ' + problems[0] if problems else ''}; "
            "--checkpoint.resume never sets them aside and starts anew"
        )
    return None


def find_checkpoint(path: Path, which: str) -> Checkpoint:
    """A checkpoint of a run, or of a folder of checkpoints.

    Args:
        path: the folder.
        which: ``latest``, ``best`` (by the run's own metric), or a name.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    for folder in checkpoint_folders(path):
        found = {checkpoint.record.name: checkpoint for checkpoint in list_checkpoints(folder)}
        records = [checkpoint.record for checkpoint in found.values()]
        if not found:
            continue
        chosen = which if which in found else None
        if which == "latest":
            chosen = records[0].name
        elif which == "best":
            options = next(iter(found.values())).config.get("checkpoint")
            larger_wins = isinstance(options, dict) and options.get("mode") == "max"
            foremost = best(records, "max" if larger_wins else "min")
            chosen = foremost and foremost.name
        if chosen is None:
            known = f"{', '.join(found)}, latest" if which != "best" else "none has a score"
            raise CheckpointError(f"{folder} has no checkpoint {which!r}: {known}")
        return found[chosen]
    raise CheckpointError(f"{path} holds no checkpoint")


def checkpoint_folders(path: Path) -> list[Path]:
    """Where the checkpoints of a run, or in a folder of checkpoints, may lie."""
    named = None
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        status = json.loads(_read_plain_file(path / "status.json", MAX_MANIFEST_BYTES))
        named = Path(status["checkpoint"]).parent if status.get("checkpoint") else None
    return [folder for folder in (path / "checkpoints", named, path) if folder is not None]


def load_one(path: Path) -> tuple[Checkpoint, Any]:
    """The checkpoint in ``path``, or the newest one of the run or folder of checkpoints in ``path``, and its state.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        if (path / MANIFEST).exists():
            checkpoint = read_manifest(path)
            return checkpoint, read_state(checkpoint)
        for folder in checkpoint_folders(path):
            for checkpoint in list_checkpoints(folder, _warn):
                return checkpoint, read_state(checkpoint)
    except (CorruptCheckpoint, OSError) as error:
        raise CheckpointError(f"the checkpoint in {path} is not usable: {error}") from error
    raise CheckpointError(f"{path} holds no checkpoint")


def _warn(path: Path, error: Exception) -> str:
    what = f"{path.name} {'is damaged' if isinstance(error, CorruptCheckpoint) else 'cannot be read'}: {error}"
    logger.warning("checkpoint %s", what)
    return what


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain_file(path: Path) -> os.stat_result:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpoint(f"{path.name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpoint(f"{path.name} is no plain file")
    return status


def _read_plain_file(path: Path, limit: int) -> bytes:
    if (size := _plain_file(path).st_size) > limit:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes")
    return path.read_bytes()
