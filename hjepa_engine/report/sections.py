"""The parts of a report that are no charts: words, tables, pictures."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from hjepa_engine.checkpoint.retention import best
from hjepa_engine.config.changes import config_changes, plain_config
from hjepa_engine.config.schema import Config
from hjepa_engine.report.markup import Markup, element, folded, join, number, table
from hjepa_engine.report.panels import COMPARED, comparison_charts, spread
from hjepa_engine.report.reading import Picture, RunData, read_picture
from hjepa_engine.report.verdict import RULES, Verdict, title_of

_LARGEST_PICTURE = 4 * 2**20
_LONGEST_VALUE = 200  # characters; all of it is in config.yaml below
_PROBED = {"trained": "trained target encoder", "random": "random encoder", "pixels": "raw pixels"}


def when(seconds: float) -> str:
    """A time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def verdict_section(verdict: Verdict) -> Markup:
    """The answer, the reasons, and the figures behind it."""
    rows = [
        (
            title_of(found.name),
            _at(found.first, found.first_step),
            _at(found.lowest, found.lowest_step),
            _at(found.highest, found.highest_step),
            _at(found.now, found.now_step),
        )
        for found in verdict.evidence
    ]
    answer = element("p", element("span", verdict.level, class_="badge"), verdict.headline, class_="answer")
    parts = [answer, *(element("p", reason) for reason in verdict.reasons)]
    if rows:
        parts.append(table(("", "first", "lowest", "highest", "newest"), rows))
    if verdict.level not in ("healthy", "cannot tell"):
        parts.append(element("p", "What usually helps is in docs/health.md.", class_="note"))
    parts.append(folded("How this is judged", element("p", RULES)))
    return element("div", *parts, class_=f"verdict {verdict.level.replace(' ', '-')}")


def _at(value: float, step: int) -> Markup:
    return join([number(value), element("small", f" at {step:,}")])


def probe_section(run: RunData) -> list[Markup]:
    """Accuracies of the probe at the end, and of the online probes at their first, best and last reading."""
    parts = []
    if run.probe:
        names = [name for name in _PROBED if name in run.probe] + [name for name in run.probe if name not in _PROBED]
        rows = [(_PROBED.get(name, name), f"{100 * run.probe[name]:.1f} %") for name in names]
        parts.append(table(("linear probe of", "accuracy"), rows))
    online: list[tuple[str, ...]] = []
    for name, title in (("probe/knn", "kNN"), ("probe/online_linear", "linear, online")):
        steps, values = run.series[name].finite() if name in run.series else ([], [])
        if values:
            top = max(range(len(values)), key=values.__getitem__)
            kept = [each.record.name for each in run.checkpoints if each.record.step == steps[top]]
            readings = [_at(values[place], steps[place]) for place in (0, top, -1)]
            online.append((title, *readings, kept[0] if kept else "not kept"))
    if online:
        parts.append(table(("online probe", "first", "best", "newest", "checkpoint of the best"), online, texts=(0, 4)))
    if any(row[-1] == "not kept" for row in online):
        parts.append(_hint("Keep the best by a probe with checkpoint.metric: probe/knn and checkpoint.mode: max."))
    return parts or [_hint("No probe has run.")]


def picture_section(run: RunData) -> list[Markup]:
    """The newest picture of each name, and a few earlier ones folded."""
    parts = []
    for name, group in groupby(run.pictures, key=lambda picture: picture.name):
        drawn = [found for picture in spread(list(group), 4) if (found := _embedded(picture))]
        if drawn:
            parts.append(drawn[-1])
        if len(drawn) > 1:
            parts.append(folded(f"{name.replace('_', ' ')}: earlier", *drawn[:-1]))
    return parts or [_hint("No pictures yet.")]


def _embedded(picture: Picture) -> Markup | None:
    data = read_picture(picture.path)
    if data is None or len(data) > _LARGEST_PICTURE:
        return None
    title = f"{picture.name.replace('_', ' ')}, step {picture.step:,}"
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return element("figure", element("figcaption", title), element("img", src=source, alt=title), class_="picture")


def checkpoint_section(run: RunData) -> list[Markup]:
    """What is saved, and why it is kept."""
    if not run.checkpoints:
        return [_hint("No checkpoints.")]
    rows = []
    for checkpoint in run.checkpoints:
        record = checkpoint.record
        rows.append(
            (
                record.name,
                f"{record.step:,}",
                str(record.epoch),
                when(checkpoint.saved_at),
                f"{checkpoint.size / 1e6:.1f}",
                number(record.score),
                ", ".join(checkpoint.reasons),
                ", ".join(run.kept.get(record.name, ["nothing: goes with the next save"])),
            )
        )
    headings = ("checkpoint", "step", "epoch", "saved", "MB", run.checkpoints[0].metric, "saved for", "kept as")
    mode = run.config.checkpoint.mode if run.config else "min"
    foremost = best([checkpoint.record for checkpoint in run.checkpoints], mode)
    said = f"Best by {run.checkpoints[0].metric} ({mode}): {foremost.name}." if foremost else "None has a score yet."
    return [element("p", said), table(headings, rows, texts=(0, 3, 6, 7))]


def config_section(run: RunData) -> list[Markup]:
    """What differs from the defaults, then everything."""
    everything = folded("All of config.yaml", element("pre", run.config_text))
    if run.config is None:
        said = "config.yaml is of another version." if run.config_text else "There is no config.yaml."
        return [_hint(said), everything] if run.config_text else [_hint(said)]
    changed = changed_keys(run.config)
    rows = [
        (element("code", key), element("code", format_value(new)), format_value(old))
        for key, (old, new) in changed.items()
    ]
    return [table(("differs from the defaults", "value", "default"), rows, texts=(0, 1, 2)), everything]


def changed_keys(config: Config) -> dict[str, tuple[Any, Any]]:
    """Default and value of each key that differs from its default."""
    return {key: (old, new) for key, old, new in config_changes(plain_config(Config()), config)}


def format_value(value: Any) -> str:
    """A value as it would be given on the command line, cut where it is long."""
    if isinstance(value, list):
        value = [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."


def environment_section(run: RunData) -> list[Markup]:
    """What the run ran on."""
    rows: list[tuple[str, str]] = []
    for name, value in run.environment.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            text = (" " if name == "command" else ", ").join(map(str, value)) or "none"
        else:
            text = "none" if value is None else str(value)
        rows.append((name.replace("_", " "), element("code", text) if name == "command" else text))
    return [table(("", ""), rows, texts=(0, 1))] if rows else [_hint("There is no environment.json.")]


def comparison_section(runs: Mapping[str, RunData], verdicts: Mapping[str, Verdict]) -> list[Markup]:
    """Runs side by side: curves, newest and best values, configurations.

    Args:
        runs: by name, the report's own first.
        verdicts: on each.
    """
    rows = [("state", *(run.state for run in runs.values())), ("step", *(f"{run.step:,}" for run in runs.values()))]
    rows.append(("verdict", *(verdicts[name].level for name in runs)))
    for metric, title in COMPARED.items():
        cells = [_newest_and_best(run, metric) for run in runs.values()]
        if any(cell != "-" for cell in cells):
            rows.append((title, *cells))
    for key, title in _PROBED.items():
        if any(key in run.probe for run in runs.values()):
            rows.append(
                (
                    f"linear probe, {title}",
                    *(f"{100 * run.probe[key]:.1f} %" if key in run.probe else "-" for run in runs.values()),
                )
            )
    charts = element("div", *comparison_charts(runs), class_="charts")
    return [charts, table(("", *runs), rows), element("h3", "Keys that differ"), _differing_keys(runs)]


def _newest_and_best(run: RunData, metric: str) -> str:
    values = run.series[metric].finite().values if metric in run.series else []
    if not values:
        return "-"
    if metric.endswith("/loss"):
        return join([number(values[-1]), element("small", f" best {number(min(values))}")])
    if metric.startswith("probe/"):
        return join([number(values[-1]), element("small", f" best {number(max(values))}")])
    return number(values[-1])


def _differing_keys(runs: Mapping[str, RunData]) -> Markup:
    configs = {name: run.config for name, run in runs.items()}
    if unread := [name for name, config in configs.items() if config is None]:
        return _hint(f"Not known: the configuration of {', '.join(unread)} cannot be read.")
    changed = {name: changed_keys(config) for name, config in configs.items() if config is not None}
    defaults = {key: old for keys in changed.values() for key, (old, _) in keys.items()}
    rows = []
    for key, default in defaults.items():
        values = [keys[key][1] if key in keys else default for keys in changed.values()]
        if any(value != values[0] for value in values) and key != "run_dir":
            rows.append((element("code", key), *(element("code", format_value(value)) for value in values)))
    columns = range(len(runs) + 1)
    return table(("key", *runs), rows, texts=columns) if rows else _hint("None.")


def _hint(text: str) -> Markup:
    return element("p", text, class_="note")
