"""Small runs for tests: configurations, batches, and the handlers of ``recipes/pretrain.py`` wired by hand."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hjepa_engine import Config, create_evaluator, create_trainer, load_config
from hjepa_engine.build import build_masks, build_run_optimizer, build_schedules, build_step, steps_per_epoch
from hjepa_engine.checkpoint.retention import Record
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.storage import MANIFEST, STATE, write_checkpoint
from hjepa_engine.checkpoint.writer import describe_record
from hjepa_engine.data import build_loader, open_split
from hjepa_engine.engine import Trainer
from hjepa_engine.evaluator import Evaluator
from hjepa_engine.handlers import (
    DamagedImages,
    DataPosition,
    MaskSampler,
    MetricAverager,
    MetricsLogger,
    NonFiniteGuard,
    OptimizerStep,
    ParamSchedule,
    StepSeed,
    TargetEncoderEMA,
    Throughput,
    Validation,
)
from hjepa_engine.models import build_modules
from hjepa_engine.types import Step

ROOT = Path(__file__).parent.parent

TINY: dict[str, Any] = {
    "model.encoder_type": "vit_tiny_patch16_224",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.num_hierarchies": 2,
    "model.pos_embed": "sincos",
    "model.ema.momentum": 0.9,
    "model.ema.momentum_end": 1.0,
    "model.predictor.width": 16,
    "model.predictor.depth": 1,
    "model.predictor.num_heads": 2,
    "data.image_size": 24,
    "data.crop_scale": "[0.3, 1.0]",
    "data.crop_ratio": "[0.75, 1.333]",
    "data.batch_size": 8,
    "masking.num_masks": 4,
    "masking.mask_scale": "[0.15, 0.2]",
    "training.use_amp": "false",
    "training.epochs": 2,
    "training.warmup_epochs": 1,
    "training.lr": 1e-3,
    "training.min_lr": 1e-6,
    "training.weight_decay_end": 0.4,
    "logging.log_frequency": 2,
    "logging.progress_bar": "false",
    "logging.report": "false",
    "pictures.enabled": "false",
    "device": "cpu",
}
#: 40 images of noise: quick, and enough where it does not matter what is learned.
NOISE: dict[str, Any] = {**TINY, "data.dataset": "fake", "data.fake_size": 40}


def is_time(name: str) -> bool:
    """Whether a logged value tells of clock or machine: such values differ between runs that are equal."""
    timed = name in ("time", "train/images_per_s", "train/data_wait") or name.endswith("_ms")
    return timed or name.startswith("system/")


def logged(run: Path) -> list[dict[str, Any]]:
    """The records in a run's ``metrics.jsonl``, without the values that tell of clock or machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_time(name)} for line in lines]


def mostly_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test: all of ``cases``, those that are not among ``quick`` marked as slow."""
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]


def options(values: dict[str, Any]) -> list[str]:
    """``--KEY=VALUE`` for each of ``values``."""
    return [f"--{key}={'null' if value is None else value}" for key, value in values.items()]


def tiny_config(**sections: Any) -> Config:
    """The tiny configuration over noise; ``training__lr=0.1`` sets ``training.lr``."""
    changes = {key.replace("__", "."): value for key, value in sections.items()}
    return load_config(None, options({**NOISE, **changes}))


def noise_batches(sizes: Sequence[int], channels: int = 3, image_size: int = 24) -> list[dict[str, Any]]:
    """Batches of noise whose images, laid end to end, are the same however they are cut into ``sizes``."""
    images = torch.randn(sum(sizes), channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(sum(sizes)) % 10
    return [
        {"images": image, "labels": label, "damaged": []}
        for image, label in zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True)
    ]


@dataclass
class Pretraining:
    """A trainer with the handlers of ``recipes/pretrain.py``, and the parts that tests look at."""

    config: Config
    trainer: Trainer
    evaluator: Evaluator
    data: Any
    optimizer: torch.optim.Optimizer
    ema: TargetEncoderEMA
    handlers: dict[str, Any]

    def run(self, **length: int) -> Pretraining:
        """Train for ``length``, the configured epochs by default."""
        self.trainer.run(self.data, **(length or {"max_epochs": self.config.training.epochs}))
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights by name."""
        return weights_of(self.trainer.modules)


def pretraining(
    config: Config,
    data: Any = None,
    order: int | None = None,
    extra: Sequence[Any] = (),
    scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    step: Step | None = None,
    writers: Sequence[Any] = (),
) -> Pretraining:
    """Wire a pretraining run by hand.

    Args:
        config: of the run.
        data: batches; the configured data set's by default.
        order: seed of a random order in which the handlers are attached; None: the recipe's.
        extra: handlers of the test's own, attached among the others.
        scaler: for fp16.
        amp_dtype: of autocast.
        step: the configured one by default.
        writers: of the metrics.
    """
    training, seed = config.training, config.seed
    handlers: dict[str, Any] = {}
    source = open_split(config.data, "train", seed)
    loader = build_loader(config.data, source, seed, train=True)
    val_data = build_loader(config.data, open_split(config.data, "val", seed), seed, train=False)
    if data is None:
        data, handlers["position"] = loader, DataPosition(loader.sampler)
    modules = build_modules(config)
    optimizer = build_run_optimizer(config, modules)
    schedules = build_schedules(config, steps_per_epoch(len(data), training.accumulation_steps))
    masks = build_masks(config, modules["context_encoder"].grid)
    ema = TargetEncoderEMA(modules["context_encoder"], modules["target_encoder"], config.model.ema.momentum)
    step = step or build_step(config)
    evaluator = create_evaluator(step, modules)
    evaluator_handlers = [MaskSampler(masks, seed), StepSeed(seed), MetricAverager(prefix="")]
    trainer = create_trainer(step, modules, amp_dtype=amp_dtype, log_frequency=config.logging.log_frequency)
    handlers |= {
        "damaged": DamagedImages(),
        "seed": StepSeed(seed),
        "masks": MaskSampler(masks, seed, training.accumulation_steps),
        "step": OptimizerStep(optimizer, training.accumulation_steps, training.clip_grad, scaler),
        "guard": NonFiniteGuard(training.non_finite, scaled=scaler is not None),
        "ema": ema,
        "lr": ParamSchedule(
            optimizer, "lr", schedules.lr, select=lambda group: group["level"] is None, metric="train/lr"
        ),
        "level_lr": ParamSchedule(optimizer, "lr", schedules.level_lr, select=lambda group: group["level"] is not None),
        "weight_decay": ParamSchedule(
            optimizer,
            "weight_decay",
            schedules.weight_decay,
            select=lambda group: group["decay"],
            metric="train/weight_decay",
        ),
        "momentum": ParamSchedule(ema, "momentum", schedules.momentum),
        "averages": MetricAverager(),
        "throughput": Throughput(),
        "validation": Validation(evaluator, val_data),
        "logger": MetricsLogger(writers),
        **{f"extra {number}": handler for number, handler in enumerate(extra)},
    }
    names = list(handlers)
    if order is not None:
        random.Random(order).shuffle(names)
        random.Random(order).shuffle(evaluator_handlers)
    for handler in evaluator_handlers:
        handler.attach(evaluator)
    for name in names:
        handlers[name].attach(trainer)
    return Pretraining(config, trainer, evaluator, data, optimizer, ema, handlers)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's weights by name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights have the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class LinearModel(nn.Module):
    """One weight per input, all 1 at the start."""

    def __init__(self, num_inputs: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def linear_step(modules: nn.ModuleDict, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The mean of ``x @ weight``: its gradient is the mean of x."""
    return {"loss": modules["model"](batch["x"]).mean()}


def linear_trainer(
    accumulation_steps: int = 1, clip_grad: float | None = None, lr: float = 1.0, **arguments: Any
) -> tuple[Trainer, OptimizerStep]:
    """A trainer of a linear model with plain SGD, and its optimizer step."""
    log_frequency = arguments.pop("log_frequency", 1)
    step = arguments.pop("step", linear_step)
    modules = nn.ModuleDict({"model": LinearModel()})
    trainer = create_trainer(step, modules, log_frequency=log_frequency)
    optimizer = torch.optim.SGD(modules.parameters(), lr)
    handler = OptimizerStep(optimizer, accumulation_steps, clip_grad, **arguments)
    handler.attach(trainer)
    return trainer, handler


def rows(*values: Sequence[float]) -> list[dict[str, Tensor]]:
    """Batches of one sample each."""
    return [{"x": torch.tensor([value], dtype=torch.float32)} for value in values]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def save_state(folder: Path, state: Any, iteration: int, score: float | None = None, **more: Any) -> Path:
    """Commit a checkpoint of ``state``, as if saved at the end of epoch ``iteration``; its path."""
    name = f"epoch_{iteration:04d}_step_{iteration:08d}"
    record = Record(name, iteration, iteration, iteration, True, score)
    description = describe_record(record, "val/loss", {}) | {"reasons": ["epoch"], "config": {}, "environment": {}}
    return folder / write_checkpoint(folder, name, *flatten(state), {**description, **more})


def same_state(first: Any, second: Any) -> bool:
    """Whether two nested states have the same types, order of keys, and bits; all NaN count as one."""
    if isinstance(first, Tensor):
        kind = isinstance(second, Tensor) and first.dtype == second.dtype and first.shape == second.shape
        return kind and bytes_of(first) == bytes_of(second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return repr(first) == repr(second)


def bytes_of(tensor: Tensor) -> bytes:
    """The bits of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sign_again(path: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's manifest and make its digests right, as anybody with write access can."""
    manifest = json.loads((path / MANIFEST).read_text()) | fields
    del manifest["digest"]
    if "files" not in fields:
        state = (path / STATE).read_bytes()
        manifest["files"] = {STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest | {"digest": digest}))
