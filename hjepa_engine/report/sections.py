"""The parts of a report that are no charts, as data: tables, pictures, comparisons."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from hjepa_engine.checkpoint.retention import Mode, Record, best
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.config.changes import config_changes, plain_config
from hjepa_engine.config.schema import Config
from hjepa_engine.metrics.names import PROBE, TITLES, better
from hjepa_engine.report.charts import Chart
from hjepa_engine.report.evaluation import PROBED, evaluation_table
from hjepa_engine.report.numbers import Table, number, when
from hjepa_engine.report.panels import COMPARED, ONLINE_PROBES, comparison_charts, spread
from hjepa_engine.report.reading import Picture, RunData, read_picture
from hjepa_engine.report.verdict import Verdict

_MAX_PICTURE = 4 * 2**20  # bytes
_MAX_VALUE = 200  # characters; all of it is in config.yaml below


#: What is compared and, of each run, the value and the best value, which may be empty.
ComparedRows = list[tuple[str, list[tuple[str, str]]]]


class ProbeSummary(NamedTuple):
    """A probe during the run: accuracies, each with its optimizer step."""

    title: str
    first: tuple[float, int]
    best: tuple[float, int]
    newest: tuple[float, int]
    checkpoint: str | None
    """The checkpoint of the best; None where it was not kept."""


class Embedded(NamedTuple):
    """A picture as it is in the page."""

    title: str
    source: str


class Pictures(NamedTuple):
    """The pictures of one name."""

    title: str
    newest: Embedded
    earlier: list[Embedded]


class Comparison(NamedTuple):
    """Runs side by side, this report's first."""

    charts: list[Chart]
    runs: list[str]
    rows: ComparedRows
    unread: list[str]
    """Runs whose configuration cannot be read; no keys are compared then."""
    differing: list[tuple[str, list[str]]]
    """Keys that differ and, of each run, the value."""


def final_probe_rows(run: RunData) -> list[tuple[str, str, str]]:
    """What each final linear probe was trained on, its images, and its accuracy."""
    rows = []
    for probe in run.probes:
        names = [name for name in PROBED if name in probe.accuracy]
        names += [name for name in probe.accuracy if name not in PROBED]
        rows += [(PROBED.get(name, name), probe.data, f"{100 * probe.accuracy[name]:.1f} %") for name in names]
    return rows


def evaluations(run: RunData) -> list[tuple[str, Table]]:
    """Each evaluation: its images, in words, and its table."""
    found = []
    for record in run.evaluations:
        data = record.get("data")
        images = str(data.get("description", "")) if isinstance(data, dict) else ""
        parts = [images, "one seed" if record.get("seeds") == 1 else f"{record.get('seeds')} seeds"]
        parts += [f"transfer: {record['transfer_data']}"] if record.get("transfer_data") else []
        parts += [f"checkpoint {record['checkpoint']}"] if record.get("checkpoint") else []
        parts += [str(record["note"])] if record.get("note") else []
        found.append(("; ".join(parts), evaluation_table(record)))
    return found


def online_probes(run: RunData) -> list[ProbeSummary]:
    """First, best and newest accuracy of each probe that was measured during the run."""
    found = []
    for name, title in ONLINE_PROBES.items():
        steps, values = run.series[name].finite() if name in run.series else ([], [])
        if values:
            top = max(range(len(values)), key=values.__getitem__)
            kept = [each.record.name for each in run.checkpoints if each.record.step == steps[top]]
            first, best_one, newest = ((values[index], steps[index]) for index in (0, top, -1))
            found.append(ProbeSummary(title, first, best_one, newest, kept[0] if kept else None))
    return found


def pictures(run: RunData) -> list[Pictures]:
    """The newest picture of each name, and up to three earlier ones."""
    found = []
    for name, group in groupby(run.pictures, key=lambda picture: picture.name):
        if drawn := [each for picture in spread(group, 4) if (each := _embedded(picture))]:
            found.append(Pictures(name.replace("_", " "), drawn[-1], drawn[:-1]))
    return found


def _embedded(picture: Picture) -> Embedded | None:
    data = read_picture(picture.path)
    if data is None or len(data) > _MAX_PICTURE:
        return None
    title = f"{picture.name.replace('_', ' ')}, step {picture.step:,}"
    return Embedded(title, f"data:image/png;base64,{base64.b64encode(data).decode()}")


def checkpoint_table(checkpoints: Sequence[Checkpoint], kept: Mapping[str, Sequence[str]]) -> Table:
    """Checkpoints of one run, in their order.

    Args:
        checkpoints: at least one.
        kept: why each is kept, by its name.
    """
    return Table(
        ("checkpoint", "step", "epoch", "saved", "MB", checkpoints[0].metric, "saved for", "kept as"),
        [
            (
                checkpoint.record.name,
                f"{checkpoint.record.step:,}",
                f"{checkpoint.record.epoch}",
                when(checkpoint.saved_at),
                f"{checkpoint.size / 1e6:.1f}",
                number(checkpoint.record.score),
                ", ".join(checkpoint.reasons),
                ", ".join(kept.get(checkpoint.record.name, ["nothing: removed by the next save"])),
            )
            for checkpoint in checkpoints
        ],
    )


def best_checkpoint(run: RunData) -> str:
    """One sentence on which checkpoint is the best."""
    mode, found = _mode(run), best_record(run)
    return f"Best by {run.checkpoints[0].metric} ({mode}): {found.name}." if found else "None has a score yet."


def best_record(run: RunData) -> Record | None:
    """The best checkpoint; None where none has a score."""
    return best([checkpoint.record for checkpoint in run.checkpoints], _mode(run))


def _mode(run: RunData) -> Mode:
    return run.config.checkpoint.mode if run.config else "min"


def changed_keys(config: Config) -> dict[str, tuple[Any, Any]]:
    """Default and value of each key that differs from its default."""
    return {key: (old, new) for key, old, new in config_changes(plain_config(Config()), config)}


def format_value(value: Any) -> str:
    """A value as it would be given on the command line, cut where it is long."""
    if isinstance(value, list):
        value = [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]} ..."


def environment_rows(run: RunData) -> list[tuple[str, str]]:
    """Versions, device and command line of the run."""
    rows = []
    for name, value in run.environment.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            text = (" " if name == "command" else ", ").join(map(str, value)) or "none"
        else:
            text = "none" if value is None else str(value)
        rows.append((name.replace("_", " "), text))
    return rows


def compare(runs: Mapping[str, RunData], verdicts: Mapping[str, Verdict]) -> Comparison:
    """Runs side by side: curves, newest and best values, configurations.

    Args:
        runs: by name, the report's own first.
        verdicts: on each.
    """
    rows: ComparedRows = [
        ("State", [(run.state, "") for run in runs.values()]),
        ("Step", [(f"{run.step:,}", "") for run in runs.values()]),
        ("Verdict", [(verdicts[name].level, "") for name in runs]),
    ]
    for metric in COMPARED:
        cells = [_newest_and_best(run, metric) for run in runs.values()]
        if any(value != "-" for value, _ in cells):
            rows.append((TITLES[metric], cells))
    for name, title in PROBED.items():
        if any(name in run.probe for run in runs.values()):
            accuracies = [run.probe.get(name) for run in runs.values()]
            rows.append(
                (f"Linear probe, {title}", [("-" if a is None else f"{100 * a:.1f} %", "") for a in accuracies])
            )
    unread = [name for name, run in runs.items() if run.config is None]
    charts = [drawn for drawn in comparison_charts(runs) if drawn]
    return Comparison(charts, list(runs), rows, unread, [] if unread else _differing_keys(runs))


def _newest_and_best(run: RunData, metric: str) -> tuple[str, str]:
    values = run.series[metric].finite().values if metric in run.series else []
    if not values:
        return "-", ""
    if better(metric) == "min":
        return number(values[-1]), number(min(values))
    return number(values[-1]), number(max(values)) if metric.startswith(PROBE) else ""


def _differing_keys(runs: Mapping[str, RunData]) -> list[tuple[str, list[str]]]:
    changed = [changed_keys(run.config) for run in runs.values() if run.config is not None]
    defaults = {key: old for keys in changed for key, (old, _) in keys.items()}
    rows = []
    for key, default in defaults.items():
        values = [keys[key][1] if key in keys else default for keys in changed]
        if any(value != values[0] for value in values) and key != "run_dir":
            rows.append((key, [format_value(value) for value in values]))
    return rows
