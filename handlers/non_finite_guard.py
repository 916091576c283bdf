"""Keep NaN and Inf out of the weights."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor

from hjepa_engine.engine import StepEngine
from hjepa_engine.errors import GuardStop
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.distributed import any_rank, world_size
from hjepa_engine.utils.sharding import exchanges_gradients

# A loss scale of 2 ** 16 halved this many times in a row is too small for any gradient.
MAX_OVERFLOWS = 50
_ADVICE = (
    "the weights are those of the last good step. A lower training.lr, a lower training.clip_grad or a longer warmup "
    "usually helps"
)


class NonFiniteGuard:
    """Stop the run or skip the update if the loss or the gradient is not finite, before the weights change.

    With fp16, a non-finite gradient with a finite loss is left to the gradient scaler, which skips the step and lowers the
    scale. All ranks decide together: under DDP and FSDP a gradient that is not finite, which a loss that is not finite
    always has (``OptimizerStep``), is so on all ranks, so that none has to ask the others in every step.

    Reading loss and norm in every optimizer step means waiting for a GPU. With ``on_device`` the GPU decides by itself: from
    the first update that is not finite on, the optimizer makes none. The program reads that at the end of the log interval,
    and whenever a checkpoint is taken, and ends the run. Until then all else goes on: the target encoder moves on towards
    the context encoder, which has stopped.

    Listens to: ``STARTED``, ``TrainEvents.GRADIENTS_READY``, ``LOG_INTERVAL_COMPLETED``, ``COMPLETED``.
    Reads: ``engine.state.window_loss`` (), ``engine.state.output["grad_norm"]`` (), ``engine.state.optimizer_step``.
    Writes: ``engine.state.skip_update``, or ``hold_update``; raises :class:`~hjepa_engine.errors.GuardStop`.
    Keys: ``training.non_finite``.

    Args:
        action: ``stop`` ends the run (exit code 5); ``skip`` skips the update.
        patience: with ``skip``, end the run after this many skipped updates in a row.
        scaled: whether a gradient scaler is used (fp16). It handles non-finite gradients, up to 50 in a row.
        on_device: do not wait for the GPU; for ``stop`` without a scaler, and an optimizer that is fused.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"] = "stop",
        patience: int = 10,
        scaled: bool = False,
        on_device: bool = False,
    ) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be stop or skip, got {action!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if on_device and (action == "skip" or scaled):
            raise ValueError("on_device must be False with action skip or a scaler: schedules count the updates made")
        self.action, self.patience, self.scaled, self.on_device = action, patience, scaled, on_device
        self.in_a_row = 0
        self._held: Tensor | None = None
        self._is_shared = False
        self._optimizer_step = 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(TrainEvents.GRADIENTS_READY, self.hold if self.on_device else self.check)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.stop_if_held)
        engine.add_event_handler(Events.COMPLETED, self.stop_if_held)

    def start(self, engine: StepEngine) -> None:
        """Nothing is held when a run starts; find out whether ranks have their gradients in common."""
        self._held = None
        self._is_shared = exchanges_gradients(engine.modules)

    def check(self, engine: StepEngine) -> None:
        """Check the loss and gradient of the accumulation window."""
        loss, norm = engine.state.window_loss, engine.state.output["grad_norm"]
        if loss.device.type == "cpu":
            bad_loss, bad_norm = not math.isfinite(loss.item()), not math.isfinite(norm.item())
        else:  # one read of the device
            bad_loss, bad_norm = (~torch.stack([loss.float(), norm.float()]).isfinite()).tolist()
        if bad_norm or self.scaled or not self._is_shared:
            bad_loss = any_rank(bad_loss)  # losses differ between ranks, gradients do not
        self.in_a_row = self.in_a_row + 1 if bad_loss or bad_norm else 0
        ours = bad_loss or (bad_norm and not self.scaled)
        limit = (1 if self.action == "stop" else self.patience) if ours else MAX_OVERFLOWS
        if self.in_a_row >= limit:
            times = f" for {self.in_a_row} updates in a row" if self.in_a_row > 1 else ""
            what = "loss" if bad_loss else "gradient"
            raise GuardStop(f"non-finite {what} at optimizer step {engine.state.optimizer_step}{times}; {_ADVICE}")
        engine.state.skip_update = engine.state.skip_update or ours

    def hold(self, engine: StepEngine) -> None:
        """Let the device decide whether this update, and those after it, change anything."""
        loss, norm = engine.state.window_loss, engine.state.output["grad_norm"]
        is_bad = 1.0 - (loss.isfinite() & norm.isfinite()).float()
        if world_size() > 1 and not self._is_shared:
            dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        held = torch.zeros_like(is_bad) if self._held is None else self._held
        self._held = torch.where(is_bad + held > 0, held + 1.0, held)
        self._optimizer_step = engine.state.optimizer_step
        engine.state.hold_update = self._held.clamp(max=1.0)

    def stop_if_held(self) -> None:
        """End the run if updates were held."""
        held = 0 if self._held is None else int(self._held.item())
        if held:
            first = self._optimizer_step + 1 - held
            raise GuardStop(f"non-finite loss or gradient at optimizer step {first}; {_ADVICE}")

    def state_dict(self) -> dict[str, int]:
        """Number of non-finite updates in a row.

        Raises:
            GuardStop: updates are being held: this is no state to go on from.
        """
        self.stop_if_held()
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.in_a_row, self._held = state_dict["in_a_row"], None
