"""Thousands of steps and hundreds of saves in one process: memory, descriptors, threads, processes and disk do not grow."""

import contextlib
import ctypes
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from forkserver import ForkServer, living
from helpers import linear_trainer, rows
from witness import command

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.checkpoint.writer import CheckpointWriter
from hjepa_engine.handlers import Checkpointer, MetricAverager, MetricsLogger, Preemption, RetentionPolicy
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.recipes import pretrain

SAVE_EVERY = 25
PAGE = os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give back what is free: a leak must not hide in memory that the process has had from its start."""
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Writes to ``path`` what the process holds, a JSON object a line; ``disk`` is the most there ever was."""

    def __init__(self, path: Path, writer: CheckpointWriter, every: int) -> None:
        self.path, self.writer, self.every, self.most = path, writer, every, 0

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(TrainEvents.ITERATION_FINALIZED, self.weigh)
        engine.add_event_handler(TrainEvents.ITERATION_FINALIZED(every=self.every), self.sample)

    def weigh(self) -> None:
        """Weigh the folder of checkpoints, whatever the writing thread has come to."""
        self.most = max(self.most, bytes_in(self.writer.folder))

    def sample(self, engine: Any) -> None:
        self.writer.wait()  # a file that is being written has a descriptor
        gc.collect()  # what waits for the collector is no growth
        trim()
        record = {
            "iteration": engine.state.iteration,
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "processes": len(living({os.getsid(0)})),
            "disk": self.most,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def bytes_in(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # renamed or removed just now
                continue
    return total


def soak_linear(argv: list[str]) -> None:
    """A child's body: a model of two weights, with a run's saving, logging and listening. Arguments: folder, steps."""
    folder, steps = Path(argv[0]), int(argv[1])
    trainer, _ = linear_trainer(lr=1e-6, log_frequency=5)
    policy = RetentionPolicy(keep_last_n=2, keep_best_n=1, mode="max")  # the loss falls: the first one stays the best
    checkpointer = Checkpointer(
        folder / "checkpoints", policy, metric="train/loss", every_epochs=None, every_steps=SAVE_EVERY
    )
    logger = MetricsLogger([JsonlWriter(folder / "metrics.jsonl")])
    meter = Meter(folder / "meter", checkpointer.writer, 50)
    for handler in (checkpointer, logger, MetricAverager(), Preemption(), meter):
        handler.attach(trainer)
    trainer.run(rows(*[(1, 2)] * 100), max_iters=steps)
    logger.close()


def soak_recipe(argv: list[str]) -> None:
    """A child's body: a tiny run of the recipe with loader processes. Arguments: folder, then the command line."""
    folder = Path(argv[0])
    run = pretrain.build(load_config(pretrain.DEFAULT_CONFIG, argv[1:]))
    Meter(folder / "meter", run.checkpointer.writer, 25).attach(run.trainer)
    run.fit()


def measure(
    server: ForkServer, folder: Path, body: str, *arguments: str, warm: int
) -> tuple[int, dict[str, set[int]], int]:
    """Run a body; growth of the memory from iteration ``warm`` on, the values that counts took on, the most on disk."""
    child = server.start([str(folder), *arguments], folder / "err", f"{__name__}:{body}")
    assert child.wait(3000) == 0, child.said
    samples = [json.loads(line) for line in (folder / "meter").read_text().splitlines()]
    after = [sample for sample in samples if sample["iteration"] >= warm]
    counts = {name: {sample[name] for sample in after} for name in ("descriptors", "threads", "processes")}
    growth = after[-1]["memory"] - after[0]["memory"]
    print(f"\n{len(after)} samples: memory {growth / 1e6:+.3f} MB, {counts}, {after[-1]['disk'] / 1e3:.1f} kB on disk")
    return growth, counts, after[-1]["disk"]


def largest_checkpoint(folder: Path) -> int:
    return max(bytes_in(path) for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("steps", "warm", "limit"),
    [(1000, 300, 0.3e6), pytest.param(20_000, 4000, 1e6, marks=pytest.mark.slow)],
)
def test_nothing_grows_over_hundreds_of_saves(server, tmp_path, steps, warm, limit):
    growth, counts, disk = measure(server, tmp_path, "soak_linear", str(steps), warm=warm)
    assert growth <= limit
    assert {name: len(values) for name, values in counts.items()} == {"descriptors": 1, "threads": 1, "processes": 1}
    kept = 3  # the newest two and the best
    index = (tmp_path / "checkpoints" / "index.json").stat().st_size
    assert disk <= (kept + 1) * largest_checkpoint(tmp_path / "checkpoints") + 2 * index
    assert len(list((tmp_path / "checkpoints").glob("epoch_*"))) == kept


@pytest.mark.slow
def test_nothing_grows_in_the_recipe_with_loader_processes(server, tmp_path):
    run = tmp_path / "run"
    changes = {"data__num_workers": 2, "data__fake_size": 400, "checkpoint__save_every_steps": SAVE_EVERY}
    arguments = command(run, training__epochs=40, **changes)
    growth, counts, disk = measure(server, tmp_path, "soak_recipe", *arguments, warm=600)
    assert growth <= 1e6
    assert {name: len(counts[name]) for name in ("threads", "processes")} == {"threads": 1, "processes": 1}
    # Each of the two tensors of a batch on its way has one: two processes, two batches each.
    assert max(counts["descriptors"]) - min(counts["descriptors"]) <= 8
    assert disk <= 4.1 * largest_checkpoint(run / "checkpoints")
