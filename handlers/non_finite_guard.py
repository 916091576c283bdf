"""Keep NaN and infinity out of the weights."""

from __future__ import annotations

import math
from typing import Literal

import ignite.distributed as idist

from hjepa_engine.engine import StepEngine
from hjepa_engine.errors import GuardStop
from hjepa_engine.events import TrainEvents


class NonFiniteGuard:
    """Act on a non-finite loss or gradient before the optimiser's step, so that the weights never see it.

    With fp16 a non-finite gradient alone is the scaler's business: it skips the step and lowers the scale. Reading the
    loss waits for the GPU once per optimiser step. Ranks decide together.

    Listens to: ``TrainEvents.GRADIENTS_READY``.
    Reads: ``engine.state.window_loss`` () and ``engine.state.output["grad_norm"]`` ().
    Writes: ``engine.state.skip_update``; raises :class:`~hjepa_engine.errors.GuardStop`.

    Args:
        action: ``stop``: end the run (exit code 5); ``skip``: drop the update.
        patience: with ``skip``, end the run after this many dropped updates in a row.
        check_gradients: whether a finite loss with non-finite gradients counts; False with fp16.
    """

    def __init__(
        self, action: Literal["stop", "skip"] = "stop", patience: int = 10, check_gradients: bool = True
    ) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be stop or skip, got {action!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.action, self.patience, self.check_gradients = action, patience, check_gradients
        self.in_a_row = 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.GRADIENTS_READY, self.check)

    def check(self, engine: StepEngine) -> None:
        """Judge the window."""
        suspects = {"loss": engine.state.window_loss}
        if self.check_gradients:
            suspects["gradient"] = engine.state.output["grad_norm"]
        bad = [name for name, value in suspects.items() if self._anywhere(not math.isfinite(float(value)))]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and (self.action == "stop" or self.in_a_row >= self.patience):
            times = f" for {self.in_a_row} updates in a row" if self.in_a_row > 1 else ""
            raise GuardStop(
                f"non-finite {bad[0]} at optimiser step {engine.state.optimizer_step}{times}; the weights are those of "
                "the last good step. A lower training.lr, clip_grad or a longer warm-up usually helps"
            )
        engine.state.skip_update = engine.state.skip_update or bool(bad)

    @staticmethod
    def _anywhere(flag: bool) -> bool:
        return bool(idist.all_reduce(int(flag), op="MAX")) if idist.get_world_size() > 1 else flag

    def state_dict(self) -> dict[str, int]:
        """Number of dropped updates in a row."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.in_a_row = state_dict["in_a_row"]
