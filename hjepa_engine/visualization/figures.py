"""Figures: masks over images, features as color, spectra over time, similarities, schedules.

matplotlib is imported when something is drawn, without ``pyplot``: no backend is chosen, no global state is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hjepa_engine.config.schema import Level
from hjepa_engine.masking import Masks
from hjepa_engine.metrics.health import COLLAPSED_VARIATION
from hjepa_engine.visualization.drawing import GRAY, PALETTE, figure_style, picture_table
from hjepa_engine.visualization.figure_data import FloatArray, PatchColors, Similarities, Spectrum, dimmed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Lines that a figure of spectra has at most.
MAX_SPECTRA = 40


def draw_masks(pixels: FloatArray, masks: Masks, grid: tuple[int, int], levels: Sequence[Level]) -> Figure:
    """A row for each image: the image, the patches of the context encoder, and the cells that each level predicts.

    Args:
        pixels: (n, H, W, 3), from 0 to 1.
        masks: of these images, or of a batch that begins with them.
        grid: (H, W), the patch grid.
        levels: of the hierarchy.
    """
    titles = ["image", f"context\n{masks.context_idx.shape[1]} of {grid[0] * grid[1]} patches"]
    titles += [f"level {number}\n{pool_in_words(level)}" for number, level in enumerate(levels)]
    with figure_style():
        figure, table = picture_table(len(pixels), len(titles), "Masks: context and target patches", titles)
        height, width = pixels.shape[1:3]
        for image, row in enumerate(table):
            targets = masks.target_idx[image]
            row[0].imshow(pixels[image], vmin=0, vmax=1)
            row[1].imshow(dimmed(pixels[image], masks.context_idx[image], grid))
            for level, axes in zip(levels, row[2:], strict=True):
                axes.imshow(pixels[image] if level.pool == "image" else dimmed(pixels[image], targets, grid))
                blocks = [(0, 0, *grid)] if level.pool == "image" else [_block(t, masks.block, grid) for t in targets]
                cell = max(grid) if level.pool == "image" else level.pool
                inset = 0.0 if masks.block == (1, 1) else height / 100  # single patches do not overlap
                _outline(axes, blocks, cell, (height / grid[0], width / grid[1]), inset)
    return figure


def pool_in_words(level: Level) -> str:
    """What one target of a level is.

    >>> pool_in_words(Level(1)), pool_in_words(Level(2)), pool_in_words(Level("image"))
    ('single patches', '2 x 2 patches', 'whole image')
    >>> pool_in_words(Level(1, depth=0))
    'pixels of patches'
    """
    if level.depth == 0:
        return "pixels of patches"
    if level.pool == "image":
        return "whole image"
    return "single patches" if level.pool == 1 else f"{level.pool} x {level.pool} patches"


def _block(patch_idx: Tensor, block: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a target block, in patches."""
    top, left = divmod(int(patch_idx[0]), grid[1])
    return top, left, *block


def _outline(
    axes: Axes, blocks: Sequence[tuple[int, int, int, int]], cell: int, patch: tuple[float, float], inset: float
) -> None:
    """Draw the edges of blocks, each a little further inside, so that shared ones stay visible, and those of their cells."""
    from matplotlib.patches import Rectangle

    edges = []
    for number, (top, left, height, width) in enumerate(blocks):
        color, inside = PALETTE[number % len(PALETTE)], np.array([1, -1]) * number * inset
        bottom, right = top + height, left + width
        y = np.array([top, bottom]) * patch[0] - 0.5 + inside
        x = np.array([left, right]) * patch[1] - 0.5 + inside
        axes.hlines(np.arange(top + cell, bottom, cell) * patch[0] - 0.5, x[0], x[1], colors=color, linewidth=0.7)
        axes.vlines(np.arange(left + cell, right, cell) * patch[1] - 0.5, y[0], y[1], colors=color, linewidth=0.7)
        edges.append(((x[0], y[0]), (x[1] - x[0], y[1] - y[0]), color))
    for corner, sides, color in edges:
        for line_color, linewidth in (("white", 2.6), (color, 1.5)):  # a white rim shows on any image
            style: dict[str, Any] = {"fill": False, "clip_on": False, "joinstyle": "miter"}
            axes.add_patch(Rectangle(corner, *sides, edgecolor=line_color, linewidth=linewidth, **style))


def draw_features(pixels: FloatArray, features: PatchColors, grid: tuple[int, int], encoder: str = "target") -> Figure:
    """Images above, the principal components of their patch features as colors below.

    Args:
        pixels: (n, H, W, 3), from 0 to 1.
        features: of these images, or of a batch that begins with them.
        grid: (H, W), the patch grid.
        encoder: whose features they are.
    """
    percent = ", ".join(f"{100 * share:.0f}" for share in features.explained)
    varies = 100 * features.variation
    varies_by = f"{varies:.0f}" if varies >= 10 else f"{varies:.2g}"
    notes = [
        f"red, green and blue: principal components with {percent} % of the variance",
        f"features at a position vary between images by {varies_by} % of their norm"
        + (": collapsed" if features.variation < COLLAPSED_VARIATION else ""),
    ]
    columns = min(len(pixels), 8)
    rows = -(-len(pixels) // columns)
    side = min(max(6.2 / columns - 0.1, 1.0), 1.9)
    with figure_style():
        figure, table = picture_table(2 * rows, columns, f"Patch features of the {encoder} encoder", (), side, notes)
        for image, picture in enumerate(pixels):
            row, column = 2 * (image // columns), image % columns
            scale = [size // number for size, number in zip(picture.shape, grid, strict=False)]
            colors = features.colors[image].reshape(*grid, 3)
            table[row][column].imshow(picture)
            table[row + 1][column].imshow(
                colors.repeat(scale[0], axis=0).repeat(scale[1], axis=1), interpolation="nearest"
            )
    return figure


def draw_spectra(spectra: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """Singular values of each encoder's features, a line for each step.

    Args:
        spectra: by encoder, in the order of their steps; of more than 40, evenly spaced ones are drawn.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    last = max((lines[-1].step for lines in spectra.values()), default=0)
    lowest = min(
        (value for lines in spectra.values() for line in lines for value in line.share if value > 0), default=1
    )
    with figure_style():
        figure = Figure(figsize=(max(3.1 * len(spectra) + 0.8, 5.2), 2.9), layout="constrained")
        figure.suptitle(
            "Spectrum of the features: the steeper, the fewer directions",
            fontsize=10,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        colors = ScalarMappable(Normalize(0, max(last, 1)), "viridis_r")
        panels: list[Axes] = list(figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0])
        for axes, (encoder, lines) in zip(panels, spectra.items(), strict=True):
            picked = np.unique(np.linspace(0, len(lines) - 1, MAX_SPECTRA).round().astype(int))
            for number in picked:
                line = lines[number]
                share = [value if value > 0 else np.nan for value in line.share]
                axes.plot(line.rank, share, color=colors.to_rgba(line.step), linewidth=1.2)
            dim = lines[-1].rank[-1]
            axes.axhline(1 / dim, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                "all equal", (dim, 1 / dim), (0, 3), textcoords="offset points", ha="right", color=GRAY, fontsize=7.5
            )
            axes.set(xscale="log", yscale="log", title=f"{encoder} encoder", xlabel="number of the singular value")
            axes.set_ylim(max(lowest, 1e-7) / 1.5, 1.3)
        panels[0].set_ylabel("share of the sum of all")
        bar = figure.colorbar(colors, ax=panels, pad=0.02, aspect=28)
        bar.set_label("optimizer step")
        bar.outline.set_visible(False)
    return figure


def draw_similarities(found: Sequence[Similarities], levels: Sequence[Level]) -> Figure:
    """How similar predictions are to their own targets, and to the targets at the same position of other images.

    Args:
        found: of each level.
        levels: of the hierarchy.
    """
    from matplotlib.figure import Figure

    values = np.concatenate([each for level in found for each in (level.own, level.others)])
    low, high = np.quantile(values, [0.002, 1])
    low, high = min(low, high - 0.02) - 0.01, min(1.0, high + 0.01)
    edges = np.linspace(low, high, 41)
    with figure_style():
        figure = Figure(figsize=(max(2.5 * len(found), 4.5), 2.75), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, len(found), sharex=True, squeeze=False)[0])
        for number, (axes, each, level) in enumerate(zip(panels, found, levels, strict=True)):
            for sample, color, name in (
                (each.others, PALETTE[1], "same position, other image"),
                (each.own, PALETTE[0], "own target"),
            ):
                if len(sample):
                    share = np.histogram(sample.clip(low), edges)[0] / len(sample)
                    axes.stairs(share, edges, fill=True, color=color, alpha=0.35)
                    axes.stairs(share, edges, color=color, linewidth=1.3, label=name)
            title = (
                f"own target closer in {100 * each.correct:.0f} % of pairs"
                if len(each.others)
                else "no pairs to compare"
            )
            axes.set_title(f"level {number}, {pool_in_words(level)}\n{title}", linespacing=1.3)
            axes.set_xlabel("cosine similarity to the prediction")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
        headline = "Do predictions find their own image? (chance: 50 %)"
        figure.suptitle(headline, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def draw_schedules(
    schedules: Mapping[str, Mapping[str, Callable[[int], float]]], steps: int, steps_per_epoch: int
) -> Figure:
    """Curves over the epochs, a panel for each quantity.

    Args:
        schedules: by quantity, functions of the optimizer step by the name of their line.
        steps: of the run.
        steps_per_epoch: optimizer steps in an epoch.
    """
    from matplotlib.figure import Figure

    at = np.unique(np.linspace(0, steps - 1, 400).round().astype(int))
    with figure_style():
        figure = Figure(figsize=(2.6 * len(schedules), 2.5), layout="constrained")
        headline = f"Schedules: {steps} steps, {steps_per_epoch} in an epoch"
        figure.suptitle(headline, fontsize=10, fontweight="bold", x=0.01, ha="left")
        panels: list[Axes] = list(figure.subplots(1, len(schedules), squeeze=False)[0])
        for axes, (quantity, lines) in zip(panels, schedules.items(), strict=True):
            values = {name: [schedule(int(step)) for step in at] for name, schedule in lines.items()}
            for number, (name, line) in enumerate(values.items()):
                dashes = (0, (4, 1 + number)) if number else "-"
                axes.plot(at / steps_per_epoch, line, color=PALETTE[number % 6], linestyle=dashes, label=name)
            lowest, highest = min(map(min, values.values())), max(map(max, values.values()))
            axes.set(title=quantity, xlabel="epoch")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
            axes.margins(x=0.02, y=0.08)
            if lowest == highest:
                axes.set_ylim(0, 2 * highest or 1)
            if len(lines) > 1:
                axes.legend()
    return figure


def draw_lr_sweep(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float | None
) -> Figure:
    """The loss over the learning rate, and the rate that is suggested, if there is one.

    Args:
        lrs: learning rate of each step.
        losses: loss of each step.
        smoothed: the same, smoothed.
        suggestion: a learning rate.
    """
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(lrs, losses, color=GRAY, linewidth=0.7, label="loss of a step")
        axes.plot(lrs, smoothed, color=PALETTE[0], label="smoothed")
        if suggestion is not None:
            axes.axvline(suggestion, color=PALETTE[5], linestyle="--", label=f"falls fastest: {suggestion:.2g}")
        axes.set(title=f"Loss while the learning rate rises, {len(lrs)} steps", xlabel="learning rate", xscale="log")
        axes.set_ylim(top=1.1 * max(losses[: max(1, len(lrs) // 2)]))
        axes.legend()
    return figure
