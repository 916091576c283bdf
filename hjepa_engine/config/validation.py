"""What must hold between the keys of a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hjepa_engine.metrics.names import ALPHA_REQ, COLLAPSE, FINAL_PROBES, KNN, LIDAR, ONLINE_LINEAR, better

#: Data sets that ``data.download`` fetches.
DOWNLOADABLE = ("cifar10", "cifar100", "stl10")
#: Data sets that read no files of ``data.data_path``.
WITHOUT_FILES = ("digit_pages", "digits", "fake", "passed")


def broken_rules(config: Any) -> Iterator[str]:
    """What is wrong with a :class:`~hjepa_engine.config.schema.Config`, one line each: key, rule, value."""
    for key in (
        "data.crop_scale",
        "data.crop_ratio",
        "masking.mask_scale",
        "masking.aspect_ratio",
        "masking.context_scale",
        "masking.context_keep",
    ):
        section, name = key.split(".")
        pair = getattr(getattr(config, section), name)
        if pair is not None and pair[0] > pair[1]:
            yield f"{key} must be ordered, smallest first, got {list(pair)}"
    if config.data.class_path is None and config.data.dataset not in WITHOUT_FILES:
        path = config.data.data_path or "data"
        run = os.path.abspath(config.run_dir or os.path.join("runs", config.logging.experiment_name))
        if os.path.commonpath([run, os.path.abspath(path)]) == run:
            yield f"data.data_path must not be in the run folder, which may be set aside, got {path}"
    model, loss, training = config.model, config.loss, config.training
    for key, values in (("data.mean", config.data.mean), ("data.std", config.data.std)):
        if isinstance(values, list) and len(values) != config.data.channels:
            yield f"{key} must have one value per channel ({config.data.channels}), got {values}"
    if config.data.rand_augment and config.data.channels not in (1, 3):
        yield f"data.rand_augment must be 0 for images of {config.data.channels} channels, got {config.data.rand_augment}"
    if config.data.in_memory and (config.data.class_path or config.data.dataset == "passed"):
        yield "data.in_memory must be false for a data set of your own, which may keep its images itself, got True"
    if config.data.hub_name is not None and config.data.dataset != "huggingface":
        yield f"data.hub_name must be null where data.dataset is {config.data.dataset}, got {config.data.hub_name}"
    if config.data.download and config.data.dataset not in DOWNLOADABLE:
        yield f"data.download must be false where data.dataset is {config.data.dataset}, got True"
    if model.levels is not None:
        if not model.levels:
            yield "model.levels must name at least one level, got []"
        if model.num_hierarchies not in (None, len(model.levels)):
            yield (
                f"model.num_hierarchies must be the number of model.levels ({len(model.levels)}), "
                f"got {model.num_hierarchies}"
            )
        if loss.hierarchy_weights is not None:
            yield f"loss.hierarchy_weights must be null where model.levels are given, got {loss.hierarchy_weights}"
    number = model.num_levels
    for key, values in (("loss.hierarchy_weights", loss.hierarchy_weights), ("training.level_lrs", training.level_lrs)):
        if values is not None and len(values) != number:
            yield f"{key} must have one value per level ({number}), got {len(values)}"
    key, weights = "loss.hierarchy_weights", loss.hierarchy_weights
    if model.levels is not None:
        key, weights = "model.levels", [level.weight for level in model.levels]
    if weights is not None and not any(weights):
        yield f"{key} must weight at least one level above 0, got {weights}"
    if config.masking.type == "random":
        if model.predictor.targets != "joint":  # each patch would be a sequence of its own, with the whole context
            yield f"model.predictor.targets must be joint where masking.type is random, got {model.predictor.targets}"
        pools = [level.pool for level in model.levels or ()]
        if any(pool not in (1, "image") for pool in pools):
            yield f"model.levels must have pool 1 or image where masking.type is random (single patches), got {pools}"
        if model.levels is None and (model.num_hierarchies or 1) > 1:
            yield (
                "model.num_hierarchies must be null or 1 where masking.type is random (single patches), "
                f"got {model.num_hierarchies}"
            )
    for key, value in (
        ("training.warmup_epochs", training.warmup_epochs),
        ("model.ema.momentum_warmup_epochs", model.ema.momentum_warmup_epochs),
    ):
        if value > training.epochs:
            yield f"{key} must be at most training.epochs ({training.epochs}), got {value}"
    for key in ("min_lr", "start_lr"):
        if getattr(training, key) > training.lr:
            yield f"training.{key} must be at most training.lr ({training.lr}), got {getattr(training, key)}"
    if model.ema.momentum_start is not None and not model.ema.momentum_warmup_epochs:
        yield (
            "model.ema.momentum_start must be null without model.ema.momentum_warmup_epochs, "
            f"got {model.ema.momentum_start}"
        )
    if training.start_lr and not training.warmup_epochs:
        yield f"training.start_lr must be 0 without training.warmup_epochs, got {training.start_lr}"
    if model.patch_size is not None and any(side % model.patch_size for side in config.data.size):
        yield f"data.image_size must be a multiple of model.patch_size ({model.patch_size}), got {config.data.image_size}"
    if model.embed_dim is not None and model.embed_dim % 4:
        yield f"model.embed_dim must be a multiple of 4, got {model.embed_dim}"
    if None not in (model.embed_dim, model.num_heads) and model.embed_dim % model.num_heads:
        yield f"model.num_heads must divide model.embed_dim ({model.embed_dim}), got {model.num_heads}"
    predictor = model.predictor
    if predictor.width % 4 or predictor.width % predictor.num_heads:
        yield (
            f"model.predictor.width must be a multiple of 4 and of num_heads ({predictor.num_heads}), got {predictor.width}"
        )
    checkpoint = config.checkpoint
    if model.init_parts is not None and model.init_from is None:
        yield f"model.init_parts must be null without model.init_from, got {model.init_parts}"
    if model.init_parts is not None and not model.init_parts:
        yield "model.init_parts must name at least one module, or be null, got []"
    if model.init_parts is not None and len(set(model.init_parts)) < len(model.init_parts):
        yield f"model.init_parts must name each module once, got {model.init_parts}"
    yield from broken_metric_rules(config)
    if config.logging.watch != "none" and config.logging.watch_frequency % config.logging.log_frequency:
        yield (
            f"logging.watch_frequency must be a multiple of log_frequency ({config.logging.log_frequency}), "
            f"got {config.logging.watch_frequency}"
        )
    saves = (checkpoint.save_frequency, checkpoint.save_every_steps, checkpoint.save_every_minutes)
    for number, rule in enumerate(config.guard.rules):
        if rule.action == "rollback" and not any(saves):
            yield f"guard.rules[{number}].action must be warn or stop where no checkpoints are saved, got rollback"
        if len(rule.conditions) != 1:
            yield (
                f"guard.rules[{number}] must have one of below, above, drop, spike and non_finite, "
                f"got {' and '.join(rule.conditions) or 'none'}"
            )
    if config.collapse.lidar_views == 1:
        yield "collapse.lidar_views must be 0 or at least 2, got 1"
    if config.logging.experiment_name in (".", "..") or "/" in config.logging.experiment_name:
        yield f"logging.experiment_name must be a name without '/', got {config.logging.experiment_name!r}"
    if config.device != "auto" and config.device.split(":")[0] not in ("cpu", "cuda"):
        yield f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}"


def broken_metric_rules(config: Any) -> Iterator[str]:
    """Why ``checkpoint.metric`` would not be there, or not be new, when checkpoints are saved: none would be best."""
    metric, save, online = config.checkpoint.metric, config.checkpoint.save_frequency, config.online_probe
    collapse, where = config.collapse, f"where checkpoint.metric is {metric}"
    if metric in FINAL_PROBES.values():
        yield f"checkpoint.metric must be measured during training, as {ONLINE_LINEAR} is, got {metric}"
    elif metric.startswith(f"{COLLAPSE}batch_"):
        yield f"checkpoint.metric must be measured at an epoch's end, as collapse/target_rank is, got {metric}"
    elif metric in (KNN, ONLINE_LINEAR):
        if online.every is None:
            yield f"online_probe.every must be given {where}, got None"
        elif save is None:
            yield f"checkpoint.save_frequency must be given {where}, got None"
        elif online.every % save and save % online.every:
            yield f"online_probe.every must be a multiple or divisor of save_frequency ({save}) {where}, got {online.every}"
        if metric == ONLINE_LINEAR and not online.linear_epochs:
            yield f"online_probe.linear_epochs must be at least 1 {where}, got 0"
    elif metric.startswith(COLLAPSE):
        if save is None:
            yield f"checkpoint.save_frequency must be given {where}, got None"
        if not collapse.enabled:
            yield f"collapse.enabled must be true {where}, got False"
        if metric.endswith(f"_{ALPHA_REQ}") and not collapse.alpha_req:
            yield f"collapse.alpha_req must be true {where}, got False"
        if metric.endswith(f"_{LIDAR}") and not collapse.lidar_views:
            yield f"collapse.lidar_views must be at least 2 {where}, got 0"
    if better(metric) == "max" and config.checkpoint.mode == "min":
        yield f"checkpoint.mode must be max {where}: larger is better, got min"
