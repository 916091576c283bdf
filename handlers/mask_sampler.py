"""Add masks to every batch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.masking import Masks, MaskSource
from hjepa_engine.state import accumulation_window


class _Draw(NamedTuple):
    """Which masks: the arguments of :meth:`~hjepa_engine.masking.MaskSource.sample`."""

    batch_size: int
    seed: int
    step: int
    offset: int


class MaskSampler:
    """Add masks to every batch, keyed by (seed, optimizer step, index in the global batch).

    One large batch, the same batch split into micro-batches, and split over ranks, get the same masks. On an evaluator the
    key is the index of the batch instead of the step, so all evaluations with a seed use the same masks.

    While the step runs, a thread samples the masks that the next iteration will most likely need. If it needs others (a
    batch of another size, a skipped update, an epoch that was cut short), or the thread is not done, they are sampled when
    it begins.

    Listens to: ``ITERATION_STARTED``; ``COMPLETED``, ``TERMINATE``, ``INTERRUPT`` and ``EXCEPTION_RAISED``: the thread ends.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W), and ``["offset"]`` of an evaluator's, if it is there;
    ``engine.state.optimizer_step``.
    Writes: ``engine.state.batch["masks"]``, a :class:`~hjepa_engine.masking.Masks`.
    Keys: ``masking.*``.

    Args:
        masks: samples the masks.
        seed: seed of the run.
        accumulation_steps: micro-batches per optimizer step.
    """

    _pool: ThreadPoolExecutor | None = None
    _ahead: tuple[MaskSource, _Draw, Future[Masks]] | None = None

    def __init__(self, masks: MaskSource, seed: int = 0, accumulation_steps: int = 1) -> None:
        self.masks, self.seed, self.accumulation_steps = masks, seed, accumulation_steps

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.sample)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.INTERRUPT):
            engine.add_event_handler(event, self.close)

    def sample(self, engine: StepEngine) -> None:
        """Add masks to the batch, and begin to sample those of the next one."""
        state, size = engine.state, len(engine.state.batch["images"])
        if isinstance(engine, Trainer):
            window = accumulation_window(state.iteration, state.epoch_length, self.accumulation_steps)
            step, micro_batch = state.optimizer_step, window.position
            following = (step + 1, 0) if window.is_last else (step, micro_batch + 1)
        else:
            step, micro_batch = state.iteration - 1, 0
            following = (step + 1, 0)
        draw = self._draw(size, step, micro_batch)
        if not isinstance(engine, Trainer):  # ranks' shares of the last batch differ in size
            draw = draw._replace(offset=state.batch.get("offset", draw.offset))
        masks = self._take(draw)
        self._sample_ahead(self._draw(size, *following))
        state.batch = {**state.batch, "masks": masks}

    def fail(self, error: BaseException) -> None:
        """As :meth:`close`, when the run ends with an error."""
        self.close()

    def close(self) -> None:
        """End the thread; the next batch makes another one."""
        pool, self._pool, self._ahead = self._pool, None, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_pool", "_ahead")}

    def _draw(self, size: int, step: int, micro_batch: int) -> _Draw:
        return _Draw(size, self.seed, step, (micro_batch * idist.get_world_size() + idist.get_rank()) * size)

    def _take(self, draw: _Draw) -> Masks:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (self.masks, draw) and ahead[2].done():
            return ahead[2].result()  # raises what the thread has raised
        # Where other processes keep the thread from running, waiting for it takes longer than not to have it.
        if ahead is not None:
            ahead[2].cancel()
        return self.masks.sample(*draw)

    def _sample_ahead(self, draw: _Draw) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "masks")
        self._ahead = self.masks, draw, self._pool.submit(self.masks.sample, *draw)
