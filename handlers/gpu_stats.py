"""Memory, load, power and temperature of GPUs and host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents

_GB = 1e9


class Gpu(NamedTuple):
    """A GPU: its number in the names of metrics, its UUID as CUDA has it, and bytes allocated and reserved by torch."""

    number: int
    uuid: str
    memory: Callable[[], tuple[int, int]]


def visible_gpus(device: torch.device) -> list[Gpu]:
    """The GPUs that a process on ``device`` speaks for: one of several processes for its own, a single one for all visible.

    They are numbered by rank, or as torch numbers them. None where the run is not on a GPU.
    """
    if device.type != "cuda":
        return []
    numbered = [(number, number) for number in range(torch.cuda.device_count())]
    if idist.get_world_size() > 1:
        numbered = [(idist.get_rank(), torch.cuda.current_device() if device.index is None else device.index)]
    return [
        Gpu(number, str(torch.cuda.get_device_properties(place).uuid), partial(_memory, place))
        for number, place in numbered
    ]


def _memory(place: int) -> tuple[int, int]:
    return torch.cuda.memory_allocated(place), torch.cuda.memory_reserved(place)


class GpuStats:
    """Log what GPUs and hosts are doing, once per log interval.

    What cannot be read (no driver, no permission, not offered by this GPU) is not written; there is no warning. GPUs are
    looked up by UUID, so that ``CUDA_VISIBLE_DEVICES`` may name any of them in any order. All ranks write the same values.

    Listens to: ``STARTED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``, ``COMPLETED``.
    Writes: to ``engine.state.metrics``, 1 GB being 1e9 bytes: ``system/gpu<i>_memory_allocated_gb`` (of live tensors) and
    ``_memory_reserved_gb`` (taken from the GPU by torch), at the end of the window; ``_utilization``, share of the last
    second or less in which the GPU was at work, from 0 to 1; ``_power_w``, watts; ``_temperature_c``, degrees Celsius;
    ``system/process_memory_gb``, resident memory of all ranks and their loader workers, where pages that processes
    share count once for each; ``host_memory_share`` and ``cpu_share``, the share of the host's memory and, since the former
    reading, of its cores' time in use by anybody, from 0 to 1, of the fullest and the busiest host.

    Args:
        gpus: finds the GPUs of this process, given its device.
        nvml: NVIDIA's NVML; by default the module ``pynvml``, imported only where there are GPUs.
    """

    def __init__(self, gpus: Callable[[torch.device], Sequence[Gpu]] = visible_gpus, nvml: Any = None) -> None:
        self._find_gpus, self._given_nvml = gpus, nvml
        self._gpus: Sequence[Gpu] = ()
        self._nvml: Any = None
        self._handles: dict[int, Any] = {}

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        self._psutil = import_module("psutil")
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: StepEngine) -> None:
        """Find the GPUs."""
        self.close()  # a run that ended with an error has not
        self._psutil.cpu_percent()  # counts from here
        self._process = self._psutil.Process()
        self._gpus = self._find_gpus(engine.device)
        if not self._gpus:
            return
        try:
            nvml = self._given_nvml or import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:  # no driver
            return
        self._nvml = nvml
        for gpu, kind in product(self._gpus, ("GPU", "MIG")):
            with suppress(nvml.NVMLError):
                self._handles[gpu.number] = nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{gpu.uuid}")

    def report(self, engine: StepEngine) -> None:
        """Read and write. Collective."""
        own = self._of_host() | {name: value for gpu in self._gpus for name, value in self._of_gpu(gpu).items()}
        readings: list[Any] = [own]
        if idist.get_world_size() > 1:
            readings = [None] * idist.get_world_size()
            dist.all_gather_object(readings, own)
        for name in sorted({name for reading in readings for name in reading}):
            values = [reading[name] for reading in readings if name in reading]
            engine.state.metrics[f"system/{name}"] = (sum if name == "process_memory_gb" else max)(values)

    def _of_host(self) -> dict[str, float]:
        failures = (self._psutil.Error, OSError)
        processes, values = [self._process], {}
        with suppress(*failures):  # where others' processes are hidden, one's own children may be
            processes += self._process.children(recursive=True)
        resident = 0
        for process in processes:
            with suppress(*failures):  # it has ended meanwhile
                resident += process.memory_info().rss
        for name, read in (
            ("process_memory_gb", lambda: resident / _GB),
            ("host_memory_share", lambda: self._psutil.virtual_memory().percent / 100),
            ("cpu_share", lambda: self._psutil.cpu_percent() / 100),
        ):
            with suppress(*failures):
                values[name] = read()
        return values

    def _of_gpu(self, gpu: Gpu) -> dict[str, float]:
        name, nvml, (allocated, reserved) = f"gpu{gpu.number}", self._nvml, gpu.memory()
        values = {f"{name}_memory_allocated_gb": allocated / _GB, f"{name}_memory_reserved_gb": reserved / _GB}
        if gpu.number not in self._handles:
            return values
        for key, read in (
            ("utilization", lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            ("power_w", lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            ("temperature_c", lambda handle: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        ):
            with suppress(nvml.NVMLError, AttributeError):  # not offered by this GPU, not allowed, or gone from NVML
                values[f"{name}_{key}"] = read(self._handles[gpu.number])
        return values

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml, self._handles = None, {}
