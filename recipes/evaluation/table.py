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
        f"{record['data']['description']}. Accuracies in percent: mean and standard deviation over {record['seeds']} seeds. "
        "docs/evaluation.md says what each figure is.",
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


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
