"""In which type a device multiplies fastest."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

#: What the Linux kernel calls instructions that multiply bfloat16: of x86 (AVX-512, AMX) and of Arm.
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 or float16 if ``device`` has instructions for it, else float32.

    A GPU multiplies bfloat16 from compute capability 8.0 on (Ampere), float16 from 7.0 on (Volta).
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _CPU_FLAGS & cpu_flags() else torch.float32


@cache
def cpu_flags() -> frozenset[str]:
    """Instructions of the CPU as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    known = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(known, "").split())
