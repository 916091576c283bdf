"""What a run was made with: versions, device, commit."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ignite.distributed as idist
import torch

from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.config.schema import Config
from hjepa_engine.engine import Trainer
from hjepa_engine.utils.imports import qualified_name


def describe_environment(config: Config) -> dict[str, Any]:
    """Versions, device, git commit, seed and command line."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("hjepa-engine", "torch", "torchvision", "pytorch-ignite", "timm", "numpy")
    return {
        "command": [sys.executable, *sys.argv],
        "seed": config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in packages},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "processes": idist.get_world_size(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the working directory's checkout, None where there is none."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def reproducibility_changes(checkpoint: Checkpoint, environment: Mapping[str, Any]) -> list[str]:
    """What differs from the environment that wrote a checkpoint; the run's bits may then differ too."""
    return [
        f"{name} is {environment[name]}, the checkpoint was written with {checkpoint.environment.get(name)}"
        for name in environment
        if checkpoint.environment.get(name) != environment[name]
    ]


def reproducibility_info(trainer: Trainer) -> dict[str, Any]:
    """What the bits of a run depend on, besides its configuration."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else trainer.device.type,
        "threads": torch.get_num_threads(),
        "processes": idist.get_world_size(),
        "step": qualified_name(trainer.step),
    }
