"""Memory, load, power and temperature of GPUs and host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import product
from typing import Any

import ignite.distributed as idist
import psutil
import torch
import torch.distributed as dist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.metrics.system import Gpu, read_gpu, read_host, visible_gpus


class GpuStats:
    """Log what GPUs and hosts are doing, once per log interval.

    What cannot be read (no driver, no permission, not offered by this GPU) is not written; there is no warning. GPUs are
    looked up by UUID, so that ``CUDA_VISIBLE_DEVICES`` may name any of them in any order. All ranks write the same values.

    Listens to: ``STARTED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``, ``COMPLETED``.
    Writes: to ``engine.state.metrics``, 1 GB being 1e9 bytes: ``system/gpu<i>_memory_allocated_gb`` (of live tensors) and
    ``_memory_reserved_gb`` (taken from the GPU by torch), at the end of the interval; ``_utilization``, share of the last
    second or less in which the GPU was at work, from 0 to 1; ``_power_w``, watts; ``_temperature_c``, degrees Celsius;
    ``system/process_memory_gb``, resident memory of all ranks and their loader workers, where pages that processes
    share count once for each; ``host_memory_share`` and ``cpu_share``, the share of the host's memory and, since the last
    reading, of its cores' time in use by anybody, from 0 to 1, of the fullest and the busiest host.
    Keys: ``logging.system_metrics``.

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
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: StepEngine) -> None:
        """Find the GPUs."""
        self.close()  # a run that ended with an error has not
        psutil.cpu_percent()  # counts from here
        self._gpus = self._find_gpus(engine.device)
        if self._gpus:
            with suppress(ImportError):
                self._find_handles(self._given_nvml or import_module("pynvml"))

    def _find_handles(self, nvml: Any) -> None:
        with suppress(nvml.NVMLError):  # no driver
            nvml.nvmlInit()
            self._nvml = nvml
            for gpu, kind in product(self._gpus, ("GPU", "MIG")):
                with suppress(nvml.NVMLError):
                    self._handles[gpu.number] = nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{gpu.uuid}")

    def report(self, engine: StepEngine) -> None:
        """Read and write. Collective."""
        own = read_host()
        for gpu in self._gpus:
            values = read_gpu(gpu, self._nvml, self._handles.get(gpu.number))
            own |= {f"gpu{gpu.number}_{name}": value for name, value in values.items()}
        readings: list[Any] = [own]
        if idist.get_world_size() > 1:
            readings = [None] * idist.get_world_size()
            dist.all_gather_object(readings, own)
        for name in sorted({name for reading in readings for name in reading}):
            of_ranks = [reading[name] for reading in readings if name in reading]
            engine.state.metrics[f"system/{name}"] = (sum if name == "process_memory_gb" else max)(of_ranks)

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml, self._handles = None, {}
