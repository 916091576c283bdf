"""Where the results of an evaluation go: earlier ones of other tasks or other settings are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Keys of a record that its figures follow from, besides the weights; what is not in an older record counts as equal.
_SETTINGS = ("checkpoint", "data", "seeds", "seed", "probe")
#: Settings of the probe that leave the figures as they are.
_WITHOUT_EFFECT = "features_in_memory_gb"


def merge(path: Path, record: Mapping[str, Any], tasks: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The file that a record goes into, and the record with rows of other tasks that the file has already.

    Args:
        path: ``evaluation.json``, or that of other data. With settings that differ from those in it, the record goes into
            ``<path>_<checkpoint>.json``, or ``<path>_<digest of the settings>.json``.
        record: what was found.
        tasks: all there are, in order.

    Returns:
        The path and the record. Rows of weights that have changed since, as those of a run that has gone on, are left out.
    """
    settings = {key: _plain(record[key]) for key in (*_SETTINGS, "transfer_data")}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", record["checkpoint"] or digest)[:100]
    before: dict[str, Any] = {}
    for ending in ("", f"_{name}", f"_{digest}"):
        target = path.with_name(f"{path.stem}{ending}.json")
        before = _read(target)
        if not before or _agree(before, settings):
            break
    if not before or not _agree(before, settings) or before.get("weights") != record["weights"]:
        return target, dict(record)
    done = {_task(row, tasks) for row in record["rows"]}
    rows = [row for row in before["rows"] if _task(row, tasks) not in done]
    rows = sorted([*rows, *record["rows"]], key=lambda row: tasks.index(_task(row, tasks)))
    return target, {**record, "rows": rows, "transfer_data": record["transfer_data"] or before.get("transfer_data")}


def _read(path: Path) -> dict[str, Any]:
    """The record in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["rows"], list) and all(str(row["task"]) for row in found["rows"]) else {}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _agree(before: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether two evaluations are of the same settings; one without a second data set agrees with any."""
    transfers = {before.get("transfer_data"), settings["transfer_data"]} - {None}
    return len(transfers) < 2 and all(_plain(before.get(key, settings[key])) == settings[key] for key in _SETTINGS)


def _plain(value: Any) -> Any:
    """As it is in a file, without what has no effect."""
    value = json.loads(json.dumps(value))
    return {key: held for key, held in value.items() if key != _WITHOUT_EFFECT} if isinstance(value, dict) else value


def _task(row: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """The task of a row; shares of labels are tasks of ``few_label``."""
    return row["task"] if row["task"] in tasks else "few_label"
