"""Collapse metrics on a fixed set of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch import Tensor

from hjepa_engine.data.views import random_views
from hjepa_engine.engine import Trainer
from hjepa_engine.evaluator import Evaluator, for_each_output
from hjepa_engine.events import TrainEvents
from hjepa_engine.loggers.media import JsonValue
from hjepa_engine.metrics.collapse import FeatureStatistics, ViewStatistics, alpha_req
from hjepa_engine.metrics.names import COLLAPSE_KEYS, LIDAR, SPECTRUM, collapse_metric
from hjepa_engine.metrics.sampling import thinned
from hjepa_engine.types import Batch, Outputs
from hjepa_engine.utils.eta import epoch_due


class CollapseMonitor:
    """Compute collapse metrics of the features of both encoders, at every level, on fixed images.

    The images never change, so readings are comparable over time. Features are centered per patch position: tokens that
    differ between positions but not between images are collapsed, and would look healthy otherwise. A reading is taken
    before the first step, every ``every`` optimizer steps (at the end of the log interval) and at the end of the run; with
    ``epoch_ends`` also at the end of every epoch. Each rank measures its own images.

    Listens to: ``STARTED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.optimizer_step``; the evaluator's outputs, features (B, positions, D) by name, ``<name>`` or
    ``<name>_level_<l>``.
    Writes: ``engine.state.metrics["collapse/<name>_<key>"]``, followed by ``_level_<l>`` for a level. Keys are
    ``std``, ``norm``, ``rank`` and ``rank_share`` (see :meth:`FeatureStatistics.summary`); for the last layer also
    ``rank_me`` and, if enabled, ``alpha_req`` and ``lidar``. ``engine.state.media["collapse/<name>_spectrum"]``: at most
    64 singular values divided by the sum of all, each with its ``rank`` from 1.
    Keys: ``collapse.*``.

    Args:
        evaluator: runs a step with these outputs, such as :func:`~hjepa_engine.steps.feature_map_step`.
        images: the fixed images; rank r of R has images r, r + R, ... Below max(2 D, 2048) features over all ranks the
            effective rank is unreliable.
        every: optimizer steps between readings.
        alpha_req: also compute alpha-ReQ.
        lidar_views: also compute LiDAR, on the mean tokens of this many random views of each image; 0: off.
        seed: seed of the views.
        epoch_ends: also read at the end of every epoch, for the checkpoint saved there.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        images: Iterable[dict[str, Any]],
        every: int = 1000,
        alpha_req: bool = False,
        lidar_views: int = 0,
        seed: int = 0,
        epoch_ends: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if lidar_views == 1 or lidar_views < 0:
            raise ValueError(f"lidar_views must be 0 or at least 2, got {lidar_views}")
        self.evaluator, self.images, self.every, self.alpha_req = evaluator, images, every, alpha_req
        self.lidar_views, self.seed, self.epoch_ends = lidar_views, seed, epoch_ends
        self.due = every

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.read_if_due)

    def start(self, engine: Trainer) -> None:
        """Take the reading before the first step."""
        if engine.state.iteration == 0:
            self.due = self.every
            self.read(engine)

    def read_if_due(self, engine: Trainer) -> None:
        """Take a reading if it is due."""
        state = engine.state
        is_due = state.optimizer_step >= self.due
        if is_due:
            self.due = state.optimizer_step + self.every
        if is_due or epoch_due(state, 1 if self.epoch_ends else None):
            self.read(engine)

    def read(self, engine: Trainer) -> None:
        """Take a reading. Collective."""
        found: dict[str, FeatureStatistics] = {}

        def add(output: Outputs, batch: Batch) -> None:
            for name, features in output.items():
                if name not in found:
                    found[name] = FeatureStatistics(features.shape[-1], features.shape[1], self.evaluator.amp_dtype)
                found[name].add(features)

        for_each_output(self.evaluator, self.images, add)
        for name, statistics in found.items():
            self._write(engine, name, statistics.reduced())
        if self.lidar_views:
            self._read_lidar(engine)

    def _write(self, engine: Trainer, name: str, statistics: FeatureStatistics) -> None:
        encoder, _, level = name.partition("_level_")
        values = statistics.singular_values()
        found = statistics.summary(values) | ({"alpha_req": alpha_req(values)} if self.alpha_req else {})
        for key in COLLAPSE_KEYS if level else found:
            engine.state.metrics[collapse_metric(encoder, key, level or None)] = found[key]
        if not level:
            engine.state.media[collapse_metric(encoder, SPECTRUM)] = JsonValue(thinned(values))

    def _read_lidar(self, engine: Trainer) -> None:
        found: dict[str, ViewStatistics] = {}
        views: list[dict[str, Tensor]] = []  # of the images at hand, so far

        def add(output: Outputs, batch: Batch) -> None:
            views.append({name: tokens.float().mean(dim=1) for name, tokens in output.items() if "_level_" not in name})
            if len(views) == self.lidar_views:
                for name in views[0]:
                    means = torch.stack([view[name] for view in views])
                    found.setdefault(name, ViewStatistics(means.shape[-1], self.evaluator.amp_dtype)).add(means)
                views.clear()

        for_each_output(self.evaluator, self._views(), add)
        for name, statistics in found.items():
            engine.state.metrics[collapse_metric(name, LIDAR)] = statistics.lidar()

    def _views(self) -> Iterator[Batch]:
        """Every view of a batch's images, then those of the next batch."""
        number = idist.get_rank()
        for batch in self.images:
            of_images = []
            for image in batch["images"]:  # one by one, keyed by index: the same views on any rank
                of_images.append(torch.cat(random_views(image[None], self.lidar_views, self.seed, number)))
                number += idist.get_world_size()
            yield from ({"images": view} for view in torch.stack(of_images, dim=1))

    def state_dict(self) -> dict[str, int]:
        """The optimizer step of the next reading."""
        return {"due": self.due}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.due = state_dict["due"]
