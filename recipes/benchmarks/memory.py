"""Memory of a run: what it needs, part by part, and what it takes."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from ignite.engine import Events

from hjepa_engine.events import TrainEvents
from hjepa_engine.recipes.benchmarks.sizes import make, optimizer_of
from hjepa_engine.recipes.common.run import Run

#: What training cannot do without, and ``needed_mb`` is the sum of.
PARTS = ("weights_mb", "target_mb", "gradients_mb", "moments_mb", "activations_mb")


def megabytes(tensors: Iterable[torch.Tensor]) -> float:
    """Size of tensors in MB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _trained(run: Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.modules.parameters() if parameter.requires_grad]


class KeptActivations:
    """Measures what a step keeps for its backward pass; while it is entered, the largest of all steps counts.

    Args:
        run: whose steps are measured; parameters that a step keeps count as weights.
    """

    def __init__(self, run: Run) -> None:
        self.trainer, self.step, self.megabytes = run.trainer, run.trainer.step, 0.0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in run.modules.parameters()}

    def __enter__(self) -> KeptActivations:
        self.trainer.step = self._watched
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.step = self.step

    def _watched(self, modules: Any, batch: Any) -> Any:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self.step(modules, batch)
        self.megabytes = max(self.megabytes, sum(kept.values()) / 1e6)
        return outputs


def needed(run: Run, activations: float) -> dict[str, float]:
    """The parts of the memory that training needs, in MB, and their sum.

    Args:
        run: after its first update, so that the optimizer has its moments.
        activations: what a step keeps for its backward pass, in MB.
    """
    trained = megabytes(_trained(run))
    moments = [value for state in optimizer_of(run).state.values() for value in state.values() if value.ndim]
    values = (trained, megabytes(run.modules.parameters()) - trained, trained, megabytes(moments), activations)
    parts = dict(zip(PARTS, values, strict=True))
    return {**parts, "needed_mb": sum(parts.values())}


class PeakMemory:
    """The largest resident memory of the process, or of tensors on a GPU, since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError):  # Linux; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")

    def megabytes(self) -> float:
        """The peak so far, in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def measure_memory(size: str, options: list[str], folder: str) -> dict[str, float]:
    """Memory of a run in MB: what it needs, its peak, and what the process had before; in a process of its own.

    The peak is that of three iterations up to the third one's end, without torch's own code and buffers, which a run of
    the default size has loaded before. What a checkpoint is copied to comes on top from the first save on.
    """
    first = make("default", options, f"{folder}/first")
    first.trainer.run(first.data, max_iters=2)
    first.preemption.close()
    del first
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc: what was freed goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss / 1e6
    run = make(size, options, f"{folder}/second")
    peak, found = PeakMemory(run.trainer.device), dict[str, float]()
    before = 0.0 if run.trainer.device.type == "cuda" else before

    def read() -> None:
        found["peak_mb"] = peak.megabytes() - before

    handle = run.trainer.add_event_handler(Events.ITERATION_COMPLETED, read)  # before a save
    run.trainer.run(run.data, max_iters=3)
    handle.remove()
    with KeptActivations(run) as kept:
        run.trainer.run(run.data, max_iters=5)
    found |= needed(run, kept.megabytes)
    found |= {"process_mb": before, "tensors_mb": peak_of_tensors(run)}
    run.preemption.close()
    return found


def peak_of_tensors(run: Run) -> float:
    """The most MB of tensors that live at one moment of an iteration, as the profiler saw them allocated and freed."""
    if run.trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.trainer.device) / 1e6
    outputs = [value for value in (run.trainer.state.output or {}).values() if isinstance(value, torch.Tensor)]
    moments = [value for state in optimizer_of(run).state.values() for value in state.values()]
    live = megabytes([*run.modules.parameters(), *moments, *outputs])
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        handle = run.trainer.add_event_handler(TrainEvents.UPDATE_COMPLETED, lambda: profile.step())
        run.trainer.run(run.data, max_iters=run.trainer.state.iteration + 1)
        handle.remove()
    results: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes):
        now += change
        highest = max(highest, now)
    return live + highest / 1e6


def memory_of(size: str, options: list[str]) -> dict[str, float]:
    """What :func:`measure_memory` finds in a process of its own; empty if the process ended for want of memory."""
    program = [sys.executable, __file__, size, *options]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    if not ended.returncode:
        return json.loads(ended.stdout.splitlines()[-1])
    if "out of memory" not in ended.stderr and ended.returncode != -9:
        raise SystemExit(ended.stderr)
    return {}


def free_megabytes() -> float:
    """Memory that is free: on the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e6
    return psutil.virtual_memory().available / 1e6


def fitting_batch(of_two: dict[str, float], wanted: int, free: float) -> int:
    """The largest of ``wanted``, its half, its quarter ... whose need leaves a third of the free memory; 0: none.

    Args:
        of_two: needed memory with batches of two images.
        wanted: images of a batch.
        free: memory in MB.
    """
    each = of_two["activations_mb"] / 2
    fixed = of_two["needed_mb"] - of_two["activations_mb"]
    while wanted and fixed + wanted * each > free / 1.5:
        wanted //= 2
    return wanted


def resident_over(steps: int, every: int, folder: str) -> list[float]:
    """Resident memory of the process in MB, every so many steps of the default run (which has all monitors off)."""
    run, found = make("default", [], folder), list[float]()
    process = psutil.Process()
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=every), lambda: found.append(process.memory_info().rss / 1e6)
    )
    run.trainer.run(run.data, max_iters=steps)
    run.preemption.close()
    return found


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        print(json.dumps(measure_memory(sys.argv[1], sys.argv[2:], temporary)))
