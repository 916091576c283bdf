"""Pretrain an H-JEPA on images without labels, then judge its target encoder with a linear probe.

    python recipes/pretrain.py                # pages of digits, about two minutes; again: goes on where it was stopped
    python recipes/pretrain.py --config recipes/configs/cifar10.yaml --data.data_path data/cifar10
    torchrun --nproc_per_node 2 recipes/pretrain.py --config ...         # several GPUs

I-JEPA (arXiv:2301.08243) with a hierarchy of levels; docs/architecture.md has the timeline that handlers attach to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import ignite.distributed as idist
import torch

from hjepa_engine import Config, create_evaluator, create_trainer
from hjepa_engine.build import (
    build_handlers,
    build_masks,
    build_policy,
    build_run_optimizer,
    build_schedules,
    build_step,
    build_writers,
    choose_amp_dtype,
    choose_device,
    distribute,
    process_group,
    steps_per_epoch,
)
from hjepa_engine.config.changes import plain_config
from hjepa_engine.data import build_loader, open_split
from hjepa_engine.handlers import (
    Checkpointer,
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
)
from hjepa_engine.models import build_modules, encoder_arguments
from hjepa_engine.recipes.common.monitoring import build_monitors
from hjepa_engine.recipes.common.preview import preview
from hjepa_engine.recipes.common.run import Run
from hjepa_engine.recipes.linear_probe import describe
from hjepa_engine.run.cli import read_config, run_command
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.types import unwrap

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digit_pages.yaml"


def build(config: Config) -> Run:
    """Build every part and attach every handler; writes nothing yet."""
    training, seed, device = config.training, config.seed, choose_device(config.device)
    amp_dtype = choose_amp_dtype(training, device)
    train, val = (open_split(config.data, split, seed) for split in ("train", "val"))
    data, sampler = build_loader(config.data, train, seed, train=True)
    val_data, _ = build_loader(config.data, val, seed, train=False)

    modules = distribute(build_modules(config), device)
    context_encoder, target_encoder = modules["context_encoder"], modules["target_encoder"]
    optimizer = build_run_optimizer(config, modules)
    masks, step = build_masks(config, unwrap(context_encoder).grid), build_step(config)
    schedules = build_schedules(config, steps_per_epoch(len(data), training.accumulation_steps))
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    ema = TargetEncoderEMA(context_encoder, target_encoder, config.model.ema.momentum)
    folder = RunFolder(config)
    level_lr_metric = "train/lr" if training.level_lrs else None  # else it is train/lr itself
    logger = MetricsLogger(build_writers(config, folder.path, folder.log_path))
    checkpointer = Checkpointer(
        folder.checkpoint_path,
        build_policy(config),
        config.checkpoint.metric,
        config.checkpoint.save_frequency,
        config.checkpoint.save_every_steps,
        config.checkpoint.save_every_minutes,
        plain_config(config),
        lambda path, saved: folder.write_status("running", saved["step"], checkpoint=path),
    )
    preemption = Preemption(training.time_limit)

    evaluator = create_evaluator(step, modules, device, amp_dtype)
    for handler in (MaskSampler(masks, seed), StepSeed(seed), MetricAverager(prefix="")):
        handler.attach(evaluator)
    preemption.watch(evaluator)

    trainer = create_trainer(step, modules, device, amp_dtype, config.logging.log_frequency)
    handlers = [
        DataPosition(sampler),
        DamagedImages(config.data.max_damaged),
        StepSeed(seed),
        MaskSampler(masks, seed, training.accumulation_steps),
        OptimizerStep(optimizer, training.accumulation_steps, training.clip_grad, scaler),
        NonFiniteGuard(training.non_finite, scaled=scaler.is_enabled()),
        ema,
        ParamSchedule(optimizer, "lr", schedules.lr, lambda group: group["level"] is None, "train/lr"),
        ParamSchedule(optimizer, "lr", schedules.level_lr, lambda group: group["level"] is not None, level_lr_metric),
        ParamSchedule(optimizer, "weight_decay", schedules.weight_decay, itemgetter("decay"), "train/weight_decay"),
        ParamSchedule(ema, "momentum", schedules.momentum),
        MetricAverager(),
        Throughput(),
        Validation(evaluator, val_data),
        EncoderExport(
            target_encoder, folder.path / "encoder", {"encoder": encoder_arguments(config), "stats": train.stats}
        ),
        logger,
        checkpointer,
        preemption,
        *([EarlyStopping(training.early_stopping)] if training.early_stopping else []),
        *([ProgressBar()] if config.logging.progress_bar else []),
        *build_monitors(config, trainer, train, val, preemption),
        *build_handlers(config),
    ]
    for handler in handlers:
        handler.attach(trainer)
    return Run(config, trainer, data, val_data, logger, folder, checkpointer, preemption)


def main(argv: Sequence[str]) -> None:
    """Pretrain as the command line says."""
    config = read_config(__doc__ or "", DEFAULT_CONFIG, argv, lambda config: preview(config, build))
    if config is None:
        return
    with process_group(config.device):
        folder = RunFolder(config)
        finished = folder.finished_results()
        idist.barrier()  # rank 0 is about to write there
        results = finished
        if finished is None:
            run = build(config)
            if idist.get_rank() == 0:
                print(run.describe(), flush=True)
            results = run.fit()
        if idist.get_rank() == 0:
            print(f"\nrun folder: {folder.path}" + ("" if finished is None else " (was finished already)"))
            if (folder.path / "report.html").exists():
                print(f"report:     {folder.path / 'report.html'}")
            if results:
                print(describe(results, config))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
