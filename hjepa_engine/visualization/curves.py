"""Curves of several runs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hjepa_engine.metrics.names import TITLES
from hjepa_engine.visualization.drawing import PALETTE, figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Steps and values of a metric.
Curve = tuple[Sequence[int], Sequence[float]]


def draw_runs(runs: Mapping[str, Sequence[Mapping[str, Curve]]], metrics: Sequence[str]) -> Figure:
    """A panel for each metric, a color for each variant, a line for each of its runs.

    Args:
        runs: of each variant, the metrics of its runs.
        metrics: names of those to draw; what no run has is left out.
    """
    from matplotlib.figure import Figure

    shown = [name for name in metrics if any(name in run for variant in runs.values() for run in variant)]
    with figure_style():
        figure = Figure(figsize=(2.9 * max(1, len(shown)), 2.9), layout="constrained")
        for axes, metric in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown, strict=False):
            for number, (variant, own) in enumerate(runs.items()):
                curves = [run[metric] for run in own if metric in run]
                for place, (steps, values) in enumerate(curves):
                    label = None if place else variant
                    dashes = (0, (4, 1 + number // len(PALETTE))) if number >= len(PALETTE) else "-"
                    axes.plot(
                        steps, values, color=PALETTE[number % len(PALETTE)], linestyle=dashes, linewidth=1, label=label
                    )
            axes.set(title=TITLES.get(metric, metric), xlabel="step")
        handles = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    return figure
