"""HTML and SVG elements whose texts are escaped, and numbers as people read them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

_VOID = ("img", "meta", "line", "path", "circle", "rect")


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, /, *children: str, **attributes: object) -> Markup:
    """An element; children that are no :class:`Markup` and all attributes are escaped.

    >>> element("p", "a < b", class_="note", data_x=1)
    '<p class="note" data-x="1">a &lt; b</p>'

    Args:
        tag: name of the element.
        children: texts and elements.
        attributes: ``class_`` is ``class``, ``data_x`` is ``data-x``; None: none, True: without a value.
    """
    given = {
        key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value not in (None, False)
    }
    words = [tag, *(key if value is True else f'{key}="{html.escape(str(value))}"' for key, value in given.items())]
    if tag in _VOID and not children:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{tag}>")


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Texts and elements one after another."""
    escaped = [part if isinstance(part, Markup) else html.escape(part) for part in parts]
    return Markup(between.join(escaped))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int] = (0,)) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        headings: one per column.
        rows: texts or elements, as many.
        texts: columns that hold texts; the others hold numbers, at the right.
    """

    def row(cells: Sequence[str], name: str) -> Markup:
        found = [element(name, cell, class_=None if place in texts else "number") for place, cell in enumerate(cells)]
        return element("tr", *found)

    head, body = element("thead", row(headings, "th")), element("tbody", *(row(cells, "td") for cells in rows))
    return element("div", element("table", head, body), class_="wide")


def folded(summary: str, *children: str) -> Markup:
    """What is shown when somebody asks for it."""
    return element("details", element("summary", summary), *children)


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


def duration(seconds: float) -> str:
    """A time in two units.

    >>> duration(42.3), duration(3723), duration(200_000)
    ('42 s', '1 h 2 min', '2 d 7 h')
    """
    for size, unit, smaller, subunit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {subunit}"
    return f"{max(0.0, seconds):.0f} s"
