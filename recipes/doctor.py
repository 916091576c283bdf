"""Print what a report of a problem needs, and try a training run of ten iterations in a temporary folder.

    hjepa doctor [--quick]

Exit code 1: the training failed; the last line says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hjepa_engine
from hjepa_engine.errors import RunError, one_line
from hjepa_engine.run.cli import command_parser, run_command

PACKAGES = ("torch", "torchvision", "pytorch-ignite", "timm", "numpy", "pillow")
#: Instructions of a CPU that make training faster.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
#: Side of the matrices whose product is timed.
_SIDE = {"cpu": 1024, "cuda": 8192}


def main(argv: Sequence[str]) -> None:
    """Print it, and train."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("--quick", action="store_true", help="leave out the training")
    known = parser.parse_args(argv)
    found = describe()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}", flush=True)
    if not known.quick:
        print(f"{'training':{width}}  {try_training()}")


def describe() -> dict[str, str]:
    """Versions, device, processor, speed, disk and memory, by name."""
    import multiprocessing
    import platform

    import psutil
    import torch

    from hjepa_engine.devices import choose_device
    from hjepa_engine.utils.arithmetic import cpu_flags, fastest_dtype

    device = choose_device("auto")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory()
    return {
        "hjepa-engine": f"{hjepa_engine.__version__} in {Path(hjepa_engine.__file__).parent}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        **{name: installed(name) for name in PACKAGES},
        "device": f"{device.type}, {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"
        + (f" ({', '.join(gpus)}), CUDA {torch.version.cuda}" if gpus else ""),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{' '.join(flag for flag in _FLAGS if flag in cpu_flags()) or 'instructions unknown'}",
        "precision": f"use_amp: auto is {str(fastest_dtype(device)).removeprefix('torch.')} here; {speeds(device.type)}",
        "loaders": f"processes start by {multiprocessing.get_start_method()}; /dev/shm {free('/dev/shm')}",
        "disk": f"runs/ {free('runs')}, temporary folder {tempfile.gettempdir()} {free(tempfile.gettempdir())}",
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available",
    }


def installed(name: str) -> str:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def free(path: str) -> str:
    """How much room is left at a path, or where it would be made."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e9:.1f} GB free"


def speeds(device: str) -> str:
    """:func:`measure`, or why they cannot be measured: a GPU may be full, or broken."""
    try:
        return measure(device)
    except RuntimeError as error:
        return f"no product of matrices: {one_line(error)}"


def measure(device: str) -> str:
    """How fast float32 and bfloat16 matrices are multiplied, in words; takes about a second."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_SIDE[device], _SIDE[device], dtype=dtype, device=device)
        matrix @ matrix  # the first product sets up the libraries
        done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < 0.3:
            (matrix @ matrix)[0, 0].item()  # waits for a GPU
            done += 1
        found[dtype] = 2 * _SIDE[device] ** 3 * done / seconds
    float32, bfloat16 = found[torch.float32], found[torch.bfloat16]
    return f"float32 {float32 / 1e12:.3g} TFLOP/s, bfloat16 {bfloat16 / 1e12:.3g} ({bfloat16 / float32:.2g} times)"


def try_training() -> str:
    """Train ten iterations of the default run, with one loader process, in a process and a folder of their own.

    Returns:
        That it worked, and the seconds it took.

    Raises:
        RunError: it did not; the message has its exit code and its last line.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = (
            "--training.max_iters=10",
            "--data.num_workers=1",
            "--probe.enabled=false",
            f"--run_dir={folder}/run",
        )
        command = [sys.executable, "-m", "hjepa_engine.recipes.pretrain", *options]
        search = os.pathsep.join(filter(None, [str(Path(hjepa_engine.__file__).parents[1]), os.getenv("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": search, "WORLD_SIZE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"training failed with exit code {done.returncode}: {last}")
    return f"10 iterations of the default run work here, {time.monotonic() - began:.0f} s with the start of Python"


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
