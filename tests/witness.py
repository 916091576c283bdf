"""Tiny runs as processes of their own, and what they leave: on disk, and in a witness's file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from helpers import NOISE, is_time, logged, options

from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.storage import Checkpoint, read_state


class Witness:
    """A handler that writes what it sees to ``path``, a JSON object a line.

    Each has ``iteration`` and ``what``: ``began``, ``trained`` (an iteration is complete) or ``validated``; the first one
    of a process has ``strays`` too, temporary files in the run folder once all of the run has started.

    Args:
        path: appended to.
        run_dir: of the run.
        pause: seconds that every iteration takes longer.
    """

    def __init__(self, path: str, run_dir: str, pause: float = 0.0) -> None:
        self.run_dir, self.pause = Path(run_dir), pause
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, last of all handlers."""
        from ignite.engine import Events

        from hjepa_engine import TrainEvents

        for event, what in (
            (Events.STARTED, "began"),
            (TrainEvents.ITERATION_FINALIZED, "trained"),
            (Events.EPOCH_COMPLETED, "validated"),
        ):
            engine.add_event_handler(event, self.write, what)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: time.sleep(self.pause))

    def write(self, engine: Any, what: str) -> None:
        """Write a line."""
        record = {"what": what, "iteration": engine.state.iteration}
        if what == "began":
            record["strays"] = strays_in(self.run_dir)
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())


def strays_in(run: Path) -> list[str]:
    """Hidden files and folders, at any depth, that a finished or just started run has no use for."""
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


#: Seconds, with validation, three epochs of five iterations, and a save after every fourth step.
TINY_RUN = {
    **NOISE,
    "training.epochs": 3,
    "checkpoint.save_every_steps": 4,
    "probe.enabled": "false",
    "logging.tensorboard.enabled": "false",
}


def command(run: Path, pause: float = 0.0, **changes: Any) -> list[str]:
    """Options of a tiny run in folder ``run``, witnessed beside it; ``data__num_workers=2`` sets ``data.num_workers``."""
    arguments = {"path": str(run.with_suffix(".jsonl")), "run_dir": str(run), "pause": pause}
    witness = {"class_path": "witness.Witness", "init_args": arguments}
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return options({**TINY_RUN, "run_dir": run, "handlers": json.dumps([witness]), **named})


def witnessed(run: Path, what: str = "") -> list[dict[str, Any]]:
    """What the witness has seen, or the part of it that is ``what``."""
    path = run.with_suffix(".jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for line in lines if (record := json.loads(line))["what"] == what or not what]


def checkpoints_of(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints of a run that can be loaded, newest first, and what is wrong with others; changes nothing."""
    problems: list[str] = []
    loadable = []
    for checkpoint in list_checkpoints(run / "checkpoints", lambda path, error: problems.append(f"{path}: {error}")):
        try:
            read_state(checkpoint)
            loadable.append(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(f"{checkpoint.path}: {error}")
    return loadable, problems


def outcome(run: Path) -> tuple[Any, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a run leaves and time has no part in: structure and tensors of its last checkpoint, all of them, and its log."""
    text, tensors = flatten(read_state(list_checkpoints(run / "checkpoints")[0]))
    structure = json.loads(text)
    values = structure["engine"]["metrics"]["values"]
    structure["engine"]["metrics"]["values"] = {name: values[name] for name in values if not is_time(name)}
    structure["handlers"]["MetricsLogger"]["writers"]["JsonlWriter"].pop("bytes")  # as long as its numbers are
    log = logged(run)
    assert len(tensors) > 150 and len(log) > 3  # modules, target encoder and optimizer; or nothing is compared
    return structure, tensors, log


def is_same(one: Any, other: Any) -> bool:
    """Whether two outcomes have the same bits."""
    (structure, tensors, log), (other_structure, other_tensors, other_log) = one, other
    equal = tensors.keys() == other_tensors.keys() and all(torch.equal(tensors[k], other_tensors[k]) for k in tensors)
    return equal and structure == other_structure and log == other_log
