"""What tasks are given, and what they find."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hjepa_engine import Config
from hjepa_engine.utils.rng import derive_seed

#: The rate of linear heads where there are too few labels to choose one by: learning rate and weight decay.
FALLBACK = (0.03, 1e-3)


class Setting(NamedTuple):
    """What is chosen on held-out training labels."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Settings:
    """How the heads of all tasks are trained."""

    config: Config
    """Of the run, with what was given for ``data`` and ``probe``."""
    device: torch.device
    num_seeds: int = 3
    linear_grid: tuple[Setting, ...] = tuple(
        Setting(lr, decay) for decay in (0.0, 1e-3, 1e-2) for lr in (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
    )
    """Of linear heads, SGD."""
    attentive_grid: tuple[Setting, ...] = tuple(Setting(lr, 1e-2) for lr in (3e-4, 1e-3, 3e-3))
    """Of attentive heads, AdamW."""
    held_out: float = 0.2
    """Share of the training labels that settings are chosen by."""
    label_shares: tuple[float, ...] = (0.01, 0.1)
    """Of few-label tasks."""

    def seeds(self) -> list[int]:
        """One for each repetition: of the held-out part, the order, the drawn labels and initial weights."""
        return [derive_seed(self.config.seed, "evaluation", number) for number in range(self.num_seeds)]


@dataclass(frozen=True)
class Encoder:
    """One of the encoders that are compared."""

    name: str
    """``trained``, ``random`` or ``pixels``."""
    module: nn.Module | None
    """From images to tokens (B, N, D) or features (B, D); None: raw pixels."""


@dataclass(frozen=True)
class Readings:
    """What one encoder says of the labeled images."""

    train: dict[str, Tensor]
    """(n, ...) by reading, and ``labels`` (n, ...)."""
    test: dict[str, Tensor]
    num_classes: int

    @property
    def names(self) -> list[str]:
        """Of the readings, the plainest first."""
        return [name for name in self.train if name != "labels"]


@dataclass(frozen=True)
class Row:
    """One figure."""

    task: str
    reading: str
    encoder: str
    metric: str
    values: list[float]
    """From 0 to 1, one for each seed; one, where nothing is drawn."""
    chosen: list[dict[str, float]] = field(default_factory=list)
    """The setting that each seed has chosen."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation over the seeds; None where there is one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in ("task", "reading", "encoder", "metric", "mean", "std", "values")}
        return {**own, "chosen": self.chosen}


def as_choices(settings: Sequence[Setting]) -> list[dict[str, float]]:
    """For the record."""
    return [setting._asdict() for setting in settings]
