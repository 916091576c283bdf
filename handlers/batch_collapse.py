"""Collapse metrics of the training batches, without another forward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events

from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.levels import as_tokens
from hjepa_engine.metrics.collapse import FeatureStatistics, samples_needed
from hjepa_engine.metrics.names import COLLAPSE_KEYS, COLLAPSE_OUTPUTS, collapse_metric
from hjepa_engine.metrics.sampling import spread, stride_of
from hjepa_engine.types import Outputs

logger = logging.getLogger(__name__)


class BatchCollapse:
    """Compute collapse metrics of the tokens that the step computed: of augmented, masked images, as the loss sees them.

    Tokens are centered per patch position, as in :class:`CollapseMonitor`. Every ``every`` optimizer steps, tokens are
    collected until there are max(2 D, 2048, 16 N) over all ranks, then metrics are written at the end of the log interval.
    If one batch has more, a subset is taken, which does not depend on the number of ranks.

    Listens to: ``ITERATION_COMPLETED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.output``: tokens (B, N, D) or features (B, D) named in ``outputs``; if present, ``<name>_idx``
    (B, K), the patches of tokens (B, K, D) that cover only a part of the image; ``engine.state.optimizer_step``.
    Writes: ``engine.state.metrics["collapse/batch_<name>_<std, norm, rank or rank_share>"]``.
    Keys: ``collapse.enabled``, ``collapse.batch_every``, ``collapse.outputs``.

    Args:
        every: optimizer steps between readings.
        outputs: names of the step's outputs, by their name in the metrics. Outputs that the step does not return are
            skipped with one warning.
        num_patches: N, patches per image; None: that of the largest output.
    """

    per_rank = True  # each rank collects different samples

    def __init__(
        self, every: int = 200, outputs: Mapping[str, str] = COLLAPSE_OUTPUTS, num_patches: int | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.due, self.outputs, self.num_patches = every, 0, dict(outputs), num_patches
        self._warned = False
        self._statistics: dict[str, FeatureStatistics] = {}
        self._taken: dict[str, int] = {}  # over all ranks

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def start(self, engine: Trainer) -> None:
        """Discard all samples when a new run starts; a resumed run keeps the restored ones."""
        if engine.state.iteration == 0:
            self.due, self._statistics, self._taken = 0, {}, {}

    def add(self, engine: Trainer) -> None:
        """Collect tokens of the batch, if more are needed."""
        state = engine.state
        if state.optimizer_step < self.due:
            return
        if missing := [name for name in self.outputs.values() if name not in state.output]:
            self._warn(missing, state.output)
        found = {
            name: as_tokens(state.output[output]) for name, output in self.outputs.items() if output in state.output
        }
        num_patches = self.num_patches or max((tokens.shape[1] for tokens in found.values()), default=1)
        for name, tokens in found.items():
            position_idx = state.output.get(f"{name}_idx")
            if position_idx is None:
                position_idx = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
            if name not in self._statistics:
                self._statistics[name] = FeatureStatistics(tokens.shape[-1], num_patches, engine.amp_dtype)
            wanted = self._wanted(name)
            if wanted > 0:
                stride = stride_of(tokens.shape[0] * idist.get_world_size(), tokens.shape[1], wanted)
                self._statistics[name].add(*spread(tokens, position_idx, stride, idist.get_rank()))
                taken = -(-idist.get_world_size() * position_idx.numel() // stride)
                self._taken[name] = self._taken.get(name, 0) + taken

    def _warn(self, missing: list[str], output: Outputs) -> None:
        if not self._warned and idist.get_rank() == 0:
            logger.warning(
                "no collapse metrics of training batches for %s: the step returns %s; set collapse.outputs to some of these",
                ", ".join(missing),
                ", ".join(output),
            )
        self._warned = True

    def report(self, engine: Trainer) -> None:
        """Write the metrics once there are enough samples. Collective."""
        # Ranks have equal numbers of tokens, so all of them decide alike.
        if not self._statistics or any(self._wanted(name) > 0 for name in self._statistics):
            return
        for name, statistics in self._statistics.items():
            summary = statistics.reduced().summary()
            for key in COLLAPSE_KEYS:
                engine.state.metrics[collapse_metric(name, key, batch=True)] = summary[key]
        self._statistics, self._taken, self.due = {}, {}, engine.state.optimizer_step + self.every

    def _wanted(self, name: str) -> int:
        """Number of tokens still needed, over all ranks."""
        statistics = self._statistics[name]
        return max(samples_needed(statistics.dim), 16 * statistics.positions) - self._taken.get(name, 0)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer step of the next reading, and the samples collected for it."""
        statistics = {name: each.state_dict() for name, each in self._statistics.items()}
        return {"due": self.due, "taken": dict(self._taken), "statistics": statistics}

    def merge_states(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """With another number of ranks, samples are collected anew, for a reading that is due when it was."""
        return {"due": states[0]["due"], "taken": {}, "statistics": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        saved = state_dict["statistics"]
        self.due, self._taken = state_dict["due"], dict(state_dict["taken"])
        self._statistics = {name: FeatureStatistics.from_state_dict(state) for name, state in saved.items()}
