"""Measured normalization: its numbers stand in the run's own configuration, and hold for as long as the run lives."""

from __future__ import annotations

from dataclasses import replace

import ignite.distributed as idist
import torch

from hjepa_engine.config.loading import load_config
from hjepa_engine.config.schema import Config, DataConfig
from hjepa_engine.data.split import Stats
from hjepa_engine.run.folder import RunFolder


def recall_stats(config: Config) -> Config:
    """A configuration that asks for measured numbers, with those of the run that is in its folder already."""
    saved = RunFolder(config).path / "config.yaml"
    if not config.data.measures_stats or config.checkpoint.resume == "never" or not saved.is_file():
        return config
    before = load_config(saved).data
    if not isinstance(before.mean, list) or not isinstance(before.std, list):
        return config
    return replace(config, data=fix_stats(config.data, (tuple(before.mean), tuple(before.std))))


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
