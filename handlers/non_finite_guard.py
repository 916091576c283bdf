"""Keep NaN and Inf out of the weights."""

from __future__ import annotations

from typing import Literal

import torch

from hjepa_engine.engine import StepEngine
from hjepa_engine.errors import GuardStop
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.distributed import any_rank

# A loss scale of 2 ** 16 halved this many times in a row is too small for any gradient.
MAX_OVERFLOWS = 50


class NonFiniteGuard:
    """Stop the run or skip the update if the loss or the gradient is not finite, before the weights change.

    With fp16, a non-finite gradient with a finite loss is left to the gradient scaler, which skips the step and lowers the
    scale. Reading the loss synchronizes with the GPU once per optimizer step. All ranks decide together.

    Listens to: ``TrainEvents.GRADIENTS_READY``.
    Reads: ``engine.state.window_loss`` (), ``engine.state.output["grad_norm"]`` (), ``engine.state.optimizer_step``.
    Writes: ``engine.state.skip_update``; raises :class:`~hjepa_engine.errors.GuardStop`.

    Args:
        action: ``stop`` ends the run (exit code 5); ``skip`` skips the update.
        patience: with ``skip``, end the run after this many skipped updates in a row.
        scaled: whether a gradient scaler is used (fp16). It handles non-finite gradients, up to 50 in a row.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", patience: int = 10, scaled: bool = False) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be stop or skip, got {action!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.action, self.patience, self.scaled = action, patience, scaled
        self.in_a_row = 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.GRADIENTS_READY, self.check)

    def check(self, engine: StepEngine) -> None:
        """Check the loss and gradient of the accumulation window."""
        loss, norm = engine.state.window_loss, engine.state.output["grad_norm"]
        bad_loss, bad_norm = (~torch.stack([loss.float(), norm.float()]).isfinite()).tolist()  # one read of the device
        bad_loss = any_rank(bad_loss)  # losses differ between ranks, gradients do not
        self.in_a_row = self.in_a_row + 1 if bad_loss or bad_norm else 0
        ours = bad_loss or (bad_norm and not self.scaled)
        limit = (1 if self.action == "stop" else self.patience) if ours else MAX_OVERFLOWS
        if self.in_a_row >= limit:
            times = f" for {self.in_a_row} updates in a row" if self.in_a_row > 1 else ""
            what = "loss" if bad_loss else "gradient"
            raise GuardStop(
                f"non-finite {what} at optimizer step {engine.state.optimizer_step}{times}; the weights are those of the "
                "last good step. A lower training.lr, a lower training.clip_grad or a longer warmup usually helps"
            )
        engine.state.skip_update = engine.state.skip_update or ours

    def state_dict(self) -> dict[str, int]:
        """Number of non-finite updates in a row."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.in_a_row = state_dict["in_a_row"]
