"""Benchmarks of the engine, of checkpoints and of monitoring; not installed."""
