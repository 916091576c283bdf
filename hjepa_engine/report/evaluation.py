"""The table of ``evaluation.json``, for its own file and the report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hjepa_engine.report.numbers import Table

#: What is compared, as it is printed.
PROBED = {"trained": "trained encoder", "random": "random encoder", "pixels": "raw pixels"}


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """A line for each task, reading and metric; mean and standard deviation over seeds, in percent, of each encoder.

    Pixels have no readings: their figures stand in the first line of a task. Rows that are none are left out.
    """
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else ():
        with suppress(TypeError, KeyError, ValueError):
            task, metric = str(row["task"]), str(row["metric"])
            key = next((key for key in lines if key[0] == task and key[2] == metric), None)
            if row["encoder"] != "pixels" or key is None:
                key = task, str(row["reading"]), metric
            lines.setdefault(key, {})[str(row["encoder"])] = _with_spread(row["mean"], row["std"])
    return Table(
        ("task", "reading", "metric", *PROBED.values()),
        [(*key, *(figures.get(name, "") for name in PROBED)) for key, figures in lines.items()],
    )


def _with_spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"
