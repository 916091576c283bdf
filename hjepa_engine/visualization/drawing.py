"""The style of figures, and their pixels and files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from hjepa_engine.loggers.media import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: Colors that are distinct for any color vision (Okabe and Ito, 2008).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


GRAY = "#666666"


_STYLE: Any = {  # matplotlib's own type of it is another one in each version
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.edgecolor": GRAY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "figure.dpi": 150,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's settings for all figures."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def to_image(figure: Figure) -> Image:
    """The figure's pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with figure_style():
        canvas.draw()
    return Image(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def save(figure: Figure, path: Path) -> Image:
    """Write a PNG file, whole or not at all, and return the image that is in it.

    Args:
        figure: to be drawn.
        path: of the file; its folder is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    image, data = to_image(figure), io.BytesIO()
    PIL.Image.fromarray(image.pixels).save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(image, path=path)


def picture_table(
    rows: int, columns: int, headline: str, titles: Sequence[str] = (), side: float = 1.25, notes: Sequence[str] = ()
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a table of square axes without ticks, its size following from theirs (inches)."""
    from matplotlib.figure import Figure

    gap, edge = 0.1, 0.12
    head = 0.34 + 0.17 * len(notes) + (0.36 if titles else 0)
    width = max(2 * edge + columns * side + (columns - 1) * gap, 5.2 if notes else 0)
    height = head + rows * side + (rows - 1) * gap + edge
    figure = Figure(figsize=(width, height))
    figure.text(edge / width, 1 - 0.1 / height, headline, va="top", fontsize=10, fontweight="bold")
    for number, note in enumerate(notes):
        figure.text(edge / width, 1 - (0.31 + 0.16 * number) / height, note, va="top", fontsize=8, color=GRAY)
    table: list[list[Axes]] = []
    for row in range(rows):
        bottom = edge + (rows - 1 - row) * (side + gap)
        table.append([])
        for column in range(columns):
            left = edge + column * (side + gap)
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            axes.set_axis_off()
            if row == 0 and titles:
                axes.set_title(titles[column], fontsize=8.5, pad=4, linespacing=1.2)
            table[-1].append(axes)
    return figure, table
