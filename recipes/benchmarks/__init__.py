"""Benchmarks of the engine, of checkpoints, of data and of monitoring; not installed."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """What figures were measured on, in two lines."""
    processor, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    cores = f"{processor}, {os.cpu_count()} cores, {threads} torch threads"
    return f"{cores}\nPython {platform.python_version()}, torch {torch.__version__}"
