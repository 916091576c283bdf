"""Add masks to every batch."""

from __future__ import annotations

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.masking import MultiBlockMasks
from hjepa_engine.state import accumulation_window


class MaskSampler:
    """Add masks to every batch, keyed by (seed, optimizer step, index in the global batch).

    One large batch, the same batch split into micro-batches, and split over ranks, get the same masks. On an evaluator the
    key is the index of the batch instead of the step, so all evaluations with a seed use the same masks.

    Listens to: ``ITERATION_STARTED``.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W), ``engine.state.optimizer_step``.
    Writes: ``engine.state.batch["masks"]``, a :class:`~hjepa_engine.masking.Masks`.

    Args:
        masks: samples the masks.
        seed: seed of the run.
        accumulation_steps: micro-batches per optimizer step.
    """

    def __init__(self, masks: MultiBlockMasks, seed: int = 0, accumulation_steps: int = 1) -> None:
        self.masks, self.seed, self.accumulation_steps = masks, seed, accumulation_steps

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.sample)

    def sample(self, engine: StepEngine) -> None:
        """Add masks to the batch."""
        state, size = engine.state, len(engine.state.batch["images"])
        if isinstance(engine, Trainer):
            step = state.optimizer_step
            micro_batch = accumulation_window(state.iteration, state.epoch_length, self.accumulation_steps).position
        else:
            step, micro_batch = state.iteration - 1, 0
        offset = (micro_batch * idist.get_world_size() + idist.get_rank()) * size
        masks = self.masks.sample(size, self.seed, step, offset)
        state.batch = {**state.batch, "masks": masks}
