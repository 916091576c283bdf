"""The evaluator: the engine that runs a step without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from hjepa_engine.engine import StepEngine
from hjepa_engine.state import Metrics
from hjepa_engine.types import Batch, Labeled, Outputs, Step
from hjepa_engine.utils.distributed import any_rank
from hjepa_engine.utils.sharding import is_sharded


class Evaluator(StepEngine):
    """See :func:`create_evaluator`."""

    _modes: Sequence[tuple[nn.Module, bool]] = ()

    def _process(self, engine: Engine, batch: Batch) -> Outputs:
        with torch.no_grad():
            return self._run_step(batch)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's; an evaluation that was cut short is started anew, one that was interrupted goes on."""
        if not self.is_interrupted:
            self.state.max_epochs = self.state.max_iters = None
            self.state.epoch_length = None  # type: ignore[assignment]  # data without a length would get the last one's
        return super().run(*args, **kwargs)

    def _enter(self) -> None:
        self.state.metrics = Metrics()
        self._modes = [(module, module.training) for module in self.modules.modules()]
        self.modules.eval()

    def _leave(self) -> None:
        for module, training in self._modes:  # one by one: a part may have been frozen in evaluation mode
            module.training = training


def create_evaluator(
    step: Step,
    modules: nn.ModuleDict,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> Evaluator:
    """An evaluator: the same step without gradients, modules in evaluation mode while it runs, no weights changed.

    Args:
        step: as for :func:`create_trainer`.
        modules: as for :func:`create_trainer`; their mode is restored when the run is over.
        device: as for :func:`create_trainer`.
        amp_dtype: as for :func:`create_trainer`.
    """
    evaluator = Evaluator(step, modules, device, amp_dtype)
    evaluator.add_event_handler(Events.STARTED, evaluator._enter)
    evaluator.add_event_handler(Events.COMPLETED, evaluator._leave)
    return evaluator


def for_each_output(evaluator: Evaluator, data: Iterable[Batch], read: Callable[[Outputs, Batch], None]) -> None:
    """Run over ``data`` and hand each output and its batch to ``read``; the evaluator keeps neither.

    Collective where the evaluator's modules are in shards: a rank with fewer batches than others computes its last one
    again, which ``read`` does not get.
    """

    def hand_over(engine: Evaluator) -> None:
        if not engine.state.batch.get(_AGAIN):
            read(engine.state.output, engine.state.batch)

    with evaluator.add_event_handler(Events.ITERATION_COMPLETED, hand_over):
        evaluator.run(_as_many(data) if is_sharded(evaluator.modules) else data)
    evaluator.state.output = evaluator.state.batch = None  # memory that the next training step needs


#: Marks a batch that is computed only because other ranks compute one.
_AGAIN = "is_again"


def _as_many(data: Iterable[Batch]) -> Iterator[Batch]:
    """As many batches on every rank: the last one again, until no rank has another. Collective."""
    batch: Batch = {}
    own = iter(data)
    while True:
        batch = next(own, {**batch, _AGAIN: True})
        if not any_rank(_AGAIN not in batch):
            return
        yield batch


def labeled_features(
    evaluator: Evaluator, data: Iterable[Batch], name: str = "features", device: torch.device | None = None
) -> Labeled:
    """One output of a whole data set, (samples, ...), and its labels, (samples,).

    Args:
        evaluator: runs a step with such an output, like :func:`~hjepa_engine.steps.feature_step`.
        data: batches with ``labels`` (B,).
        name: of the output, (B, ...).
        device: where both are gathered; the evaluator's own by default.
    """
    features, labels = [], []

    def read(output: Outputs, batch: Batch) -> None:
        if batch.get("is_filler"):
            return
        features.append(output[name].to(device))
        labels.append(batch["labels"].to(device))

    for_each_output(evaluator, data, read)
    return torch.cat(features), torch.cat(labels)
