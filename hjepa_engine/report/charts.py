"""Line charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hjepa_engine.report.markup import Markup, element, join, number
from hjepa_engine.report.reading import Series

#: Points that a drawn curve has at most: more than the pixels of a chart show nothing.
MOST_POINTS = 300
#: Curves of one chart: more colors cannot be told apart.
MOST_LINES = 8
_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 390, 10, 192
_MARKED = 16  # curves with so few points show them
_LOG_FROM = 30.0  # ratio of the largest to the smallest value from which a logarithm shows more


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


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``.

    >>> ticks(0, 612), ticks(0.1, 0.42)
    ([0, 200, 400, 600], [0.1, 0.2, 0.3, 0.4])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) < most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    found = [round(place * step, digits) for place in range(first, last + 1)]
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


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points: the smallest and the largest of equal parts, the ends, and one of what is NaN.

    So a spike of one step stays where it was and as high as it was.
    """
    steps, values = series
    if len(steps) <= most:
        return series
    size = math.ceil(len(steps) / (most // 3))
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        part = range(start, min(start + size, len(steps)))
        finite = [place for place in part if math.isfinite(values[place])]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
        kept |= set([place for place in part if not math.isfinite(values[place])][:1])
    return Series([steps[place] for place in sorted(kept)], [values[place] for place in sorted(kept)])


def chart(
    title: str,
    lines: Sequence[Line],
    log: bool = False,
    zero: bool = False,
    x_title: str = "step",
    x_log: bool = False,
    newest: bool = True,
    note: str = "",
) -> Markup:
    """A chart with its legend and newest values; empty where no line has a point.

    Args:
        title: above it.
        lines: the curves; those after the first eight are counted, not drawn.
        log: whether the values may be shown on a logarithmic scale, which is done where they spread widely.
        zero: whether the scale starts at 0 where it is not logarithmic.
        x_title: what runs to the right.
        x_log: whether that has a logarithmic scale.
        newest: whether the legend has the last values.
        note: under it.
    """
    lines = [Line(line.label, thin(line.series)) for line in lines if line.series.steps]
    more, lines = len(lines) - MOST_LINES, lines[:MOST_LINES]
    if not lines:
        return Markup("")
    finite = [value for line in lines for value in line.series.finite().values]
    log = log and bool(finite) and min(finite) > 0 and max(finite) > _LOG_FROM * min(finite)
    steps = [float(step) for line in lines for step in line.series.steps]
    x = Scale(steps, _LEFT, _RIGHT, log=x_log)
    x.low, x.high = min(steps), max(max(steps), min(steps) + 1)  # curves begin at the axis
    y = Scale(finite, _BOTTOM, _TOP, log, zero)
    notes = [note, "logarithmic scale" if log else "", f"{more} more not shown" if more > 0 else ""]
    return element(
        "figure",
        element("figcaption", title, element("span", class_="at")),
        element("div", _drawing(title, lines, x, y, x_title), class_="plot"),
        _legend(lines, newest),
        element("p", "; ".join(filter(None, notes)), class_="note") if any(notes) else Markup(""),
        class_="chart",
    )


def _drawing(title: str, lines: Sequence[Line], x: Scale, y: Scale, x_title: str) -> Markup:
    newest = ", ".join(f"{line.label} {number(line.series.values[-1])}" for line in lines)
    return element(
        "svg",
        element("title", f"{title}: newest {newest}"),
        *_axes(x, y, x_title),
        element("line", class_="rule", x1=0, x2=0, y1=_TOP, y2=_BOTTOM),
        *(part for place, line in enumerate(lines) for part in _curve(place, line, x, y)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        data_x=f"{x.low:.9g} {x.high:.9g} {_LEFT} {_RIGHT} {int(x.log)}",
        data_x_title=x_title,
    )


def _axes(x: Scale, y: Scale, x_title: str) -> list[Markup]:
    parts = []
    for value in y.ticks():
        at = f"{y(value):.1f}"
        parts.append(element("line", class_="grid", x1=_LEFT, x2=_RIGHT, y1=at, y2=at))
        parts.append(element("text", tick_label(value), class_="tick end", x=_LEFT - 6, y=f"{y(value) + 3.5:.1f}"))
    parts.append(element("line", class_="axis", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM))
    for value in x.ticks():
        at, anchor = f"{x(value):.1f}", "end" if x(value) > _RIGHT - 10 else "middle"
        parts.append(element("line", class_="axis", x1=at, x2=at, y1=_BOTTOM, y2=_BOTTOM + 4))
        parts.append(element("text", tick_label(value), class_=f"tick {anchor}", x=at, y=_BOTTOM + 16))
    parts.append(element("text", x_title, class_="tick end", x=_RIGHT, y=_HEIGHT - 1))
    return parts


def _curve(place: int, line: Line, x: Scale, y: Scale) -> list[Markup]:
    """The path with its values, marks where there are few points, and crosses where values are not finite."""
    commands, marks, pen = [], [], "M"
    few = len(line.series.steps) <= _MARKED
    for step, value in zip(*line.series, strict=True):
        if not math.isfinite(value):
            at = x(step)
            cross = f"M{at - 3:.1f} {_BOTTOM - 6}l6 6m0 -6l-6 6"
            marks.append(element("path", class_="cross", d=cross))
            pen = "M"
            continue
        commands.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
        if few:
            marks.append(element("circle", class_=f"mark s{place}", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=2.5))
    points = " ".join(f"{step:g}:{value:.4g}" for step, value in zip(*line.series, strict=True))
    path = element("path", class_=f"line s{place}", d="".join(commands), aria_label=line.label, data_points=points)
    return [path, *marks]


def _legend(lines: Sequence[Line], newest: bool) -> Markup:
    entries = []
    for place, line in enumerate(lines):
        stroke = element("path", class_=f"line s{place}", d="M1 4h22")
        key = element("svg", stroke, class_="key", viewBox="0 0 24 8", aria_hidden="true")
        value = element("b", f" {number(line.series.values[-1])}" if newest else "")
        entries.append(element("li", key, line.label, value))
    return element("ul", join(entries), class_="legend")
