"""Parts of a run, as a configuration asks for them."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ignite.distributed as idist
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hjepa_engine.checkpoint.retention import RetentionPolicy
from hjepa_engine.config.changes import plain_config
from hjepa_engine.config.describe import truncate
from hjepa_engine.config.schema import Config, TrainingConfig, resolve_levels
from hjepa_engine.errors import ConfigError
from hjepa_engine.loggers.base import Writer
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.loggers.tensorboard import TensorBoardWriter
from hjepa_engine.loggers.wandb import WandbWriter
from hjepa_engine.losses import LOSSES
from hjepa_engine.masking import MultiBlockMasks
from hjepa_engine.models import build_modules
from hjepa_engine.optim import build_optimizer, param_groups
from hjepa_engine.schedules import SCHEDULES, CosineScheduler, EMAScheduler, HierarchicalScheduler, Schedule
from hjepa_engine.steps import hjepa_step
from hjepa_engine.types import LossFunction, Step
from hjepa_engine.utils.arithmetic import fastest_dtype
from hjepa_engine.utils.imports import import_callable, import_object
from hjepa_engine.utils.rng import derive_seed

logger = logging.getLogger(__name__)


class Schedules(NamedTuple):
    """Functions of the optimizer step."""

    lr: Schedule
    level_lr: Callable[[int], list[float]]
    weight_decay: Schedule
    momentum: Schedule


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    idist.initialize("nccl" if choose_device(device).type == "cuda" else "gloo")
    try:
        yield
    finally:
        idist.finalize()


def choose_device(name: str) -> torch.device:
    """The device that ``name`` asks for; of several GPUs, the one of this process.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    number = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ConfigError(f"device must exist: {name} was asked for, CUDA devices here: {number}")
    if device.type == "cuda" and idist.get_world_size() > 1:
        if device.index is not None or idist.get_local_rank() >= number:
            raise ConfigError(
                f"device must be cuda, with a GPU for each process of a machine ({number} here), got {name}"
            )
        return torch.device("cuda", idist.get_local_rank())
    return device


def choose_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in; None without mixed precision."""
    if training.use_amp == "auto":
        found = fastest_dtype(device)
        return None if found == torch.float32 else found
    if not training.use_amp:
        return None
    if training.amp_dtype != "auto":
        return torch.bfloat16 if training.amp_dtype == "bfloat16" else torch.float16
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def fix_precision(config: Config) -> Config:
    """The configuration with the precision that its device is fastest in, if it asks for that."""
    training = config.training
    if training.use_amp != "auto":
        return config
    dtype = choose_amp_dtype(training, choose_device(config.device))
    if dtype is None:
        return replace(config, training=replace(training, use_amp=False))
    chosen: Literal["bfloat16", "float16"] = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return replace(config, training=replace(training, use_amp=True, amp_dtype=chosen))


def compile_modules(modules: nn.ModuleDict, device: torch.device) -> bool:
    """Compile modules in place: blocks one by one where a module has ``compile_blocks()``, others as a whole.

    Returns:
        Whether there is a compiler that works; without one, nothing has changed and a warning has been logged.
    """
    try:
        torch.compile(lambda tensor: tensor + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton or the compiler itself
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("training.compile: no compiler works here, the run goes on without: %s", truncate(reason, 100))
        return False
    for module in modules.values():
        compile_blocks = getattr(module, "compile_blocks", None)
        if compile_blocks is not None:
            compile_blocks()
        else:
            module.compile(dynamic=True)
    return True


def distribute(modules: nn.ModuleDict, device: torch.device) -> nn.ModuleDict:
    """Move modules to ``device``; with several processes, wrap the trained ones in DDP."""
    modules = modules.to(device)
    if idist.get_world_size() > 1:
        for name, module in modules.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                modules[name] = DistributedDataParallel(
                    module, [device] if device.type == "cuda" else None, broadcast_buffers=False
                )
    return modules


def build_masks(config: Config, grid: tuple[int, int]) -> MultiBlockMasks:
    """The sampler of masks.

    Raises:
        ConfigError: the masks do not fit into the grid, or leave less than ``masking.context_keep``.
    """
    masking = config.masking
    try:
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
        return make(peak, training.min_lr, training.epochs, steps_per_epoch, training.warmup_epochs)

    level_lrs = training.level_lrs or [training.lr] * len(resolve_levels(config))
    decay_end = training.weight_decay if training.weight_decay_end is None else training.weight_decay_end
    return Schedules(
        lr=lr_schedule(training.lr),
        level_lr=HierarchicalScheduler([lr_schedule(lr) for lr in level_lrs]),
        weight_decay=CosineScheduler(training.weight_decay, decay_end, training.epochs, steps_per_epoch),
        momentum=EMAScheduler(
            ema.momentum, ema.momentum_end, training.epochs, steps_per_epoch, ema.momentum_warmup_epochs
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
