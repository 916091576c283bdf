"""Which checkpoints are kept: a pure function of what is known about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Mode = Literal["min", "max"]


class Record(NamedTuple):
    """What is known about a checkpoint without reading its tensors."""

    name: str
    """Of its folder."""
    iteration: int
    """Micro-batches trained."""
    step: int
    """Optimizer steps trained."""
    epoch: int
    """Epochs completed."""
    ends_epoch: bool = False
    """Whether it was saved at an epoch's end, with the metrics of its validation."""
    score: float | None = None
    """Value of the retention metric if it was new when the checkpoint was saved."""

    @property
    def order(self) -> tuple[int, bool]:
        """When in the run it was saved; later is greater."""
        return self.iteration, self.ends_epoch


def latest(records: Sequence[Record]) -> Record | None:
    """The newest checkpoint."""
    return max(records, key=lambda record: record.order, default=None)


def best(records: Sequence[Record], mode: Mode = "min") -> Record | None:
    """The checkpoint with the best score, the earlier one of equals; None where none has a finite score."""
    ranked = _ranked(records, mode)
    return ranked[0] if ranked else None


def _ranked(records: Sequence[Record], mode: Mode) -> list[Record]:
    scored = [record for record in records if record.score is not None and math.isfinite(record.score)]
    return sorted(scored, key=lambda record: (record.score if mode == "min" else -record.score, record.order))  # type: ignore[operator]


@dataclass(frozen=True)
class RetentionPolicy:
    """Keep the newest, the best and every so many epochs' checkpoints.

    >>> records = [Record(f"s{n}", n, n, n, True, score) for n, score in enumerate([0.9, 0.2, 0.5, 0.4])]
    >>> RetentionPolicy(keep_last_n=2, keep_best_n=1)(records)
    {'s3': ['latest'], 's2': ['last 2'], 's1': ['best']}

    Args:
        keep_last_n: newest ones, at least 2: the newest may turn out to be damaged.
        keep_best_n: ones with the best finite score.
        keep_every_epochs: those at the end of every N-th epoch stay for good; None: none do.
        mode: whether a smaller (``min``) or a larger (``max``) score is better.
    """

    keep_last_n: int = 2
    keep_best_n: int = 1
    keep_every_epochs: int | None = None
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.keep_last_n < 2:
            raise ValueError(f"keep_last_n must be at least 2, got {self.keep_last_n}")
        if self.keep_best_n < 0:
            raise ValueError(f"keep_best_n must be at least 0, got {self.keep_best_n}")
        if self.keep_every_epochs is not None and self.keep_every_epochs < 1:
            raise ValueError(f"keep_every_epochs must be at least 1 or None, got {self.keep_every_epochs}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {self.mode!r}")

    def __call__(self, records: Sequence[Record]) -> dict[str, list[str]]:
        """Names of the checkpoints to keep, each with the reasons."""
        kept: dict[str, list[str]] = {}
        newest = sorted(records, key=lambda record: record.order, reverse=True)[: self.keep_last_n]
        for rank, record in enumerate(newest, 1):
            kept.setdefault(record.name, []).append("latest" if rank == 1 else f"last {rank}")
        for rank, record in enumerate(_ranked(records, self.mode)[: self.keep_best_n], 1):
            kept.setdefault(record.name, []).append("best" if rank == 1 else f"best {rank}")
        for record in records:
            if self.keep_every_epochs and record.ends_epoch and record.epoch % self.keep_every_epochs == 0:
                kept.setdefault(record.name, []).append(f"every {self.keep_every_epochs} epochs")
        return kept
