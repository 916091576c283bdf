"""Which curves are drawn together, and under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from hjepa_engine.metrics.glossary import explain
from hjepa_engine.metrics.names import (
    ALPHA_REQ,
    COLLAPSE,
    DATA_WAIT,
    EMA_MOMENTUM,
    ENCODERS,
    FINAL_PROBES,
    GRAD_NORM,
    IMAGES_PER_S,
    ITERATION_MS,
    KNN,
    LIDAR,
    LR,
    ONLINE_LINEAR,
    RANK_ME,
    SYSTEM,
    TITLES,
    TRAIN_LOSS,
    VAL_LOSS,
    WEIGHT_DECAY,
    collapse_metric,
    spectrum_encoder,
)
from hjepa_engine.report.charts import Chart, Line, chart
from hjepa_engine.report.reading import RunData, Series

Item = TypeVar("Item")


class Panel(NamedTuple):
    """A chart of all metrics that match.

    Args:
        title: of the chart.
        lines: the name of a curve by the pattern of its metrics, whose groups it may have.
        log: whether the scale may be logarithmic.
        zero: whether the scale starts at 0.
        note: under the chart.
    """

    title: str
    lines: dict[str, str]
    log: bool = False
    zero: bool = False
    note: str = ""


def _encoders(key: str) -> dict[str, str]:
    return {
        collapse_metric(encoder, key, batch=batch): f"{encoder}{', training batches' if batch else ''}"
        for batch in (False, True)
        for encoder in ENCODERS
    }


def _levels(key: str) -> dict[str, str]:
    return {collapse_metric(encoder, key, level=r"(\d+)"): rf"{encoder}, level \1" for encoder in ENCODERS}


#: Curve names of the probes that are measured during a run.
ONLINE_PROBES = {KNN: "kNN", ONLINE_LINEAR: "linear, online"}
SECTIONS: dict[str, list[Panel]] = {
    "Loss": [
        Panel("Loss", {TRAIN_LOSS: "training", VAL_LOSS: "validation"}, log=True),
        Panel(
            "Loss of each level",
            {rf"{TRAIN_LOSS}_level_(\d+)": r"training, level \1", rf"{VAL_LOSS}_level_(\d+)": r"validation, level \1"},
            log=True,
        ),
        Panel(
            "Regularizers",
            {rf"{TRAIN_LOSS}_((?!level)\w+)": r"\1", rf"{VAL_LOSS}_((?!level)\w+)": r"validation, \1"},
            log=True,
        ),
    ],
    "Collapse": [
        Panel(
            "Rank share", _encoders("rank_share"), zero=True, note="1: all directions vary alike, 0: a single one does"
        ),
        Panel("Rank share of each level", _levels("rank_share"), zero=True),
        Panel("Standard deviation", _encoders("std"), zero=True),
        Panel("Standard deviation of each level", _levels("std"), zero=True),
        Panel("Norm of centered features", _encoders("norm"), zero=True),
        Panel("Norm of each level", _levels("norm"), zero=True),
        Panel("RankMe", _encoders(RANK_ME), zero=True),
        Panel("LiDAR", _encoders(LIDAR), zero=True),
        Panel("alpha-ReQ", _encoders(ALPHA_REQ)),
    ],
    "Probes": [
        Panel("Accuracy of probes", ONLINE_PROBES, zero=True),
    ],
    "Optimization": [
        Panel("Learning rate", {LR: "learning rate", rf"{LR}_level_(\d+)": r"level \1"}, zero=True),
        Panel("Weight decay", {WEIGHT_DECAY: "weight decay"}, zero=True),
        Panel("Momentum of the target encoder", {EMA_MOMENTUM: "momentum"}),
        Panel("Gradient norm", {GRAD_NORM: "before clipping"}, log=True, zero=True),
    ],
    "Speed and machine": [
        Panel("Images per second", {IMAGES_PER_S: "images per second"}, zero=True),
        Panel("Share of time waiting for data", {DATA_WAIT: "waiting"}, zero=True),
        Panel(
            "Time of an iteration in ms",
            {ITERATION_MS: "whole iteration", r"train/(\w+)_ms": r"\1"},
            log=True,
            zero=True,
        ),
    ],
}
#: The metrics that runs are compared by.
COMPARED = (
    *(TRAIN_LOSS, VAL_LOSS),
    *(
        collapse_metric("target", "rank_share"),
        collapse_metric("target", "std"),
        collapse_metric("context", "rank_share"),
    ),
    *(KNN, ONLINE_LINEAR, GRAD_NORM, LR, IMAGES_PER_S),
)
#: In tables: a final probe has one value, and a rank is the rank share in other units.
_NO_CURVES = rf"{'|'.join(FINAL_PROBES.values())}|{COLLAPSE}\w+_rank(_level_\d+)?"


def section_charts(run: RunData) -> dict[str, list[Chart]]:
    """The charts of a run by section; metrics of no panel come under ``Other metrics``."""
    left = dict(run.series)
    found: dict[str, list[Chart | None]] = {
        name: [_draw(panel, left) for panel in panels] for name, panels in SECTIONS.items()
    }
    found["Collapse"] += spectrum_charts(run)
    found["Speed and machine"] += _machine_charts(left)
    found["Other metrics"] = [
        chart(name, [Line(name, series)], log=True)
        for name, series in left.items()
        if not re.fullmatch(_NO_CURVES, name)
    ]
    return {name: [drawn for drawn in charts if drawn] for name, charts in found.items()}


def _draw(panel: Panel, left: dict[str, Series]) -> Chart | None:
    """The chart of a panel; its metrics are taken out of ``left``."""
    lines: list[Line] = []
    first = ""
    for pattern, label in panel.lines.items():
        for match in list(filter(None, (re.fullmatch(pattern, name) for name in left))):
            first = first or match[0]
            lines.append(Line(match.expand(label), left.pop(match[0])))
    return chart(panel.title, lines, panel.log, panel.zero, note=panel.note or _meaning(first))


def _machine_charts(left: dict[str, Series]) -> list[Chart | None]:
    """One chart for each metric of the machine, with all GPUs in it."""
    groups: dict[str, list[Line]] = {}
    meanings: dict[str, str] = {}
    for name in [name for name in left if name.startswith(SYSTEM)]:
        short = name.removeprefix(SYSTEM)
        match = re.fullmatch(r"gpu(\d+)_(\w+)", short)
        title, label = (f"GPU {match[2]}", f"GPU {match[1]}") if match else (short, short)
        title, label = (words.replace("_", " ").replace(" gb", " GB") for words in (title, label))
        groups.setdefault(title, []).append(Line(label, left.pop(name)))
        meanings[title] = _meaning(name)
    return [chart(title, lines, zero=True, note=meanings[title]) for title, lines in groups.items()]


def _meaning(name: str) -> str:
    """A metric in one line without its full stop; nothing for one of the user's own."""
    term = explain(name)
    return term.meaning.rstrip(".") if term else ""


def spectrum_charts(run: RunData) -> list[Chart | None]:
    """The spectrum of each encoder: the first, the last, and two between them."""
    found = []
    for name, by_step in run.spectra.items():
        steps = spread(list(by_step), 4)
        title = f"Spectrum: {spectrum_encoder(name) or name}"
        lines = [Line(f"step {step}", _positive(by_step[step])) for step in steps]
        note = "share of the n-th singular value"
        found.append(chart(title, lines, log=True, x_title="n", x_log=True, newest=False, note=note))
    return found


def _positive(series: Series) -> Series:
    """Without what a logarithm cannot show: singular values that are 0."""
    kept = [(rank, share) for rank, share in zip(*series, strict=False) if rank > 0 and share > 0]
    return Series([rank for rank, _ in kept], [share for _, share in kept])


def comparison_charts(runs: Mapping[str, RunData]) -> list[Chart | None]:
    """Each metric of :data:`COMPARED` that two runs have, one curve per run, by the runs' names."""
    drawn = []
    for name in COMPARED:
        lines = [Line(label, run.series.get(name, Series([], []))) for label, run in runs.items()]
        if sum(bool(line.series.steps) for line in lines) > 1:
            log = name in (TRAIN_LOSS, VAL_LOSS, GRAD_NORM)
            drawn.append(chart(TITLES[name], lines, log=log, zero=name not in (TRAIN_LOSS, VAL_LOSS)))
    return drawn


def spread(items: Iterable[Item], count: int) -> list[Item]:
    """At most ``count`` items, evenly spread, the first and the last among them."""
    found = list(items)
    if len(found) <= count:
        return found
    return [found[round(index * (len(found) - 1) / (count - 1))] for index in range(count)]
