"""Draw the two figures of the README, light and dark: ``python docs/draw.py``. A test compares them with the files.

``hjepa``: what an H-JEPA is. ``timeline``: one iteration, with the handlers that listen to its events by their docstrings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from docstrings import HANDLERS, events

IMAGES = Path(__file__).parent / "images"


class Theme(NamedTuple):
    """Colors of a figure."""

    name: str
    text: str
    muted: str
    line: str
    box: str
    context: str
    target: str
    predictor: str
    empty: str


THEMES = (
    Theme("light", "#1f2328", "#57606a", "#8c959f", "#f6f8fa", "#0072B2", "#b45309", "#00785a", "#eaeef2"),
    Theme("dark", "#e6edf3", "#9ea7b3", "#6e7681", "#161b22", "#58a6ff", "#f0a04b", "#3fb98f", "#21262d"),
)
_FONT = "font-family=\"-apple-system,'Segoe UI',Helvetica,Arial,sans-serif\""
_MONO = 'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"'


class Drawing:
    """An SVG that grows.

    Args:
        width: in pixels.
        height: in pixels.
        theme: its colors.
        title: what it shows, for those who cannot see it.
    """

    def __init__(self, width: int, height: int, theme: Theme, title: str) -> None:
        self.theme = theme
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {_FONT}>',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-'
            f'start-reverse"><path d="M0 0L8 4L0 8z" fill="{theme.line}"/></marker></defs>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, *, fill: str = "", stroke: str = "none", round: int = 0
    ) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round}" fill="{fill or "none"}" '
            f'stroke="{stroke}" stroke-width="1.5"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        color: str = "",
        bold: bool = False,
        at: str = "middle",
    ) -> None:
        """A line of text, whose baseline is at ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{at}" '
            f'fill="{color or self.theme.text}"{weight}>{words}</text>'
        )

    def code(self, x: float, y: float, words: str, *, size: float = 12, color: str = "", at: str = "start") -> None:
        """A line of text as code."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{at}" {_MONO} '
            f'fill="{color or self.theme.text}">{words}</text>'
        )

    def arrow(self, path: str, *, dashed: bool = False, both: bool = False, color: str = "", tip: bool = True) -> None:
        """A line along an SVG path, with a tip."""
        marks = (' marker-end="url(#tip)"' if tip else "") + (' marker-start="url(#tip)"' if both else "")
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{color or self.theme.line}" stroke-width="1.6"{dashes}{marks}/>'
        )

    def circle(self, x: float, y: float, r: float, fill: str) -> None:
        """A filled circle."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}"/>')

    def done(self) -> str:
        """The file's text."""
        return "\n".join([*self._parts, "</svg>", ""])


def pixel(row: int, column: int) -> str:
    """The color of a patch of the example image, 8 x 8 patches: a sun over hills."""
    if (row - 1.6) ** 2 + (column - 5.6) ** 2 < 1.9:
        return "#f5c542"
    hills = 4.6 + 1.2 * math.sin(column / 1.35 + 0.6)
    if row > hills:
        return ("#4f8a4c", "#447a44", "#39693b")[min(2, int(row - hills))]
    return ("#7fb4e3", "#8fc0ea", "#a3cdf0", "#b9daf5", "#cfe6f9")[min(4, row)]


#: Row, column, height and width of the two target blocks, in patches.
BLOCKS = ((1, 4, 4, 3), (4, 0, 3, 3))


def _hidden(row: int, column: int) -> bool:
    return any(top <= row < top + h and left <= column < left + w for top, left, h, w in BLOCKS)


def _grid(drawing: Drawing, x: float, y: float, cell: float, *, masked: bool) -> None:
    for row in range(8):
        for column in range(8):
            gone = masked and _hidden(row, column)
            fill = drawing.theme.empty if gone else pixel(row, column)
            drawing.box(x + column * cell, y + row * cell, cell - 1.5, cell - 1.5, fill=fill)
    if not masked:
        for top, left, h, w in BLOCKS:
            place = (x + left * cell - 1, y + top * cell - 1, w * cell, h * cell)
            drawing.box(*place, stroke=drawing.theme.target, round=2)


def _module(drawing: Drawing, x: float, y: float, w: float, name: str, under: list[str], color: str) -> None:
    drawing.box(x, y, w, 72, fill=drawing.theme.box, stroke=color, round=8)
    drawing.text(x + w / 2, y + 27, name, size=14.5, bold=True, color=color)
    for number, line in enumerate(under):
        drawing.text(x + w / 2, y + 45 + 15 * number, line, size=11, color=drawing.theme.muted)


def _levels(drawing: Drawing, y: float, color: str) -> None:
    for x, cells in LEVELS:
        side = 56 / cells
        for row in range(cells):
            for column in range(cells):
                drawing.box(x + column * side, y + row * side, side - 2, side - 2, fill=color, round=2)


#: Where each level is drawn, and cells per side of its square.
LEVELS = ((606, 4), (706, 2), (806, 1))


def hjepa(theme: Theme) -> str:
    """The figure of an H-JEPA."""
    title = (
        "A context encoder sees some patches of an image. From them a predictor predicts, at three levels, the features "
        "that a target encoder computes of the whole image. The target encoder is a moving average of the context encoder."
    )
    drawing = Drawing(900, 400, theme, title)
    top, bottom = 42, 246
    drawing.text(76, top - 14, "context: what is seen", color=theme.muted, size=12)
    _grid(drawing, 16, top, 15, masked=True)
    drawing.text(76, bottom + 138, "target blocks", color=theme.muted, size=12)
    _grid(drawing, 16, bottom, 15, masked=False)
    _module(drawing, 190, top + 24, 150, "context encoder", ["visible patches only", "trained"], theme.context)
    _module(drawing, 190, bottom + 24, 150, "target encoder", ["every patch", "no gradients"], theme.target)
    _module(drawing, 396, top + 24, 150, "predictor", ["a query for each", "hidden cell and level"], theme.predictor)
    _module(drawing, 396, bottom + 24, 150, "pool, normalize", ["inside each block,", "for each level"], theme.target)
    for y in (top + 60, bottom + 60):
        drawing.arrow(f"M142 {y}H186")
        drawing.arrow(f"M342 {y}H392")
        drawing.arrow(f"M548 {y}H598")
    drawing.arrow(f"M265 {top + 98}V{bottom + 20}", dashed=True)
    drawing.text(276, 194, "moving average of", at="start", size=12, color=theme.muted)
    drawing.text(276, 210, "the weights (EMA)", at="start", size=12, color=theme.muted)
    _levels(drawing, top + 32, theme.predictor)
    _levels(drawing, bottom + 32, theme.target)
    names = ("level 0: patches", "level 1: 2 x 2", "level 2: image")
    for (x, _), name in zip(LEVELS, names, strict=True):
        drawing.arrow(f"M{x + 27} {top + 94}V{bottom + 26}", both=True)
        drawing.text(x + 27, bottom + 106, name, size=11.5, color=theme.muted)
    drawing.text(733, top + 16, "predicted features", color=theme.predictor, bold=True, size=13)
    drawing.text(733, bottom + 128, "target features", color=theme.target, bold=True, size=13)
    drawing.box(622, 183, 222, 30, fill=theme.box, stroke=theme.line, round=6)
    drawing.text(733, 203, "loss: weighted sum of distances", size=12.5)
    return drawing.done()


#: What the engine does itself, and the events that it fires behind it, in order.
STEPS = (
    ("the next batch", ("GET_BATCH_COMPLETED", "ITERATION_STARTED", "FORWARD_STARTED")),
    ("output = step(modules, batch)", ("FORWARD_COMPLETED", "LOSS_READY")),
    ("backward()", ("BACKWARD_COMPLETED", "GRADIENTS_READY")),
    ("optimizer.step()", ("OPTIMIZER_STEPPED", "UPDATE_COMPLETED")),
    ("output is detached", ("ITERATION_COMPLETED",)),
    ("every log_frequency steps", ("LOG_INTERVAL_COMPLETED", "METRICS_READY", "LOG_METRICS")),
    ("all handlers are done", ("ITERATION_FINALIZED", "CHECKPOINT_READY")),
)
_WIDTH, _ROW, _LEFT, _LINE, _CHIPS = 900, 26, 16, 228, 428


def listeners(event: str) -> list[str]:
    """The handlers of an event."""
    return [name for name, handler in HANDLERS.items() if event in events(handler)]


def timeline(theme: Theme) -> str:
    """The figure of an iteration."""
    rows: list[tuple[str, str, list[list[str]]]] = []
    for action, fired in STEPS:
        for number, event in enumerate(fired):
            rows.append(("" if number else action, event, _lines(listeners(event))))
    height = 70 + sum(_ROW * max(1, len(lines)) + (8 if action else 0) for action, _, lines in rows)
    title = "The events of an iteration, from top to bottom, and the handlers that listen to each"
    drawing = Drawing(_WIDTH, height, theme, title)
    for x, words in ((_LEFT, "the engine"), (_LINE + 16, "fires an event"), (_CHIPS, "handlers that listen")):
        drawing.text(x, 22, words, at="start", bold=True, color=theme.muted, size=12.5)
    y = 40
    drawing.arrow(f"M{_LINE} 34V{height - 12}")
    for action, event, lines in rows:
        if action:
            y += 8
            drawing.code(_LEFT, y + 17, action, color=theme.context, size=11.5)
        drawing.circle(_LINE, y + 13, 4.5, theme.target if lines else theme.line)
        drawing.code(_LINE + 16, y + 17, event, size=11.5)
        if lines:
            drawing.arrow(f"M{_LINE + 24 + 7 * len(event)} {y + 13}H{_CHIPS - 6}", tip=False)
        for number, chips in enumerate(lines):
            x: float = _CHIPS
            for chip in chips:
                drawing.box(x, y + _ROW * number + 2, _chip(chip), 22, fill=theme.box, stroke=theme.predictor, round=11)
                drawing.text(x + _chip(chip) / 2, y + _ROW * number + 17, chip, size=11.5)
                x += _chip(chip) + 6
        y += _ROW * max(1, len(lines))
    return drawing.done()


def _chip(name: str) -> float:
    return 18 + 6.9 * len(name)


def _lines(names: list[str]) -> list[list[str]]:
    """Names in lines that fit."""
    lines: list[list[str]] = []
    room = 0.0
    for name in names:
        if _chip(name) > room:
            lines.append([])
            room = _WIDTH - _CHIPS - 10.0
        lines[-1].append(name)
        room -= _chip(name) + 6
    return lines


def figures() -> dict[Path, str]:
    """The text of every file."""
    drawn = {"hjepa": hjepa, "timeline": timeline}
    return {IMAGES / f"{name}-{theme.name}.svg": draw(theme) for name, draw in drawn.items() for theme in THEMES}


if __name__ == "__main__":
    for path, text in figures().items():
        path.write_text(text, encoding="utf-8")
