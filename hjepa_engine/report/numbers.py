"""Numbers, times and tables as people read them."""

from __future__ import annotations

import math
import time
from typing import NamedTuple


class Table(NamedTuple):
    """Headings and rows of strings."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def number(value: float | None) -> str:
    """A number with about four digits.

    >>> number(0.43211), number(12345.6), number(2.5e-05), number(float("nan")), number(None)
    ('0.4321', '12,346', '2.5e-05', 'not finite', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def percent(part: float) -> str:
    """A part of 1 in percent.

    >>> percent(0.4523), percent(0.00123)
    ('45 %', '0.12 %')
    """
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.2g} %"


def duration(seconds: float) -> str:
    """A time in two units.

    >>> duration(42.3), duration(3723), duration(200_000)
    ('42 s', '1 h 2 min', '2 d 7 h')
    """
    for size, unit, smaller, subunit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {subunit}"
    return f"{max(0.0, seconds):.0f} s"


def when(seconds: float) -> str:
    """A time in UTC.

    >>> when(0)
    '1970-01-01 00:00 UTC'
    """
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
