"""Sizes of whole runs that are measured, and building them."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from ignite.engine import Events
from torch.optim import Optimizer

from hjepa_engine import load_config
from hjepa_engine.handlers import OptimizerStep, StepTiming
from hjepa_engine.recipes.benchmarks.monitoring import OFF, QUIET
from hjepa_engine.recipes.common.run import Run
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build
from hjepa_engine.utils.clocks import HostClock

_VIT = ["--data.image_size=224", "--model.patch_size=16", "--model.pos_embed=sincos", "--model.levels=[{pool: 1}]"]
_VIT += ["--masking.num_masks=4", "--masking.mask_scale=[0.15, 0.2]", "--model.activation_checkpointing=false"]


def _vit(name: str, width: int, depth: int, heads: int) -> list[str]:
    return [
        *_VIT,
        *(f"--model.encoder_type=vit_{name}_patch16_224", f"--model.embed_dim={width}", f"--model.depth={depth}"),
        *(f"--model.num_heads={heads}", "--data.batch_size=32", "--model.predictor.width=384"),
        *("--model.predictor.depth=6", "--model.predictor.num_heads=12"),
    ]


#: Options of each size, over the default run's.
SIZES: dict[str, list[str]] = {
    "default": [],
    "small": [  # 32 pixels, patches of 4, I-JEPA's masks
        *("--model.patch_size=4", "--model.embed_dim=192", "--model.depth=6", "--model.num_heads=6"),
        *("--model.levels=[{pool: 1}]", "--data.batch_size=256", "--masking.num_masks=4"),
        *("--masking.mask_scale=[0.15, 0.2]", "--model.predictor.width=96", "--model.predictor.depth=4"),
    ],
    "ViT-S/16": _vit("small", 384, 12, 6),
    "ViT-B/16": _vit("base", 768, 12, 12),
    "ViT-L/16": _vit("large", 1024, 24, 16),
}
#: What varies within a size.
VARIANTS: dict[str, list[str]] = {
    "fp32": ["--training.use_amp=false"],
    "bf16": ["--training.use_amp=true"],
    "fp32 joint": ["--training.use_amp=false", "--model.predictor.targets=joint"],
    "bf16 joint": ["--training.use_amp=true", "--model.predictor.targets=joint"],
    "fp32 recompute": ["--training.use_amp=false", "--model.activation_checkpointing=true"],
    "bf16 recompute": ["--training.use_amp=true", "--model.activation_checkpointing=true"],
}
#: What cost grows with: the values of each, over the small size with batches of 16.
GROWTH: dict[str, dict[str, list[str]]] = {
    "batch size": {str(size): [f"--data.batch_size={size}"] for size in (4, 16, 64)},
    "image size": {str(size): [f"--data.image_size={size}"] for size in (24, 32, 48, 64)},
    "levels": {
        "1": [],
        "2": ["--model.levels=[{pool: 1}, {pool: 2}]"],
        "3": ["--model.levels=[{pool: 1}, {pool: 2}, {pool: image}]"],
    },
    "context_keep": {str(keep): [f"--masking.context_keep=[{keep}, {keep}]"] for keep in (0.125, 0.1875, 0.25)},
    "num_workers": {str(number): [f"--data.num_workers={number}"] for number in (0, 1, 2)},
}


class ProcessClock(HostClock):
    """The processor time of this process, with all its threads: what other work on the machine leaves as it is."""

    def now(self) -> float:
        """Seconds."""
        return time.process_time()


def make(size: str, options: list[str], folder: str, cpu_time: bool = False) -> Run:
    """A run without monitors, over images that lie in memory.

    Args:
        size: one of :data:`SIZES`.
        options: of the configuration, over the size's.
        folder: of the run.
        cpu_time: take times of parts of the step from :class:`ProcessClock`.
    """
    options = [*SIZES[size], *OFF, *QUIET, "--device=auto", *options]
    config = load_config(DEFAULT_CONFIG, [*options, f"--run_dir={folder}/run"])
    if size == "default":
        run = build(config)
    else:
        image = torch.randint(256, (3, *config.data.size), dtype=torch.uint8)
        images = [(image, 0)] * (64 * config.data.batch_size)
        run = build(config, data=(images, images[: config.data.batch_size]))
    if cpu_time:
        run.trainer.detach(run.handler(StepTiming))
        run.trainer.attach(StepTiming(ProcessClock()))
    return run


def optimizer_of(run: Run) -> Optimizer:
    """The optimizer of a run."""
    return run.handler(OptimizerStep).optimizer


class Iterations(NamedTuple):
    """Seconds of the iterations of a run."""

    mean: float
    least: float
    waited: float
    """Mean wait for the batch."""


def iterate(run: Run, number: int, clock: Callable[[], float] = time.perf_counter) -> Iterations:
    """Train on; times of ``number`` iterations, without what lies before the first and behind the last one."""
    began: list[float] = []
    got: list[float] = []
    trainer = run.trainer
    handles = [
        trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: began.append(clock())),
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: got.append(clock())),
    ]
    trainer.run(run.data, max_iters=trainer.state.iteration + number + 1)
    for handle in handles:
        handle.remove()
    waited = sum(second - first for first, second in zip(began[:number], got, strict=False))
    least = min(second - first for first, second in pairwise(began[: number + 1]))
    return Iterations((began[number] - began[0]) / number, least, waited / number)
