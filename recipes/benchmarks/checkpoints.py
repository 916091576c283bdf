"""Measure what checkpoints cost: the time training waits, writing, reading, and the first batch of a resumed run.

    OMP_NUM_THREADS=1 python recipes/benchmarks/checkpoints.py [--megabytes 350] [--folder FOLDER]

docs/benchmarks.md quotes the output. The last part is a data set of ImageNet's size whose images cost nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from hjepa_engine import create_trainer
from hjepa_engine.checkpoint.state import resume
from hjepa_engine.checkpoint.storage import STATE
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import DatasetSplit, build_loader
from hjepa_engine.engine import Trainer
from hjepa_engine.handlers import Checkpointer, OptimizerStep, RetentionPolicy, TargetEncoderEMA
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.types import Batch, Outputs

IMAGENET = 1_281_167


def _step(modules: nn.ModuleDict, batch: Batch) -> Outputs:
    return {"loss": modules["context_encoder"](batch["images"]).square().mean()}


class _TimedCheckpointer(Checkpointer):
    """Takes the time of every save point, and of the steps between them."""

    def attach(self, engine: Trainer) -> None:
        self.blocked, self.written, self.began = list[float](), list[float](), time.perf_counter()
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        super().attach(engine)

    def save_if_due(self, engine: Trainer) -> None:
        start, due = time.perf_counter(), bool(self.reasons_to_save(engine))
        self.steps[self.writer.is_writing].append(start - self.began)
        super().save_if_due(engine)
        self.began = time.perf_counter()
        if due:
            self.blocked.append(self.began - start)
            self.written.append(self.writer.seconds)  # of the write before this one


def build(megabytes: float, folder: Path, save_every: int) -> tuple[Trainer, _TimedCheckpointer]:
    """A trainer with so large a state (weights, target, two moments)."""
    width = 512
    layers = max(1, round(megabytes * 1e6 / (4 * 4 * width * width)))
    names = ("context_encoder", "target_encoder")
    modules = nn.ModuleDict(
        {name: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))) for name in names}
    )
    modules["target_encoder"].requires_grad_(False)
    trainer = create_trainer(_step, modules)
    OptimizerStep(torch.optim.AdamW(modules["context_encoder"].parameters())).attach(trainer)
    TargetEncoderEMA(modules["context_encoder"], modules["target_encoder"]).attach(trainer)
    checkpointer = _TimedCheckpointer(folder, RetentionPolicy(keep_best_n=0), every_epochs=None, every_steps=save_every)
    checkpointer.attach(trainer)
    return trainer, checkpointer


def saves(megabytes: float, folder: Path, count: int = 6, every: int = 40) -> None:
    """Time what a save costs the training loop."""
    trainer, checkpointer = build(megabytes, folder, every)
    batch = {"images": torch.zeros(16, 512)}
    trainer.run([batch] * (count * every + 20), max_epochs=1)
    checkpointer.close()
    assert checkpointer.writer.newest is not None
    size = (checkpointer.writer.newest / STATE).stat().st_size / 1e6
    print(f"state of {size:.0f} MB, {count} saves, {every} steps apart")
    first, *later = checkpointer.blocked[:count]
    print(f"training waits for the copy: first {first:.3f} s, later {min(later):.3f} to {max(later):.3f} s")
    quiet, busy = (1e3 * statistics.median(checkpointer.steps[writing]) for writing in (False, True))
    print(f"a step takes {quiet:.0f} ms, {busy:.0f} ms while a checkpoint is being written ({busy / quiet:.2f} x)")
    print(f"written and synced in {statistics.median(checkpointer.written[1:]):.2f} s (median)")
    other, _ = build(megabytes, folder, every)
    start = time.perf_counter()
    resume(other, folder)
    print(f"verified, read and restored in {time.perf_counter() - start:.2f} s\n")


class _Images:
    """As many images as ImageNet has, all the same one."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (8, 8))

    def __len__(self) -> int:
        return IMAGENET

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image, 0


def first_batches() -> None:
    """Time from the start of an epoch's rest to its first batch."""
    source = DatasetSplit(_Images(), ("a",), ((0.5,) * 3, (0.5,) * 3))
    print(f"first batch of 256 out of {IMAGENET} images, after a resume at")
    for workers in (0, 2):
        config = DataConfig(dataset="fake", image_size=8, batch_size=256, num_workers=workers, pin_memory=False)
        times = []
        for share in (0.0, 0.5, 0.95):
            loader = build_loader(config, source, 0, train=True)
            loader.sampler.set_position(3, int(share * len(loader)))
            start = time.perf_counter()
            next(iter(loader))
            times.append(f"{share:4.0%} of the epoch {time.perf_counter() - start:.2f} s")
        print(f"  {workers} workers: {', '.join(times)}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=350, help="size of the state")
    parser.add_argument("--folder", type=Path, help="where to write to (default: a temporary folder)")
    options = parser.parse_args()
    print(machine() + "\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saves(options.megabytes, Path(folder))
    first_batches()


if __name__ == "__main__":
    main()
