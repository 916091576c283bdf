"""The parts of a pretraining run, and how they become one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from hjepa_engine import Config, create_evaluator, create_trainer
from hjepa_engine.build import (
    build_handlers,
    build_masks,
    build_model,
    build_policy,
    build_run_optimizer,
    build_schedules,
    build_step,
    build_writers,
    steps_per_epoch,
)
from hjepa_engine.config.changes import plain_config
from hjepa_engine.data import DatasetSplit, ImageLoader, build_loader, describe, open_split, passed_splits
from hjepa_engine.data.channel_stats import with_stats
from hjepa_engine.data.summary import why_unlabeled
from hjepa_engine.devices import choose_amp_dtype, choose_device, compile_modules, distribute, fix_precision
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.handlers import (
    Checkpointer,
    CollapseGuard,
    DamagedImages,
    DataPosition,
    EarlyStopping,
    EncoderExport,
    MaskSampler,
    MetricAverager,
    MetricsLogger,
    NonFiniteGuard,
    OptimizerStep,
    ParamSchedule,
    Preemption,
    ProgressBar,
    StepSeed,
    TargetEncoderEMA,
    Throughput,
    Validation,
    WeightCheck,
)
from hjepa_engine.metrics.names import KNN, ONLINE_LINEAR
from hjepa_engine.models import ContextEncoder, encoder_name
from hjepa_engine.recipes.common.monitoring import build_monitors
from hjepa_engine.recipes.common.run import Datasets, Run, with_passed_data
from hjepa_engine.run.folder import RunFolder, own_folders
from hjepa_engine.run.measured import fix_stats, recall
from hjepa_engine.types import Step, unwrap
from hjepa_engine.utils.distributed import take_from_rank_zero
from hjepa_engine.utils.gradients import can_hold

#: What ``build`` takes for modules: the modules, or a function that makes them for a configuration.
Modules = nn.ModuleDict | Callable[[Config], nn.ModuleDict]


class Data(NamedTuple):
    """The two splits of a run, and their loaders."""

    train: DatasetSplit
    val: DatasetSplit
    loader: ImageLoader
    val_loader: ImageLoader
    config: Config
    """That of the run, with the normalization that was measured."""


def build_run(
    config: Config,
    *,
    step: Step | None = None,
    modules: Modules | None = None,
    handlers: Sequence[Any] = (),
    data: Datasets | None = None,
) -> Run:
    """See :func:`hjepa_engine.recipes.pretrain.build`."""
    config = fix_precision(recall(config if data is None else with_passed_data(config)))
    loaded = build_data(config, data)
    config = loaded.config
    folder = RunFolder(config, describe(loaded.train, loaded.val))
    made = build_model(config, modules)
    encoder = encoder_name(config, made)
    # Modules that were passed in cannot be built again; those in shards cannot be copied.
    keeps = modules is not None and config.probe.enabled and encoder is not None
    initial = copy.deepcopy(made[encoder]).cpu() if keeps and encoder else None
    if initial is not None:
        take_from_rank_zero(initial, choose_device(config.device))  # what all ranks train from
    trainer = build_trainer(config, step, made)
    attached = [*default_handlers(config, trainer, loaded, folder), *build_handlers(config), *handlers]
    trainer.attach(*attached)
    return Run(config, trainer, loaded.loader, loaded.val_loader, folder, attached, encoder, initial)


def build_data(config: Config, data: Datasets | None = None) -> Data:
    """Training and validation images, with their loaders.

    Args:
        config: of the run.
        data: the data sets; those that the configuration names by default.
    """
    _check_regularizers(config)
    exclude = own_folders(config)
    passed = None if data is None else passed_splits(data)

    def opened(config: Config, name: Literal["train", "val"]) -> DatasetSplit:
        if passed is None:
            return open_split(config.data, name, config.seed, exclude)
        return with_stats(config.data, passed[name], passed["train"], config.seed)

    train = opened(config, "train")
    why = why_unlabeled(train)
    if why and config.checkpoint.metric in (KNN, ONLINE_LINEAR):
        raise DataError(f"checkpoint.metric must not be a probe's, got {config.checkpoint.metric}: {why}")
    config = replace(config, data=fix_stats(config.data, train.stats))
    val = opened(config, "val")
    device = choose_device(config.device)
    loader = build_loader(config.data, train, config.seed, train=True, device=device)
    val_loader = build_loader(config.data, val, config.seed, train=False, device=device)
    return Data(train, val, loader, val_loader, config)


def _check_regularizers(config: Config) -> None:
    """Refuse regularizers that would compare an image with itself alone."""
    loss, batch_size = config.loss, config.data.batch_size
    for name in ("variance", "covariance", "sigreg"):
        if config.step is None and getattr(loss, f"{name}_weight") > 0 and batch_size < 2:
            raise ConfigError(
                f"data.batch_size must be at least 2 where loss.{name}_weight is above 0, got {batch_size}"
            )


def build_trainer(config: Config, step: Step | None = None, modules: Modules | None = None) -> Trainer:
    """The engine with its step and modules, on their device, and no handler.

    Args:
        config: of the run.
        step: the configured one by default.
        modules: the configured ones by default.
    """
    device = choose_device(config.device)
    if step is not None and not callable(step):
        raise ConfigError(f"step must be a function (modules, batch), got {step!r}")
    made = build_model(config, modules)
    if config.training.compile:
        compile_modules(made, device)
    return create_trainer(
        step or build_step(config),
        distribute(made, device, config.distributed.strategy),
        device=device,
        amp_dtype=choose_amp_dtype(config.training, device),
        log_frequency=config.logging.log_frequency,
    )


def default_handlers(config: Config, trainer: Trainer, data: Data, folder: RunFolder) -> list[Any]:
    """Handlers of a pretraining run, to be attached: training, validation, logs, checkpoints, monitors, export.

    What the modules have no use for is left out: masks and the EMA of a target encoder need ``context_encoder`` and
    ``target_encoder``.

    Args:
        config: of the run.
        trainer: its engine, whose modules are trained.
        data: of the run.
        folder: of the run.
    """
    preemption = Preemption(config.training.time_limit)
    evaluator = create_evaluator(trainer.step, trainer.modules, trainer.device, trainer.amp_dtype)
    preemption.watch(evaluator)
    for handler in _masks(config, trainer, accumulation_steps=1):
        handler.attach(evaluator)
    StepSeed(config.seed).attach(evaluator)
    MetricAverager(prefix="").attach(evaluator)
    largest_share = config.data.max_damaged
    DamagedImages(largest_share, len(data.val.images), "validation", "damaged").attach(evaluator)
    damaged = DamagedImages(largest_share, len(data.train.images))
    guard, checkpoint = CollapseGuard(**vars(config.guard)), config.checkpoint
    return [
        *_training(config, trainer, data, damaged, scale=lambda: guard.lr_multiplier),
        guard,
        Validation(evaluator, data.val_loader),
        MetricsLogger(build_writers(config, folder.path, folder.log_path)),
        Checkpointer(
            folder.checkpoint_path,
            build_policy(config),
            metric=checkpoint.metric,
            every_epochs=checkpoint.save_frequency,
            every_steps=checkpoint.save_every_steps,
            every_minutes=checkpoint.save_every_minutes,
            keep_before=lambda: guard.first_untrusted_iteration,
            config=plain_config(config),
            data=folder.data,
            on_saved=lambda path, saved: folder.write_status("running", step=saved["step"], checkpoint=path),
        ),
        preemption,
        *([WeightCheck(every)] if (every := config.distributed.weight_check_every) else []),
        *([EarlyStopping(config.training.early_stopping)] if config.training.early_stopping else []),
        *([ProgressBar()] if config.logging.progress_bar else []),
        *_export(config, trainer, data, folder),
        *build_monitors(config, trainer, data.train, data.val, preemption, damaged),
    ]


def _training(
    config: Config, trainer: Trainer, data: Data, damaged: DamagedImages, scale: Callable[[], float]
) -> list[Any]:
    """What changes weights, and what it needs; ``scale`` gives a factor of every learning rate."""
    training, modules = config.training, trainer.modules
    optimizer = build_run_optimizer(config, modules)
    schedules = build_schedules(config, steps_per_epoch(len(data.loader), training.accumulation_steps))
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.amp_dtype == torch.float16)
    can_wait = training.non_finite == "stop" and not scaler.is_enabled() and can_hold(optimizer)
    on_device = trainer.device.type == "cuda" and can_wait
    level_lr_metric = "train/lr" if training.level_lrs else None  # else it is train/lr itself
    lr_schedule = partial(ParamSchedule, optimizer, "lr", scale=scale)
    handlers = [
        DataPosition(data.loader.sampler),
        damaged,
        StepSeed(config.seed),
        *_masks(config, trainer, training.accumulation_steps),
        OptimizerStep(optimizer, training.accumulation_steps, training.clip_grad, scaler),
        NonFiniteGuard(training.non_finite, scaled=scaler.is_enabled(), on_device=on_device),
        lr_schedule(schedules.lr, select=lambda group: group["level"] is None, metric="train/lr"),
        lr_schedule(schedules.level_lr, select=lambda group: group["level"] is not None, metric=level_lr_metric),
        ParamSchedule(
            optimizer, "weight_decay", schedules.weight_decay, select=itemgetter("decay"), metric="train/weight_decay"
        ),
        MetricAverager(),
        Throughput(),
    ]
    if "context_encoder" in modules and "target_encoder" in modules:
        ema = TargetEncoderEMA(modules["context_encoder"], modules["target_encoder"], config.model.ema.momentum)
        handlers += [ema, ParamSchedule(ema, "momentum", schedules.momentum)]
    return handlers


def _masks(config: Config, trainer: Trainer, accumulation_steps: int) -> list[MaskSampler]:
    encoder = unwrap(trainer.modules["context_encoder"]) if "context_encoder" in trainer.modules else None
    grid = getattr(encoder, "grid", None)
    return [] if grid is None else [MaskSampler(build_masks(config, grid), config.seed, accumulation_steps)]


def _export(config: Config, trainer: Trainer, data: Data, folder: RunFolder) -> list[EncoderExport]:
    name = encoder_name(config, trainer.modules)
    if name is None:
        return []
    encoder = trainer.modules[name]
    # Of an encoder of the user's own, weights alone: it is built by code that a file cannot hold.
    how = {"encoder": unwrap(encoder).arguments} if isinstance(unwrap(encoder), ContextEncoder) else {"module": name}
    return [EncoderExport(encoder, folder.path / "encoder", {**how, "stats": data.train.stats})]
