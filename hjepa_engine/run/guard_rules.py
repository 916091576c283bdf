"""Rules on metrics: when one is broken, and the message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from hjepa_engine.config.monitoring import GuardRule
from hjepa_engine.metrics.health import advice_for

#: A spike is relative to the median of at most 20 former values; at least 5 are needed.
_HISTORY, MIN_HISTORY = 20, 5


class Verdict(NamedTuple):
    """A rule is broken: what to do, and what to say."""

    action: str
    text: str
    """What was measured, and what usually helps."""
    since: int
    """First iteration that cannot be trusted: the one after the last good reading."""


class RuleMonitor:
    """One rule and the readings it has seen.

    Raises:
        ValueError: the rule has not exactly one condition.
    """

    def __init__(self, rule: GuardRule) -> None:
        if len(rule.conditions) != 1:
            raise ValueError(
                f"a rule on {rule.metric} must have one condition, got {' and '.join(rule.conditions) or 'none'}"
            )
        self.rule = rule
        self.history: list[float] = []
        self.best = -math.inf
        self.wrong = 0
        self.good: int | None = None
        """Iteration of the last good reading."""
        self.since: int | None = None
        """First iteration that cannot be trusted; None: all can."""

    def update(self, value: float, step: int, iteration: int) -> Verdict | None:
        """Check a new value; returns a verdict at the ``rule.readings``-th bad reading in a row, once."""
        if step < self.rule.after or not self._is_wrong(value):
            self.wrong, self.since, self.good = 0, None, iteration
            if math.isfinite(value):
                self.history = [*self.history, value][-_HISTORY:]
                self.best = max(self.best, value)
            return None
        self.wrong += 1
        if self.since is None:
            # What was saved since the last good reading may be spoiled already.
            self.since = iteration if self.good is None else self.good + 1
        if self.wrong != self.rule.readings:
            return None
        return Verdict(self.rule.action, self._sentence(value, step), self.since)

    def _is_wrong(self, value: float) -> bool:
        rule = self.rule
        if rule.non_finite or not math.isfinite(value):
            return rule.non_finite and not math.isfinite(value)
        if rule.spike is not None:
            return len(self.history) >= MIN_HISTORY and value > rule.spike * median(self.history)
        if rule.drop is not None:
            return math.isfinite(self.best) and value < (1 - rule.drop) * self.best
        if rule.below is not None:
            return value < rule.below
        return rule.above is not None and value > rule.above

    def _sentence(self, value: float, step: int) -> str:
        rule = self.rule
        if rule.non_finite:
            what = "is not finite"
        elif rule.spike is not None:
            what = f"is {value:.4g}, more than {rule.spike:g} times its median of {median(self.history):.4g}"
        elif rule.drop is not None:
            what = f"is {value:.4g}, more than {100 * rule.drop:g} % below its best of {self.best:.4g}"
        else:
            what = f"is {value:.4g}, {'below' if rule.below is not None else 'above'} {rule.below or rule.above or 0:g}"
        times = f" for {rule.readings} readings in a row" if rule.readings > 1 else ""
        advice = advice_for(rule.metric)
        return f"{rule.metric} {what}{times}, at step {step}{'; ' + advice if advice else ''} (docs/health.md)"

    def state_dict(self) -> dict[str, Any]:
        """The readings so far."""
        names = ("best", "wrong", "good", "since")
        return {"history": list(self.history), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history, self.best = [float(value) for value in state_dict["history"]], float(state_dict["best"])
        self.wrong, self.good, self.since = state_dict["wrong"], state_dict["good"], state_dict["since"]
