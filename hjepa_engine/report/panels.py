"""Which curves are drawn together, and under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from hjepa_engine.report.charts import Line, chart
from hjepa_engine.report.markup import Markup
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
        f"collapse/{batch}{encoder}_{key}": f"{encoder}{words}"
        for batch, words in (("", ""), ("batch_", ", training batches"))
        for encoder in ("target", "context")
    }


def _levels(key: str) -> dict[str, str]:
    return {rf"collapse/{encoder}_{key}_level_(\d+)": rf"{encoder}, level \1" for encoder in ("target", "context")}


SECTIONS: dict[str, list[Panel]] = {
    "Loss": [
        Panel("Loss", {"train/loss": "training", "val/loss": "validation"}, log=True),
        Panel(
            "Loss of each level",
            {r"train/loss_level_(\d+)": r"training, level \1", r"val/loss_level_(\d+)": r"validation, level \1"},
            log=True,
        ),
        Panel(
            "Regularizers",
            {r"train/loss_((?!level)\w+)": r"\1", r"val/loss_((?!level)\w+)": r"validation, \1"},
            log=True,
        ),
    ],
    "Collapse": [
        Panel(
            "Rank share", _encoders("rank_share"), zero=True, note="1: all directions are used alike, 0: one is left"
        ),
        Panel("Rank share of each level", _levels("rank_share"), zero=True),
        Panel("Standard deviation", _encoders("std"), zero=True),
        Panel("Standard deviation of each level", _levels("std"), zero=True),
        Panel("Norm of centered features", _encoders("norm"), zero=True),
        Panel("Norm of each level", _levels("norm"), zero=True),
        Panel("RankMe", _encoders("rank_me"), zero=True),
        Panel("LiDAR", _encoders("lidar"), zero=True),
        Panel("alpha-ReQ", _encoders("alpha_req")),
    ],
    "Probes": [
        Panel("Accuracy of probes", {"probe/knn": "kNN", "probe/online_linear": "linear, online"}, zero=True),
    ],
    "Optimization": [
        Panel("Learning rate", {"train/lr": "learning rate", r"train/lr_level_(\d+)": r"level \1"}, zero=True),
        Panel("Weight decay", {"train/weight_decay": "weight decay"}, zero=True),
        Panel("Momentum of the target encoder", {"train/ema_momentum": "momentum"}),
        Panel("Gradient norm", {"train/grad_norm": "before clipping"}, log=True, zero=True),
    ],
    "Speed and machine": [
        Panel("Images per second", {"train/images_per_s": "images per second"}, zero=True),
        Panel("Share of time waiting for data", {"train/data_wait": "waiting"}, zero=True),
        Panel(
            "Time of a step in ms",
            {r"train/((?!step)\w+)_ms": r"\1", "train/iteration_ms": "whole step"},
            log=True,
            zero=True,
        ),
    ],
}
#: What runs are compared by.
COMPARED = {
    "train/loss": "Training loss",
    "val/loss": "Validation loss",
    "collapse/target_rank_share": "Rank share of the target encoder",
    "collapse/target_std": "Standard deviation of the target encoder",
    "collapse/context_rank_share": "Rank share of the context encoder",
    "probe/knn": "kNN accuracy",
    "probe/online_linear": "Online linear accuracy",
    "train/grad_norm": "Gradient norm",
    "train/lr": "Learning rate",
    "train/images_per_s": "Images per second",
}
#: Told elsewhere: the probe at the end of the run has one value, and a rank is the rank share in other units.
_NO_CURVES = r"probe/linear(_\w+)?|collapse/\w+_rank(_level_\d+)?"


def section_charts(run: RunData) -> dict[str, list[Markup]]:
    """The charts of a run by section; what no panel asks for comes under ``Other metrics``."""
    left = dict(run.series)
    found = {name: [_draw(panel, left) for panel in panels] for name, panels in SECTIONS.items()}
    found["Collapse"] += spectrum_charts(run)
    found["Speed and machine"] += _machine_charts(left)
    found["Other metrics"] = [
        chart(name, [Line(name, series)], log=True)
        for name, series in left.items()
        if not re.fullmatch(_NO_CURVES, name)
    ]
    return {name: [drawn for drawn in charts if drawn] for name, charts in found.items()}


def _draw(panel: Panel, left: dict[str, Series]) -> Markup:
    """The chart of a panel; its metrics are taken out of ``left``."""
    lines = []
    for pattern, label in panel.lines.items():
        for match in list(filter(None, (re.fullmatch(pattern, name) for name in left))):
            lines.append(Line(match.expand(label), left.pop(match[0])))
    return chart(panel.title, lines, panel.log, panel.zero, note=panel.note)


def _machine_charts(left: dict[str, Series]) -> list[Markup]:
    """One chart for each figure of the machine, with all GPUs in it."""
    groups: dict[str, list[Line]] = {}
    for name in [name for name in left if name.startswith("system/")]:
        short = name.removeprefix("system/")
        match = re.fullmatch(r"gpu(\d+)_(\w+)", short)
        title, label = (f"GPU {match[2]}", f"GPU {match[1]}") if match else (short, short)
        groups.setdefault(title.replace("_", " "), []).append(Line(label.replace("_", " "), left.pop(name)))
    return [chart(title, lines, zero=True) for title, lines in groups.items()]


def spectrum_charts(run: RunData) -> list[Markup]:
    """The spectrum of each encoder at the first, a middle and the last reading."""
    found = []
    for name, by_step in run.spectra.items():
        steps = spread(list(by_step), 4)
        title = f"Spectrum: {name.rpartition('/')[2].removesuffix('_spectrum')}"
        lines = [Line(f"step {step}", _positive(by_step[step])) for step in steps]
        note = "share of the n-th singular value"
        found.append(chart(title, lines, log=True, x_title="n", x_log=True, newest=False, note=note))
    return found


def _positive(series: Series) -> Series:
    """Without what a logarithm cannot show: singular values that are 0."""
    kept = [(rank, share) for rank, share in zip(*series, strict=False) if rank > 0 and share > 0]
    return Series([rank for rank, _ in kept], [share for _, share in kept])


def comparison_charts(runs: Mapping[str, RunData]) -> list[Markup]:
    """Each metric of :data:`COMPARED` that two runs have, one curve per run, by the runs' names."""
    drawn = []
    for name, title in COMPARED.items():
        lines = [Line(label, run.series.get(name, Series([], []))) for label, run in runs.items()]
        if sum(bool(line.series.steps) for line in lines) > 1:
            log = name in ("train/loss", "val/loss", "train/grad_norm")
            drawn.append(chart(title, lines, log=log, zero=not name.endswith("/loss")))
    return drawn


def spread(items: Iterable[Item], most: int) -> list[Item]:
    """At most ``most`` items, evenly, the first and the last among them."""
    found = list(items)
    if len(found) <= most:
        return found
    return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]
