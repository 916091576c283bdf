"""Metrics: pure functions of tensors, and sums that are accumulated over batches and ranks."""

from hjepa_engine.metrics.means import WeightedMeans, effective_rank

__all__ = ["WeightedMeans", "effective_rank"]
