"""Probe the features on labeled images while the encoder is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events

from hjepa_engine.engine import Trainer
from hjepa_engine.evaluator import Evaluator, labeled_features
from hjepa_engine.metrics.names import PROBE
from hjepa_engine.types import Labeled
from hjepa_engine.utils.eta import epoch_due


class OnlineProbe:
    """Evaluate classifiers on the frozen features of labeled images.

    Probes run before the first step (the random encoder, as a baseline), after every ``every``-th epoch and after the last
    one. Features have no gradients, so the classifiers do not influence the encoder. Every rank computes the features of
    all images; rank 0's accuracies are used on all ranks.

    Listens to: ``STARTED``, ``EPOCH_COMPLETED``.
    Reads: ``features`` (B, F) of the evaluator's outputs and ``labels`` (B,) of its batches.
    Writes: ``engine.state.metrics["probe/<name>"]`` for each classifier, an accuracy from 0 to 1.
    Keys: ``online_probe.*``.

    Args:
        evaluator: runs a step with this output on the encoder, such as :func:`~hjepa_engine.steps.feature_step`.
        train: batches of ``images`` (B, C, H, W) and ``labels`` to train on, the same on every pass.
        val: batches to evaluate on.
        classifiers: by name, functions from training and validation features to an accuracy; they must not use the
            global random generators.
        every: epochs between probes.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        train: Iterable[dict[str, Any]],
        val: Iterable[dict[str, Any]],
        classifiers: Mapping[str, Callable[[Labeled, Labeled], float]],
        every: int = 1,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.evaluator, self.train, self.val, self.classifiers, self.every = (
            evaluator,
            train,
            val,
            dict(classifiers),
            every,
        )

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.probe_if_due)

    def start(self, engine: Trainer) -> None:
        """Probe the untrained encoder."""
        if engine.state.iteration == 0:
            self.probe(engine)

    def probe_if_due(self, engine: Trainer) -> None:
        """Probe if it is due."""
        if epoch_due(engine.state, self.every):
            self.probe(engine)

    def probe(self, engine: Trainer) -> None:
        """Probe now. Collective."""
        train, val = (labeled_features(self.evaluator, images) for images in (self.train, self.val))
        values = torch.tensor([classify(train, val) for classify in self.classifiers.values()], dtype=torch.float64)
        # GPUs may round differently, and handlers that act on an accuracy must act on all ranks alike.
        shared: Any = idist.broadcast(values.to(self.evaluator.device), src=0)
        engine.state.metrics.update(
            {f"{PROBE}{name}": x for name, x in zip(self.classifiers, shared.tolist(), strict=True)}
        )
