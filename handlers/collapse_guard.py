"""Act when a logged metric says that something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist

from hjepa_engine.config.monitoring import GuardRule, default_rules
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import GuardStop, Rollback
from hjepa_engine.events import TrainEvents
from hjepa_engine.run.guard_rules import RuleMonitor, Verdict
from hjepa_engine.utils.distributed import rank_zero

logger = logging.getLogger(__name__)


class CollapseGuard:
    """Check logged metrics against rules; warn, end the run, or ask for a rollback.

    A rule checks each new value of its metric, once per log interval and at an epoch's end, after all other handlers. Rank 0
    decides for all. The guard counts rollbacks and does not carry them out: others read its ``rollbacks``,
    ``first_untrusted_iteration`` (``Checkpointer``) and ``lr_multiplier`` (``ParamSchedule`` of the learning rates).

    Listens to: ``TrainEvents.LOG_INTERVAL_COMPLETED``, ``LOG_METRICS``, ``ITERATION_FINALIZED`` and ``EPOCH_FINALIZED``.
    Reads: ``engine.state.metrics``, ``engine.state.optimizer_step``.
    Writes: ``engine.state.metrics["train/rollbacks"]``, once there are any; raises
    :class:`~hjepa_engine.errors.GuardStop` or :class:`~hjepa_engine.errors.Rollback`.
    Keys: ``guard.*``.

    Args:
        rules: see :class:`~hjepa_engine.config.monitoring.GuardRule`; by default those that only warn.
        max_rollbacks: one more ends the run.
        lr_factor: of every learning rate, for each rollback; above 0 and at most 1.
    """

    def __init__(
        self, rules: Sequence[GuardRule] | None = None, *, max_rollbacks: int = 2, lr_factor: float = 0.5
    ) -> None:
        self.monitors = [RuleMonitor(rule) for rule in (default_rules() if rules is None else rules)]
        self.max_rollbacks, self.lr_factor = max_rollbacks, lr_factor
        self.rollbacks = 0
        """How often the run was rolled back so far."""
        self._seen, self._is_new, self._is_named = 0, False, False
        self._noticed_at = 0, 0  # optimizer step and iteration of what is new

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)
        engine.add_event_handler(TrainEvents.EPOCH_FINALIZED, self.name_missing)
        engine.add_event_handler(TrainEvents.LOG_METRICS, self.notice)
        engine.add_event_handler(TrainEvents.ITERATION_FINALIZED, self.check)
        engine.add_event_handler(TrainEvents.EPOCH_FINALIZED, self.check)

    @property
    def lr_multiplier(self) -> float:
        """What every learning rate is multiplied by now; 1 unless the run was rolled back."""
        return self.lr_factor**self.rollbacks

    @property
    def first_untrusted_iteration(self) -> int | None:
        """Checkpoints from before this iteration are good for every rule that may roll back; None: all are."""
        rolling = [monitor for monitor in self.monitors if monitor.rule.action == "rollback"]
        bounds = [monitor.since if monitor.good is None else monitor.good + 1 for monitor in rolling]
        return min((bound for bound in bounds if bound is not None), default=None)

    def report(self, engine: Trainer) -> None:
        """Write how often the run was rolled back."""
        if self.rollbacks:
            engine.state.metrics["train/rollbacks"] = float(self.rollbacks)

    def name_missing(self, engine: Trainer) -> None:
        """Warn once, after an epoch, of metrics in the rules that do not exist; those of the default rules may be off."""
        if self._is_named:
            return
        missing = {monitor.rule.metric for monitor in self.monitors} - {rule.metric for rule in default_rules()}
        missing -= engine.state.metrics.keys()
        if missing and idist.get_rank() == 0:
            known = ", ".join(sorted(engine.state.metrics))
            logger.warning("guard.rules: there is no metric %s; known: %s", ", ".join(sorted(missing)), known)
        self._is_named = True

    def notice(self, engine: Trainer) -> None:
        """Note that there are new values; they are checked after all other handlers."""
        self._is_new, self._noticed_at = bool(self.monitors), (engine.state.optimizer_step, engine.state.iteration)

    def check(self, engine: Trainer) -> None:
        """Check what is new. Collective."""
        if not self._is_new:
            return
        self._is_new = False
        verdicts, seen = rank_zero(lambda: (self.evaluate_rules(engine), self.state_dict()))
        self.load_state_dict(seen)  # what rank 0 has seen, on every rank
        for verdict in verdicts:
            if verdict.action == "stop":
                raise GuardStop(verdict.text)
            if verdict.action == "rollback":
                if self.rollbacks >= self.max_rollbacks:
                    raise GuardStop(f"{verdict.text}; the run was rolled back {self.rollbacks} times already")
                raise Rollback(verdict.text, verdict.since)
            if idist.get_rank() == 0:
                logger.warning("%s", verdict.text)

    def evaluate_rules(self, engine: Trainer) -> list[Verdict]:
        """Verdicts of the rules on the new values."""
        fresh, self._seen = engine.state.metrics.since(self._seen)
        verdicts = [
            monitor.update(fresh[monitor.rule.metric], *self._noticed_at)
            for monitor in self.monitors
            if monitor.rule.metric in fresh
        ]
        # A warning must not be lost to a rule behind it that ends the run.
        return sorted(filter(None, verdicts), key=lambda verdict: verdict.action != "warn")

    def start_new_run(self) -> None:
        """The state is that of another run, whose rollbacks do not count here."""
        self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        """How often the run was rolled back, and what each rule has seen, by the rule."""
        monitors = {str(monitor.rule): monitor.state_dict() for monitor in self.monitors}
        return {"rollbacks": self.rollbacks, "seen": self._seen, "monitors": monitors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; rules that were not there begin anew.

        Raises:
            ValueError: the number of rollbacks is none.
        """
        if type(state_dict["rollbacks"]) is not int or state_dict["rollbacks"] < 0:
            raise ValueError(f"rollbacks must be an integer of at least 0, got {state_dict['rollbacks']!r}")
        self.rollbacks, self._seen, self._is_new = state_dict["rollbacks"], state_dict["seen"], False
        for monitor in self.monitors:
            if str(monitor.rule) in state_dict["monitors"]:
                monitor.load_state_dict(state_dict["monitors"][str(monitor.rule)])
