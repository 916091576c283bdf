"""The folder of a run's checkpoints: which there are, the newest usable one, and how they are removed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hjepa_engine.checkpoint.retention import Record, RetentionPolicy, best, latest
from hjepa_engine.checkpoint.storage import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TEMPORARY,
    Checkpoint,
    CorruptCheckpoint,
    read_manifest,
    read_regular_file,
    read_state,
)
from hjepa_engine.config.parsing import parse_yaml
from hjepa_engine.errors import CheckpointError
from hjepa_engine.utils.files import free_name, remove, replace_file

logger = logging.getLogger(__name__)

INDEX = "index.json"
_PREFIX = "epoch_"  # of every checkpoint's name
_DELETED, _DAMAGED = ".deleted_", "damaged_"


def prune(folder: Path, names: Iterable[str]) -> None:
    """Remove checkpoints; each is renamed first, so that a partly removed one is never taken for a checkpoint."""
    for name in names:
        doomed = folder / (_DELETED + name)
        if os.path.lexists(doomed):
            remove(doomed)
        os.rename(folder / name, doomed)
        remove(doomed)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write or removal has left behind."""
    for name in os.listdir(folder):
        if name.startswith((TEMPORARY, _DELETED, f".{INDEX}.")):
            remove(folder / name)


def write_index(folder: Path, found: Sequence[Record], policy: RetentionPolicy) -> None:
    """Write ``index.json`` (``latest``, ``best`` and all checkpoints) for people and scripts; the engine never reads it."""
    newest, foremost, kept = latest(found), best(found, policy.mode), policy(found)
    index = {
        "latest": newest and newest.name,
        "best": foremost and foremost.name,
        "checkpoints": [{**record._asdict(), "kept": kept.get(record.name, [])} for record in found],
    }
    replace_file(folder / INDEX, json.dumps(index, indent=1) + "\n")


def list_checkpoints(folder: Path, on_problem: Callable[[Path, Exception], object] | None = None) -> list[Checkpoint]:
    """Checkpoints with an intact manifest, newest first; empty if there is no folder.

    Args:
        folder: where the checkpoints are.
        on_problem: called with the path and the error of each checkpoint that is damaged or cannot be read.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(_PREFIX):
            continue
        try:
            found.append(read_manifest(path))
        except (CorruptCheckpoint, OSError) as error:
            if on_problem is not None and os.path.lexists(path):  # else the run, still training, has just removed it
                on_problem(path, error)
    return sorted(found, key=lambda checkpoint: (checkpoint.record.order, checkpoint.saved_at), reverse=True)


def load_newest(folder: Path, mapped: bool = False) -> tuple[Checkpoint, Any] | None:
    """Load the newest usable checkpoint; None if there never was one.

    A damaged checkpoint is named in a warning and renamed to ``damaged_...``.

    Args:
        folder: of the checkpoints.
        mapped: as of :func:`~hjepa_engine.checkpoint.serialization.read_tensors`.

    Raises:
        CheckpointError: there are checkpoints, but none of them is usable.
    """
    problems: list[str] = []

    def report(path: Path, error: Exception) -> None:
        problems.append(_warn(path, error))
        if isinstance(error, CorruptCheckpoint):
            with contextlib.suppress(OSError):  # a read-only folder: it keeps its name, and the next start warns again
                os.rename(path, free_name(path.with_name(_DAMAGED + path.name)))

    for checkpoint in list_checkpoints(folder, report):
        try:
            return checkpoint, read_state(checkpoint, mapped)
        except (CorruptCheckpoint, OSError) as error:
            report(checkpoint.path, error)
    if problems or any(folder.glob(f"{_DAMAGED}*")):
        raise CheckpointError(
            f"no checkpoint in {folder} is usable{': ' + problems[0] if problems else ''}; "
            "--checkpoint.resume never sets them aside and starts anew"
        )
    return None


def find_checkpoint(path: Path, which: str, *, allow_damaged: bool = True) -> Checkpoint:
    """Find one checkpoint of a run.

    Args:
        path: the run folder, or the folder of its checkpoints.
        which: ``latest``, ``best`` (by the run's own metric), or a checkpoint's name.
        allow_damaged: whether another one may be taken, with a warning, where damaged ones may be what is asked for.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    for folder in checkpoint_folders(path):
        found, damaged = _intact_and_damaged(folder)
        if which in damaged:
            raise CheckpointError(f"the checkpoint {which} in {folder} is {_problem(damaged[which])}")
        if not found and damaged:
            name = max(damaged)
            raise CheckpointError(f"no checkpoint in {folder} is usable: {name} is {_problem(damaged[name])}")
        if not found:
            continue
        chosen = _choose(folder, found, which)
        # Names sort by epoch and step; of a damaged one the score is not known.
        doubtful = [name for name in sorted(damaged) if which == "best" or (which == "latest" and name > chosen)]
        if doubtful:
            what = "; ".join(f"{name} is {_problem(damaged[name])}" for name in doubtful)
            if not allow_damaged:
                raise CheckpointError(f"in {folder}, {what}")
            logger.warning("checkpoint %s; %s is used instead", what, chosen)
        return found[chosen]
    raise CheckpointError(f"{path} holds no checkpoint")


def _intact_and_damaged(folder: Path) -> tuple[dict[str, Checkpoint], dict[str, Exception]]:
    damaged: dict[str, Exception] = {}
    found = list_checkpoints(folder, lambda path, error: damaged.setdefault(path.name, error))
    return {checkpoint.record.name: checkpoint for checkpoint in found}, damaged


def _choose(folder: Path, found: dict[str, Checkpoint], which: str) -> str:
    """The name of the checkpoint that ``which`` asks for, of those in ``found``, newest first."""
    records = [checkpoint.record for checkpoint in found.values()]
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
    return chosen


def checkpoint_folders(path: Path) -> list[Path]:
    """Folders in which the checkpoints of ``path`` (a run folder, or a folder of checkpoints) may be.

    One elsewhere counts only where the run's configuration names it: a copied run folder has its own.
    """
    named = None
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError):
        config = parse_yaml(read_regular_file(path / "config.yaml", MAX_MANIFEST_BYTES).decode())
        if directory := config["checkpoint"]["checkpoint_dir"]:
            named = Path(directory)
            if (run := config.get("run_dir")) and named.is_relative_to(run):
                named = path / named.relative_to(run)
    return list(dict.fromkeys(folder for folder in (named, path / "checkpoints", path) if folder is not None))


def load_one(path: Path, mapped: bool = False) -> tuple[Checkpoint, Any]:
    """Load the checkpoint in ``path``, or the newest one if ``path`` is a run folder or a folder of checkpoints.

    Args:
        path: where it is.
        mapped: as of :func:`~hjepa_engine.checkpoint.serialization.read_tensors`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        if (path / MANIFEST).exists():
            checkpoint = read_manifest(path)
            return checkpoint, read_state(checkpoint, mapped)
        for folder in checkpoint_folders(path):
            for checkpoint in list_checkpoints(folder, _warn):
                return checkpoint, read_state(checkpoint, mapped)
    except (CorruptCheckpoint, OSError) as error:
        raise CheckpointError(f"the checkpoint in {path} is not usable: {error}") from error
    raise CheckpointError(f"{path} holds no checkpoint")


def _warn(path: Path, error: Exception) -> str:
    what = f"{path.name} is {_problem(error)}"
    logger.warning("checkpoint %s", what)
    return what


def _problem(error: Exception) -> str:
    return f"{'damaged' if isinstance(error, CorruptCheckpoint) else 'not readable'}: {error}"
