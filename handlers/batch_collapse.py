"""Is the representation collapsing? Measured on the training batches, without another forward pass."""

from __future__ import annotations

import math
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch import Tensor

from hjepa_engine.collapse import FeatureStatistics
from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents


class BatchCollapse:
    """Measure how much the step's own tokens tell images apart: augmented, masked, as the loss sees them.

    As :class:`CollapseMonitor`, each patch has a mean of its own. From every ``every``-th optimiser step on, tokens are
    taken in until there are max(2 D, 2048, 16 N) over all ranks, a part of each batch if need be; the reading is written
    when the log window ends.

    Listens to: ``ITERATION_COMPLETED``, ``TrainEvents.WINDOW_COMPLETED``.
    Reads: ``engine.state.output["context_tokens"]`` (B, K, D) and ``["target_tokens"]`` (B, N, D);
    ``engine.state.batch["masks"].context_idx`` (B, K).
    Writes: ``engine.state.metrics["collapse/batch_<context or target>_<std, norm, rank or rank_share>"]``.

    Args:
        every: optimiser steps between readings.
    """

    per_rank = True  # every process has samples of its own

    def __init__(self, every: int = 200) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.due = every, 0
        self._statistics: dict[str, FeatureStatistics] = {}

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(TrainEvents.WINDOW_COMPLETED, self.report)

    def start(self, engine: Trainer) -> None:
        """Start a new run with no samples; a resumed one keeps those it has loaded."""
        if engine.state.iteration == 0:
            self.due, self._statistics = 0, {}

    def add(self, engine: Trainer) -> None:
        """Take the batch's tokens in, as long as more are wanted."""
        state = engine.state
        if state.optimizer_step < self.due:
            return
        target, context = state.output["target_tokens"], state.output["context_tokens"]
        places = torch.arange(target.shape[1], device=target.device).expand(target.shape[:2])
        for name, tokens, place_idx in (
            ("target", target, places),
            ("context", context, state.batch["masks"].context_idx),
        ):
            if name not in self._statistics:
                self._statistics[name] = FeatureStatistics(tokens.shape[-1], target.shape[1], engine.amp_dtype)
            statistics = self._statistics[name]
            wanted = self._needed(statistics) - statistics.samples
            if wanted > 0:
                statistics.add(*spread(tokens, place_idx, wanted))

    def report(self, engine: Trainer) -> None:
        """Write the reading if there are samples enough. Collective."""
        # Ranks have equal numbers of tokens, so that all of them come to the same answer.
        if not self._statistics or any(s.samples < self._needed(s) for s in self._statistics.values()):
            return
        for name, statistics in self._statistics.items():
            summary = statistics.reduced().summary()
            for key in ("std", "norm", "rank", "rank_share"):
                engine.state.metrics[f"collapse/batch_{name}_{key}"] = summary[key]
        self._statistics, self.due = {}, engine.state.optimizer_step + self.every

    @staticmethod
    def _needed(statistics: FeatureStatistics) -> int:
        return math.ceil(max(2 * statistics.dim, 2048, 16 * statistics.places) / idist.get_world_size())

    def state_dict(self) -> dict[str, Any]:
        """The step of the next reading, and the samples taken in for it."""
        return {"due": self.due, "statistics": {name: s.state_dict() for name, s in self._statistics.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        saved = state_dict["statistics"]
        self.due = state_dict["due"]
        self._statistics = {name: FeatureStatistics.from_state_dict(state) for name, state in saved.items()}


def spread(tokens: Tensor, place_idx: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most about ``most`` of tokens (B, K, D) and their places (B, K), evenly from all images and places."""
    batch, number, dim = tokens.shape
    stride = max(1, batch * number // most)
    while math.gcd(stride, number) > 1:  # else only some of the places would ever be taken
        stride += 1
    return tokens.reshape(-1, dim)[::stride], place_idx.reshape(-1)[::stride]
