"""The tasks of an evaluation, run for each encoder, and the record of what they found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hjepa_engine.devices import choose_device
from hjepa_engine.errors import ConfigError
from hjepa_engine.recipes.common.digest import weights_digest
from hjepa_engine.recipes.common.probe_run import ONE_CLASS, FrozenRun, identity_of, in_words, open_run, result_file
from hjepa_engine.recipes.evaluation.attentive import attentive
from hjepa_engine.recipes.evaluation.dense import dense
from hjepa_engine.recipes.evaluation.linear import few_label, linear
from hjepa_engine.recipes.evaluation.merging import merge
from hjepa_engine.recipes.evaluation.neighbors import knn
from hjepa_engine.recipes.evaluation.reading import grid_of, read_images, read_maps, read_patches
from hjepa_engine.recipes.evaluation.table import as_markdown
from hjepa_engine.recipes.evaluation.task import Encoder, Readings, Row, Settings
from hjepa_engine.utils.bars import Bar
from hjepa_engine.utils.files import replace_file

#: Tasks that read whole images, by name.
IMAGE_TASKS: dict[str, Callable[[Encoder, Readings, Settings], list[Row]]] = {
    "linear": linear,
    "knn": knn,
    "few_label": few_label,
}
TASKS = ("linear", "knn", "attentive", "few_label", "dense", "transfer")


@dataclass(frozen=True)
class Evaluation:
    """What was found, and where it was written."""

    record: dict[str, Any]
    """As in ``evaluation.json``."""
    path: Path
    """Of ``evaluation.json``; the table is beside it, ``evaluation.md``."""

    @property
    def table(self) -> str:
        """The table, Markdown."""
        return as_markdown(self.record)


def evaluate_run(
    folder: Path,
    checkpoint: str | None = None,
    tasks: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    transfer: Sequence[str] = (),
    num_seeds: int = 3,
) -> Evaluation:
    """Run the standard evaluation of a run folder, and write its table there, beside that of tasks done before.

    Args:
        folder: the run folder.
        checkpoint: see :func:`~hjepa_engine.load_encoder`.
        tasks: some of :data:`TASKS`; by default all that can be done: ``dense`` needs square images of patches,
            ``attentive`` patches, and ``transfer`` other data.
        overrides: as of :func:`~hjepa_engine.recipes.common.probe_run.probe_run`.
        transfer: further ones, for the second data set.
        num_seeds: repetitions.

    Raises:
        ConfigError, DataError, ExportError: as ``probe_run``; or a task cannot be done.
    """
    started = time.monotonic()
    if num_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {num_seeds}")
    run = open_run(folder, checkpoint, overrides)
    chosen = _choose(run, tasks, transfer)
    other = open_run(folder, checkpoint, [*overrides, *transfer]) if "transfer" in chosen else None
    settings = Settings(run.config, choose_device(run.config.device), num_seeds)
    rows = _rows(run, other, chosen, settings)
    note = ONE_CLASS if run.data["probe"].num_classes == 1 else None
    record = {
        "run": str(folder),
        "checkpoint": checkpoint,
        "weights": weights_digest(trained) if (trained := run.encoders["trained"]) is not None else None,
        "seeds": num_seeds,
        "seed": run.config.seed,
        "data": {**identity_of(run.config), "description": in_words(run.config, run.data)},
        "transfer_data": None if other is None else in_words(other.config, other.data),
        "probe": asdict(run.config.probe),
        "note": note,
        "rows": [row.as_dict() for row in rows],
        "seconds": round(time.monotonic() - started, 1),
    }
    path, record = merge(result_file(folder, run.before, run.config, "evaluation"), record, TASKS)
    try:
        replace_file(path, json.dumps(record, indent=1) + "\n")
        replace_file(path.with_suffix(".md"), as_markdown(record))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return Evaluation(record, path)


def _choose(run: FrozenRun, tasks: Sequence[str] | None, transfer: Sequence[str]) -> list[str]:
    """The tasks to do, in the order of :data:`TASKS`."""
    for task in tasks or ():
        if task not in TASKS:
            raise ConfigError(f"--tasks must be some of {', '.join(TASKS)}, got {task}")
    grid, reasons = grid_of(run.encoders["trained"]), dict[str, str]()
    if grid is None:
        reasons |= dict.fromkeys(("attentive", "dense"), "needs an encoder with a grid, (H, W) in patches")
    elif run.config.data.size[0] != run.config.data.size[1] or run.config.data.channels not in (1, 3):
        reasons["dense"] = "needs square images of 1 or 3 channels"
    if not transfer:
        reasons["transfer"] = "needs other data: --transfer data.dataset=..."
    for task in tasks or ():
        if task in reasons:
            raise ConfigError(f"the task {task} {reasons[task]}")
    wanted = set(tasks or TASKS) | ({"transfer"} if transfer else set())
    return [task for task in TASKS if task in wanted and task not in reasons]


def _rows(run: FrozenRun, other: FrozenRun | None, tasks: Sequence[str], settings: Settings) -> list[Row]:
    """All figures, by task, the encoders in order."""
    found: list[Row] = []
    names = [name for name in run.encoders if run.encoders[name] is not None or name == "pixels"]
    shown = run.config.logging.progress_bar
    with Bar(lambda: "", total=len(names) * len(tasks), unit=" tasks", disable=None if shown else True) as bar:
        for name in names:
            for task, rows in _tasks_of(name, run, other, tasks, settings):
                found += rows
                bar.set_postfix_str(f"{name}: {task}")
                bar.update()
    return sorted(found, key=lambda row: _order(row, tasks))


def _tasks_of(
    name: str, run: FrozenRun, other: FrozenRun | None, tasks: Sequence[str], settings: Settings
) -> Iterator[tuple[str, list[Row]]]:
    """Each task of one encoder; what it says of the images is computed once, and forgotten when it is not needed."""
    config, device = run.config, settings.device
    encoder, grid = Encoder(name, run.encoders[name]), grid_of(run.encoders["trained"])
    if of_images := [task for task in tasks if task in IMAGE_TASKS]:
        readings = read_images(config, encoder, device, run.data)
        for task in of_images:
            yield task, IMAGE_TASKS[task](encoder, readings, settings)
        del readings
    if "attentive" in tasks and grid is not None:
        yield "attentive", attentive(encoder, read_patches(config, encoder, device, run.data, grid), settings)
    if "dense" in tasks and grid is not None:
        yield "dense", dense(encoder, read_maps(config, encoder, device, grid), settings)
    if other is not None:
        changed = replace(settings, config=other.config)
        encoder = Encoder(name, other.encoders[name])
        yield "transfer", linear(encoder, read_images(other.config, encoder, device, other.data), changed, "transfer")


def _order(row: Row, tasks: Sequence[str]) -> int:
    """The place of a row's task; shares of labels are tasks of ``few_label``. Sorting leaves the rest as it is."""
    return tasks.index(row.task if row.task in tasks else "few_label")
