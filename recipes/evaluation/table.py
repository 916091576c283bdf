"""The table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hjepa_engine.report.evaluation import evaluation_table


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table of ``evaluation.json``, with what it is of."""
    table = evaluation_table(record)
    lines = [
        f"# Evaluation of {record['run']}",
        "",
        f"{record['data']['description']}. Accuracies in percent, {_spread(record)}. docs/evaluation.md says what each "
        "figure is.",
        "",
        *_rows([table.headings, ("---",) * len(table.headings), *table.rows]),
        "",
    ]
    if record["transfer_data"]:
        lines += [f"Transfer: {record['transfer_data']}.", ""]
    if record["checkpoint"]:
        lines += [f"Checkpoint: {record['checkpoint']}.", ""]
    if record["note"]:
        lines += [f"Note: {record['note']}.", ""]
    return "\n".join(lines)


def _spread(record: Mapping[str, Any]) -> str:
    seeds, passes = record["seeds"], record["probe"]["epochs"]
    spread = "of one seed" if seeds == 1 else f"mean and standard deviation over {seeds} seeds"
    return f"{spread}; heads are trained for {passes} pass{'' if passes == 1 else 'es'} (probe.epochs)"


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
