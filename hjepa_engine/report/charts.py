"""Line charts: from metrics to the pixels of a drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hjepa_engine.report.numbers import number
from hjepa_engine.report.reading import Series

#: Points that a drawn curve has at most: more than the pixels of a chart show nothing.
MAX_POINTS = 300
#: Curves of one chart: more colors cannot be told apart.
MAX_LINES = 8
_MARKED = 16  # curves with so few points show them
_LOG_FROM = 30.0  # ratio of the largest to the smallest value from which a logarithm shows more


class Frame(NamedTuple):
    """Size of a drawing and edges of its plot, in pixels."""

    width: int = 400
    height: int = 224
    left: int = 46
    right: int = 390
    top: int = 10
    bottom: int = 192


FRAME = Frame()


class Line(NamedTuple):
    """A curve with its name."""

    label: str
    series: Series


class Scale:
    """From values to pixels.

    Args:
        values: that must be on the scale, finite.
        start: pixel of the smallest.
        end: pixel of the largest.
        log: whether equal ratios are equal lengths; all values must be positive then.
        zero: whether 0 is on the scale.
    """

    def __init__(
        self, values: Iterable[float], start: float, end: float, log: bool = False, zero: bool = False
    ) -> None:
        found = list(values) or [0.0]
        low, high = min(found), max(found)
        if log:
            low, high = _round_down(low), 1 / _round_down(1 / high)
        else:
            low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
            margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
            low, high = (low if zero and low == 0 else low - margin), high + margin
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the scale."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def _round_down(value: float) -> float:
    """The largest of 1, 2 or 5 times a power of ten that is not above a positive value."""
    power = float(f"1e{math.floor(math.log10(value))}")
    return max(size * power for size in (0.1, 1, 2, 5) if size * power <= value)


def ticks(low: float, high: float, max_ticks: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``.

    >>> ticks(0, 612), ticks(0.1, 0.42)
    ([0, 200, 400, 600], [0.1, 0.2, 0.3, 0.4])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / max_ticks))
    step = next(size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) < max_ticks - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    found = [round(multiple * step, digits) for multiple in range(first, last + 1)]
    return [int(value) for value in found] if digits == 0 else found


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``, at most 6; between them 2 and 5 where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sizes = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    stride = max(1, math.ceil(len(powers) / 6)) if sizes == (1,) else 1
    found = [float(f"{size}e{power}") for power in powers[::stride] for size in sizes]
    return [value for value in found if low <= value <= high]


def tick_label(value: float) -> str:
    """A tick in few characters.

    >>> tick_label(20000), tick_label(0.25), tick_label(1e-05), tick_label(2500000)
    ('20k', '0.25', '1e-5', '2.5M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}".replace("e-0", "e-")


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """At most about ``max_points`` points: the smallest and the largest of equal parts, the ends, and one of what is NaN.

    So a spike of one step stays where it was and as high as it was.
    """
    steps, values = series
    if len(steps) <= max_points:
        return series
    size = math.ceil(len(steps) / (max_points // 3))
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        part = range(start, min(start + size, len(steps)))
        finite = [index for index in part if math.isfinite(values[index])]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
        kept |= set([index for index in part if not math.isfinite(values[index])][:1])
    return Series([steps[index] for index in sorted(kept)], [values[index] for index in sorted(kept)])


@dataclass(frozen=True)
class Curve:
    """A curve as pixels."""

    label: str
    newest: str
    """Its last value."""
    path: str
    """Commands of an SVG path, interrupted where values are not finite."""
    points: str
    """Its values as ``step:value``, for the pointer."""
    marks: list[tuple[str, str]]
    """Pixels of its points, where there are few."""
    crosses: list[str]
    """Pixels to the right at which values are not finite."""


@dataclass(frozen=True)
class Chart:
    """A line chart, its curves and ticks in the pixels of :data:`FRAME`."""

    title: str
    curves: list[Curve]
    x_ticks: list[tuple[str, str]]
    """Pixel and label."""
    y_ticks: list[tuple[str, str]]
    x_range: str
    """Smallest and largest step, their pixels, and 1 for a logarithmic scale: for the pointer."""
    x_title: str
    note: str
    """Under the chart; may be empty."""
    newest: bool = True
    """Whether the legend has the last values."""

    @property
    def summary(self) -> str:
        """The chart in words."""
        labels = [f"{curve.label} {curve.newest}" if self.newest else curve.label for curve in self.curves]
        return f"{self.title}: {'newest ' if self.newest else ''}{', '.join(labels)}"


def chart(
    title: str,
    lines: Sequence[Line],
    log: bool = False,
    zero: bool = False,
    x_title: str = "step",
    x_log: bool = False,
    newest: bool = True,
    note: str = "",
) -> Chart | None:
    """A chart of some curves; None where no line has a point.

    Args:
        title: above it.
        lines: the curves; those after the first eight are counted, not drawn.
        log: whether the values may have a logarithmic scale, which they get where they spread widely.
        zero: whether the scale starts at 0 where it is not logarithmic.
        x_title: what runs to the right.
        x_log: whether that has a logarithmic scale.
        newest: whether the legend has the last values.
        note: under it.
    """
    lines = [Line(line.label, thin(line.series)) for line in lines if line.series.steps]
    more, lines = len(lines) - MAX_LINES, lines[:MAX_LINES]
    if not lines:
        return None
    finite = [value for line in lines for value in line.series.finite().values]
    log = log and bool(finite) and min(finite) > 0 and max(finite) > _LOG_FROM * min(finite)
    steps = [float(step) for line in lines for step in line.series.steps]
    x = Scale(steps, FRAME.left, FRAME.right, log=x_log)
    x.low, x.high = min(steps), max(max(steps), min(steps) + 1)  # curves begin at the axis
    y = Scale(finite, FRAME.bottom, FRAME.top, log, zero)
    notes = [note, "logarithmic scale" if log else "", f"{more} more not drawn" if more > 0 else ""]
    return Chart(
        title=title,
        curves=[_curve(line, x, y) for line in lines],
        x_ticks=[(f"{x(value):.1f}", tick_label(value)) for value in x.ticks()],
        y_ticks=[(f"{y(value):.1f}", tick_label(value)) for value in y.ticks()],
        x_range=f"{x.low:.9g} {x.high:.9g} {FRAME.left} {FRAME.right} {int(x.log)}",
        x_title=x_title,
        note="; ".join(filter(None, notes)),
        newest=newest,
    )


def _curve(line: Line, x: Scale, y: Scale) -> Curve:
    pairs = list(zip(*line.series, strict=True))
    commands, marks, crosses, pen = [], [], [], "M"
    for step, value in pairs:
        if not math.isfinite(value):
            crosses.append(f"{x(step):.1f}")
            pen = "M"
            continue
        marks.append((f"{x(step):.1f}", f"{y(value):.1f}"))
        commands.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return Curve(
        label=line.label,
        newest=number(line.series.values[-1]),
        path="".join(commands),
        points=" ".join(f"{step:g}:{value:.4g}" for step, value in pairs),
        marks=marks if len(pairs) <= _MARKED else [],
        crosses=crosses,
    )
