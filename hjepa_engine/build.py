"""Parts of a run, as a configuration asks for them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from torch import nn

from hjepa_engine.checkpoint.retention import RetentionPolicy
from hjepa_engine.config.changes import plain_config
from hjepa_engine.config.schema import Config, resolve_levels
from hjepa_engine.errors import ConfigError
from hjepa_engine.loggers.base import Writer
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.loggers.tensorboard import TensorBoardWriter
from hjepa_engine.loggers.wandb import WandbWriter
from hjepa_engine.losses import LOSSES
from hjepa_engine.masking import MaskSource, MultiBlockMasks, RandomMasks
from hjepa_engine.models import build_modules
from hjepa_engine.optim import build_optimizer, param_groups
from hjepa_engine.schedules import SCHEDULES, CosineScheduler, EMAScheduler, HierarchicalScheduler, Schedule
from hjepa_engine.steps import hjepa_step
from hjepa_engine.types import LossFunction, Step
from hjepa_engine.utils.imports import import_callable, import_object
from hjepa_engine.utils.rng import derive_seed


class Schedules(NamedTuple):
    """Functions of the optimizer step."""

    lr: Schedule
    level_lr: Callable[[int], list[float]]
    weight_decay: Schedule
    momentum: Schedule


def build_masks(config: Config, grid: tuple[int, int]) -> MaskSource:
    """The sampler of masks.

    Raises:
        ConfigError: the masks do not fit into the grid, or leave less than ``masking.context_keep``.
    """
    masking = config.masking
    try:
        if masking.type == "random":
            return RandomMasks(grid, masking.context_keep or (0.25, 0.25))
        return MultiBlockMasks(
            grid,
            masking.num_masks,
            target_scale=masking.mask_scale,
            aspect_ratio=masking.aspect_ratio,
            context_scale=masking.context_scale,
            context_keep=masking.context_keep,
        )
    except ValueError as error:
        words = str(error).replace("target_scale", "mask_scale")
        raise ConfigError(f"masking{'.' if words.startswith('context_keep ') else ': '}{words}") from error


def build_loss(name: str) -> LossFunction:
    """A loss by name or dotted path.

    Raises:
        ConfigError: it is unknown.
    """
    if name in LOSSES:
        return LOSSES[name]
    if "." not in name:
        raise ConfigError(f"loss.type must be {', '.join(LOSSES)} or a dotted path, got {name!r}")
    try:
        return import_object(name)
    except ValueError as error:
        raise ConfigError(f"loss.type: {error}") from error


def build_step(config: Config) -> Step:
    """The step that ``step`` names, or H-JEPA's with the configured loss and regularizers.

    Raises:
        ConfigError: it cannot be imported or refuses its arguments.
    """
    if config.step is not None:
        made = import_callable("step", config.step.class_path)
        with _arguments_of("step.init_args"):
            if isinstance(made, type):
                return made(**config.step.init_args)
            inspect.signature(made).bind(None, None, **config.step.init_args)
            return partial(made, **config.step.init_args)
    loss = config.loss
    weights = {"variance": loss.variance_weight, "covariance": loss.covariance_weight, "sigreg": loss.sigreg_weight}
    regularizers = {name: weight for name, weight in weights.items() if weight > 0}
    return partial(hjepa_step, loss_fn=build_loss(loss.type), regularizers=regularizers)


def build_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a run of ``training.epochs`` epochs of ``steps_per_epoch`` optimizer steps."""
    training, ema = config.training, config.model.ema

    def lr_schedule(peak: float) -> Schedule:
        make = SCHEDULES[training.lr_schedule]
        start = min(training.start_lr, peak)
        return make(
            peak,
            training.min_lr,
            epochs=training.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=training.warmup_epochs,
            start=start,
        )

    level_lrs = training.level_lrs or [training.lr] * len(resolve_levels(config))
    decay_end = training.weight_decay if training.weight_decay_end is None else training.weight_decay_end
    return Schedules(
        lr=lr_schedule(training.lr),
        level_lr=HierarchicalScheduler([lr_schedule(lr) for lr in level_lrs]),
        weight_decay=CosineScheduler(training.weight_decay, decay_end, training.epochs, steps_per_epoch),
        momentum=EMAScheduler(
            ema.momentum,
            ema.momentum_end,
            training.epochs,
            steps_per_epoch,
            warmup_epochs=ema.momentum_warmup_epochs,
            start=ema.momentum_start,
            shape=ema.schedule,
        ),
    )


def steps_per_epoch(batches: int, accumulation_steps: int) -> int:
    """Optimizer steps in an epoch of ``batches`` micro-batches; the last window may be shorter."""
    return math.ceil(batches / accumulation_steps)


def build_run_optimizer(config: Config, modules: nn.ModuleDict) -> torch.optim.Optimizer:
    """The configured optimizer over everything that is trained.

    Raises:
        ConfigError: it is unknown or refuses its arguments.
    """
    training = config.training
    groups = param_groups(modules, training.weight_decay)
    if not groups:
        raise ConfigError(f"the modules {', '.join(modules) or '(there are none)'} have no trainable parameters")
    try:
        return build_optimizer(training.optimizer, groups, training.lr, training.betas, **training.optimizer_args)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training.optimizer: {error}") from error


def build_policy(config: Config) -> RetentionPolicy:
    """Which checkpoints stay."""
    options = config.checkpoint
    return RetentionPolicy(options.keep_last_n, options.keep_best_n, options.keep_every_epochs, options.mode)


def build_handlers(config: Config) -> list[Any]:
    """Instances of the handlers that ``handlers`` names.

    Raises:
        ConfigError: a class cannot be imported, has no ``attach``, or refuses its arguments.
    """
    built = []
    for number, spec in enumerate(config.handlers):
        cls = import_callable(f"handlers[{number}]", spec.class_path)
        if not callable(getattr(cls, "attach", None)):
            raise ConfigError(f"handlers[{number}].class_path: {spec.class_path} must have a method attach(engine)")
        with _arguments_of(f"handlers[{number}].init_args"):
            inspect.signature(cls).bind(**spec.init_args)
            built.append(cls(**spec.init_args))
    return built


def build_model(config: Config, make: Callable[..., nn.ModuleDict] | nn.ModuleDict | None = None) -> nn.ModuleDict:
    """The modules of a run, initialized from ``config.seed``.

    Args:
        config: of the run.
        make: the modules, or a function that makes them, called with ``config`` where it takes an argument; by default what
            ``model.class_path`` names (called with ``model.init_args``, and ``config`` if it names that), or H-JEPA's.

    Raises:
        ConfigError: the modules cannot be made, or are not an ``nn.ModuleDict``.
    """
    path, arguments = config.model.class_path, config.model.init_args
    if isinstance(make, nn.ModuleDict):
        return make
    if make is None and path is None:
        return build_modules(config)
    key, name = ("modules", getattr(make, "__name__", "it")) if make is not None else ("model.class_path", str(path))
    if make is None:
        make = import_callable("model", name)
    elif isinstance(make, nn.Module) or not callable(make):
        raise ConfigError(f"modules must be an nn.ModuleDict or a function that makes one, got {type(make).__name__}")
    with torch.random.fork_rng(devices=[]), _arguments_of("model.init_args" if key == "model.class_path" else key):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        parameters = inspect.signature(make).parameters
        if "config" in parameters:
            modules = make(**arguments, config=config)
        elif key == "modules" and any(each.default is each.empty for each in parameters.values()):
            modules = make(config)
        else:
            modules = make(**arguments)
    if not isinstance(modules, nn.ModuleDict):
        raise ConfigError(f"{key}: {name} must return an nn.ModuleDict, got {type(modules).__name__}")
    return modules


@contextmanager
def _arguments_of(key: str) -> Iterator[None]:
    """Turn what wrong arguments raise into a line about ``key``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{key}: {error}") from error


def build_writers(config: Config, folder: Path, log_folder: Path) -> list[Writer]:
    """The configured writers, to be opened by whoever uses them; none on ranks other than 0.

    Args:
        config: of the run.
        folder: the run folder, for ``metrics.jsonl``.
        log_folder: where ``tensorboard/`` and ``wandb/`` go.
    """
    if idist.get_rank() != 0:
        return []
    options = config.logging
    writers: list[Writer] = [JsonlWriter(folder / "metrics.jsonl")]
    if options.tensorboard.enabled:
        writers.append(TensorBoardWriter(log_folder / "tensorboard"))
    if options.wandb.enabled:
        wandb = options.wandb
        writers.append(
            WandbWriter(
                folder=log_folder,
                config=plain_config(config),
                project=wandb.project,
                name=options.experiment_name,
                entity=wandb.entity,
                tags=wandb.tags,
                mode=wandb.mode,
            )
        )
    return writers
