"""Readings of GPUs and host; 1 GB is 1e9 bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import ignite.distributed as idist
import psutil
import torch


class Gpu(NamedTuple):
    """A GPU: its number in the names of metrics, its UUID as CUDA has it, and bytes allocated and reserved by torch."""

    number: int
    uuid: str
    memory: Callable[[], tuple[int, int]]


def visible_gpus(device: torch.device) -> list[Gpu]:
    """The GPUs that a process on ``device`` reports: one of several processes its own, a single one all visible ones.

    They are numbered by rank, or as torch numbers them. None where the run is not on a GPU.
    """
    if device.type != "cuda":
        return []
    numbered = [(number, number) for number in range(torch.cuda.device_count())]
    if idist.get_world_size() > 1:
        numbered = [(idist.get_rank(), torch.cuda.current_device() if device.index is None else device.index)]
    return [Gpu(n, str(torch.cuda.get_device_properties(i).uuid), partial(_memory, i)) for n, i in numbered]


def _memory(index: int) -> tuple[int, int]:
    return torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)


def read_gpu(gpu: Gpu, nvml: Any, handle: Any) -> dict[str, float]:
    """Memory by torch's allocator; by NVML, where it has a ``handle`` of the GPU and offers it, load, power, temperature."""
    allocated, reserved = gpu.memory()
    values = {"memory_allocated_gb": allocated / 1e9, "memory_reserved_gb": reserved / 1e9}
    if handle is None:
        return values
    for name, read in (
        ("utilization", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        ("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        ("temperature_c", lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
    ):
        with suppress(nvml.NVMLError, AttributeError):  # not offered by this GPU, not allowed, or gone from NVML
            values[name] = read()
    return values


def read_host() -> dict[str, float]:
    """Memory of this process and its children in GB, and the shares of the host's memory and cores in use by anybody."""
    process, values = psutil.Process(), {"process_memory_gb": 0.0}
    family = [process]
    with suppress(psutil.Error, OSError):  # where others' processes are hidden, one's own children may be
        family += process.children(recursive=True)
    for member in family:
        with suppress(psutil.Error, OSError):  # it has ended meanwhile
            values["process_memory_gb"] += member.memory_info().rss / 1e9
    with suppress(psutil.Error, OSError):
        values["host_memory_share"] = psutil.virtual_memory().percent / 100
    with suppress(psutil.Error, OSError):
        values["cpu_share"] = psutil.cpu_percent() / 100
    return values
