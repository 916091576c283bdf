"""Metrics: functions of tensors, running sums, and the names and thresholds of what is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hjepa_engine.metrics.means import WeightedMeans, effective_rank

__all__ = ["WeightedMeans", "effective_rank"]


def __getattr__(name: str) -> Any:
    """Import torch only when a function of tensors is asked for: the configuration knows names and thresholds alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hjepa_engine.metrics import means

    return getattr(means, name)
