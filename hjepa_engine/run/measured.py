"""What a run finds out when it starts (normalization, precision) stands in its configuration, and holds while it lives."""

from __future__ import annotations

from dataclasses import replace

import ignite.distributed as idist
import torch

from hjepa_engine.config.loading import load_config
from hjepa_engine.config.schema import Config, DataConfig
from hjepa_engine.data.split import Stats
from hjepa_engine.run.folder import RunFolder


def recall(config: Config) -> Config:
    """The configuration, with what the run that is in its folder already has found out."""
    saved = RunFolder(config).path / "config.yaml"
    asks = config.data.measures_stats or config.training.use_amp == "auto"
    if not asks or config.checkpoint.resume == "never" or not saved.is_file():
        return config
    before = load_config(saved)
    if config.training.use_amp == "auto":
        training = replace(config.training, use_amp=before.training.use_amp, amp_dtype=before.training.amp_dtype)
        config = replace(config, training=training)
    mean, std = before.data.mean, before.data.std
    if not isinstance(mean, list) or not isinstance(std, list):
        return config
    return replace(config, data=fix_stats(config.data, (tuple(mean), tuple(std))))


def fix_stats(config: DataConfig, stats: Stats) -> DataConfig:
    """The data section with numbers in place of those to be measured: rank 0's."""
    if not config.measures_stats:
        return config
    numbers = idist.broadcast(torch.tensor(stats, dtype=torch.float64))
    assert isinstance(numbers, torch.Tensor)
    mean, std = numbers.tolist()
    return replace(
        config,
        mean=config.mean if isinstance(config.mean, list) else mean,
        std=config.std if isinstance(config.std, list) else std,
    )
