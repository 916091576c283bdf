"""Backward pass, accumulation, clipping and the optimizer's step."""

from __future__ import annotations

from typing import Any

from ignite.engine import Events
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.state import Window, accumulation_window
from hjepa_engine.utils.gradients import can_hold, clip_gradients, gradient_norm
from hjepa_engine.utils.sharding import exchanges_gradients, part_of
from hjepa_engine.utils.tensors import loss_of

#: What chooses among implementations of one step: that is up to the device and the strategy of now.
_IMPLEMENTATIONS = {"fused", "foreach"}
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class OptimizerStep:
    """Turn losses into steps of the optimizer, one per window of ``accumulation_steps`` micro-batches.

    The gradient is the mean over the micro-batches that are really in the window; an epoch's last, shorter window is
    stepped too. Under DDP gradients are exchanged in a window's last micro-batch only; under FSDP in every one, so that no
    rank ever keeps whole ones. Gradients are unscaled before they are measured and clipped.

    Listens to: ``STARTED``, ``ITERATION_STARTED``, ``TrainEvents.LOSS_READY``, ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.output["loss"]`` (); ``engine.state.skip_update``, which a handler of ``GRADIENTS_READY`` may
    set to drop this update, and ``engine.state.hold_update``, which decides on the device, for a fused optimizer.
    Writes: ``engine.state.window_open``; in a window's last iteration ``engine.state.window_loss`` (), the mean loss of its
    micro-batches, and ``engine.state.output["grad_norm"]`` (), the L2 norm of all gradients before clipping, taken back if
    the update is skipped; ``engine.state.optimizer_step`` and ``skipped_updates``; ``engine.state.skip_update``, False, and
    ``hold_update``, None, at every iteration's start; ``engine.state.metrics["train/skipped_updates"]``.
    Fires: ``TrainEvents.BACKWARD_COMPLETED`` in every iteration; in a window's last ``TrainEvents.GRADIENTS_READY``, then
    ``TrainEvents.OPTIMIZER_STEPPED`` unless the update was skipped (by ``skip_update``, or by the scaler because fp16
    gradients overflowed).
    Keys: ``training.accumulation_steps``, ``training.clip_grad``, ``training.optimizer``.

    Args:
        optimizer: over the parameters to train.
        accumulation_steps: micro-batches of a window, at least 1.
        clip_grad: largest L2 norm of all gradients together; None: no clipping.
        scaler: for fp16; None: no scaling.
    """

    must_resume = True  # nothing else could stand in for the optimizer's moments

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation_steps: int = 1,
        clip_grad: float | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if clip_grad is not None and clip_grad <= 0:
            raise ValueError(f"clip_grad must be positive or None, got {clip_grad}")
        self.optimizer, self.accumulation_steps, self.clip_grad = optimizer, accumulation_steps, clip_grad
        self.scaler = scaler or GradScaler("cpu", enabled=False)
        self._loss: Tensor | None = None  # of the window so far
        self._window = Window(0, 1)
        self._replicated: list[DistributedDataParallel] = []
        self._exchanges = False
        self._first = self._skipped_updates = 0

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_STARTED, self.open)
        engine.add_event_handler(TrainEvents.LOSS_READY, self.step)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def start(self, engine: Trainer) -> None:
        """Count the skipped updates of a new run from 0; find the modules that exchange gradients."""
        self._replicated = [each for each in engine.modules.values() if isinstance(each, DistributedDataParallel)]
        self._exchanges = exchanges_gradients(engine.modules)
        if engine.state.iteration == 0:
            self._skipped_updates = 0

    def open(self, engine: Trainer) -> None:
        """Tell DDP whether this micro-batch's backward pass is the one that exchanges gradients."""
        state = engine.state
        state.skip_update, state.hold_update, state.skipped_updates = False, None, self._skipped_updates
        window = accumulation_window(state.iteration, state.epoch_length, self.accumulation_steps, state.max_iters)
        self._window = window
        if window.position == 0 and self._loss is not None:
            self._loss = None  # a window that was cut off leaves nothing behind
            self.optimizer.zero_grad(set_to_none=True)
        if self._loss is None:
            self._first = window.position  # above 0 where a longer run goes on behind a window that max_iters had cut
        for module in self._replicated:
            module.require_backward_grad_sync = window.is_last  # what module.no_sync() sets

    def step(self, engine: Trainer) -> None:
        """Backward; at the end of the window, step."""
        window = self._window
        loss, share = loss_of(engine.state.output), window.size - self._first
        if share > 1:
            loss = loss / share
        # A loss that is not finite makes all gradients NaN, and the mean over ranks does so on all of them.
        self.scaler.scale(loss).backward(1 + 0 * loss.detach() if self._exchanges else None)
        self._loss = total = loss.detach() if self._loss is None else self._loss + loss.detach()
        engine.fire(TrainEvents.BACKWARD_COMPLETED)
        engine.state.window_open = not window.is_last
        if not window.is_last:
            return
        engine.state.window_loss, self._loss = total, None
        self.scaler.unscale_(self.optimizer)
        gradients = self._gradients()
        engine.state.output["grad_norm"] = norm = gradient_norm(gradients)
        engine.fire(TrainEvents.GRADIENTS_READY)
        # What the scaler itself goes by; it then lowers the scale, down to 0 if need be: the scale says nothing.
        overflow = self.scaler.is_enabled() and not norm.isfinite()
        stepped = not (engine.state.skip_update or overflow)
        if stepped:
            if self.clip_grad is not None:
                clip_gradients(self._gradients(), norm, self.clip_grad)
            if engine.state.hold_update is None:
                self.scaler.step(self.optimizer)
            else:
                self._step_unless(engine.state.hold_update)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            engine.state.optimizer_step += 1
            engine.fire(TrainEvents.OPTIMIZER_STEPPED)
        else:
            self._skipped_updates += 1
            engine.state.skipped_updates = self._skipped_updates
            del engine.state.output["grad_norm"]  # often infinite, and of no update

    def _step_unless(self, hold: Tensor) -> None:
        if self.scaler.is_enabled() or not can_hold(self.optimizer):
            raise ValueError("only a fused optimizer, without a gradient scaler, can hold an update on the device")
        self.optimizer.found_inf = hold  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def report(self, engine: Trainer) -> None:
        """Write how many updates were skipped so far, once there are any."""
        if engine.state.skipped_updates:
            engine.state.metrics["train/skipped_updates"] = float(engine.state.skipped_updates)

    def _gradients(self) -> list[Tensor]:
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise RuntimeError("the loss reaches none of the optimizer's parameters")
        return grads

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the scaler's (empty without fp16), and how many updates were skipped."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_updates": self._skipped_updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, or the same with whole tensors in place of sharded ones.

        Raises:
            ValueError: it is of an optimizer with other parameters.
        """
        saved = state_dict["optimizer"]
        groups, state = [dict(group) for group in saved["param_groups"]], dict(saved["state"])
        for old, group in zip(groups, self.optimizer.param_groups, strict=False):
            for number, parameter in zip(old["params"], group["params"], strict=False):
                moments = state.get(number, {})
                for name, moment in moments.items():
                    if name in _LIKE_PARAMETER and moment.shape != parameter.shape:
                        raise ValueError(
                            f"{name} of parameter {number} is {tuple(moment.shape)}, the parameter {tuple(parameter.shape)}"
                        )
                if moments:
                    state[number] = {name: _part(moment, parameter) for name, moment in moments.items()}
            old.update({name: group[name] for name in _IMPLEMENTATIONS & group.keys()})
        self.optimizer.load_state_dict({"param_groups": groups, "state": state})
        if state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        self._skipped_updates = state_dict["skipped_updates"]


def _part(moment: Any, parameter: Tensor) -> Any:
    """What this rank has of a moment; of one that is not shaped as the parameter (a count), all."""
    if not isinstance(moment, Tensor):
        return moment
    # A count is copied: the optimizer would keep it in the file that a checkpoint is mapped from.
    return part_of(moment, parameter) if moment.shape == parameter.shape else moment.clone()
