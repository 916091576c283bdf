"""Preview of a run before training: ``recipes/pretrain.py --preview``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from hjepa_engine import Config
from hjepa_engine.build import Schedules, build_schedules, steps_per_epoch
from hjepa_engine.config.schema import Level
from hjepa_engine.devices import process_group
from hjepa_engine.errors import ConfigError
from hjepa_engine.handlers import MaskSampler
from hjepa_engine.masking import MaskSource
from hjepa_engine.recipes.common.monitoring import levels_of
from hjepa_engine.visualization import figures
from hjepa_engine.visualization.drawing import save
from hjepa_engine.visualization.figure_data import to_pixels

#: Number of steps whose masks are sampled, evenly spread over the run.
_SAMPLES = 64


def preview(config: Config, build: Callable[[Config], Any]) -> None:
    """Print and draw schedules and masks; writes only to ``<run_dir>/preview/``.

    Args:
        config: configuration of the run.
        build: builds the :class:`~hjepa_engine.recipes.pretrain.Run`, and so raises the errors that the run would.

    Raises:
        ConfigError: the pictures cannot be written.
    """
    with process_group(config.device, config.distributed.timeout):
        run = build(config)
        if idist.get_rank() == 0:
            _preview(config, run)


def _preview(config: Config, run: Any) -> None:
    accumulation = config.training.accumulation_steps
    per_epoch = steps_per_epoch(len(run.data), accumulation)
    epochs, rest = divmod(run.iterations, len(run.data))
    steps = epochs * per_epoch + math.ceil(rest / accumulation)
    schedules, levels = build_schedules(config, per_epoch), levels_of(run.modules)
    masks = next((handler.masks for handler in run.handlers if isinstance(handler, MaskSampler)), None)
    print(f"{run.describe()}\n{steps} steps, {per_epoch} in an epoch\n")
    print("\n".join(table_of(config, schedules, steps, per_epoch)) + "\n")
    if masks is not None:
        print("\n".join(tokens_of(masks, levels, config.seed, steps)) + "\n")
    images = next(iter(run.data))["images"][: config.pictures.images].cpu()
    run.data.close()
    pixels = to_pixels(images, run.data.split.stats)
    schedule_figure = figures.draw_schedules(lines_of(config, schedules), steps, per_epoch)
    drawn = [save_preview(schedule_figure, run, "schedules.png")]
    if masks is not None:
        mask_figure = figures.draw_masks(pixels, masks.sample(len(images), config.seed), masks.grid, levels)
        drawn.append(save_preview(mask_figure, run, "masks.png"))
    print(f"drawn: {' and '.join(map(str, drawn))}")


def save_preview(figure: Any, run: Any, name: str) -> Path:
    """Write a figure to the run's folder ``preview``; returns the file.

    Raises:
        ConfigError: it cannot be written.
    """
    path: Path = run.folder.path / "preview" / name
    try:
        save(figure, path)
    except OSError as error:
        raise ConfigError(f"run_dir {run.folder.path} cannot be written to: {error.strerror}") from error
    return path


def lines_of(config: Config, schedules: Schedules) -> dict[str, dict[str, Callable[[int], float]]]:
    """Schedules in the form that :func:`draw_schedules` takes; one learning rate per level if they differ."""
    rates: dict[str, Callable[[int], float]] = {"shared": schedules.lr}
    for level in range(len(config.training.level_lrs or ())):
        rates[f"level {level}"] = lambda step, level=level: schedules.level_lr(step)[level]  # type: ignore[misc]
    return {
        "learning rate": rates,
        "weight decay": {"": schedules.weight_decay},
        "momentum of the target": {"": schedules.momentum},
    }


def table_of(config: Config, schedules: Schedules, steps: int, per_epoch: int) -> list[str]:
    """Lines of a table of schedule values: at the start, the end of the warmup, the quarters and the last step.

    Args:
        config: of the run.
        schedules: of the run.
        steps: optimizer steps of the run.
        per_epoch: optimizer steps of an epoch.
    """
    rates = lines_of(config, schedules)["learning rate"]
    columns: dict[str, Callable[[int], float]] = {
        **{"lr" if name == "shared" else f"lr {name}": rate for name, rate in rates.items()},
        "weight decay": schedules.weight_decay,
        "momentum": schedules.momentum,
    }
    moments = {0: "start"}
    if warmup := round(config.training.warmup_epochs * per_epoch):
        moments[warmup - 1] = "end of warm-up"
    moments |= {steps * quarter // 4: f"{quarter}/4" for quarter in (1, 2, 3)} | moments | {steps - 1: "last step"}
    lines = ["".join(f"{name:>14}" for name in ("epoch", "step", *columns))]
    for step in sorted(step for step in moments if step < steps):
        values = "".join(f"{schedule(step):14.6g}" for schedule in columns.values())
        lines.append(f"{step / per_epoch:14.2f}{step:14d}{values}   {moments[step]}")
    return lines


def tokens_of(masks: MaskSource, levels: tuple[Level, ...], seed: int, steps: int) -> list[str]:
    """Number of visible and of predicted tokens per image, over the run's masks.

    Args:
        masks: the sampler.
        levels: of the hierarchy.
        seed: of the run.
        steps: optimizer steps of the run.
    """
    drawn = [masks.sample(1, seed, step) for step in range(0, steps, math.ceil(steps / _SAMPLES))]
    visible = _range([each.context_idx.shape[1] for each in drawn])
    blocks = _range([each.target_idx.shape[1] for each in drawn])
    lines = [f"context: {visible} of {masks.num_patches} patches seen"]
    for number, level in enumerate(levels):
        counts = [
            1
            if level.pool == "image"
            else each.target_idx.shape[1] * math.prod(math.ceil(side / level.pool) for side in each.block)
            for each in drawn
        ]
        where = "" if level.pool == "image" else f" in {blocks} blocks"
        lines.append(f"level {number}, {figures.pool_in_words(level)}: {_range(counts)} predicted{where}")
    return lines


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high} (mean {sum(counts) / len(counts):.1f})"
