"""The run folder: what a run leaves behind, and how it ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import ignite.distributed as idist
import torch

from hjepa_engine.config import Config
from hjepa_engine.config_loading import dump_config
from hjepa_engine.errors import ConfigError

State = Literal["running", "done", "stopped"]


class RunFolder:
    """The folder of one run: ``config.yaml``, ``environment.json``, ``status.json`` and what handlers write.

    Args:
        config: of the run; ``run_dir`` names the folder, ``runs/<logging.experiment_name>`` by default.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run_dir or Path("runs") / config.logging.experiment_name)

    @property
    def log_path(self) -> Path:
        """Where TensorBoard and W&B write."""
        return Path(self.config.logging.log_dir) if self.config.logging.log_dir else self.path

    def status(self) -> dict[str, Any] | None:
        """What ``status.json`` says; None where there is none."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"run_dir {self.path} holds a damaged status.json; choose another one") from error

    def finished_results(self) -> dict[str, float] | None:
        """Results of the run if this very configuration is complete here, None if there is no run yet.

        Raises:
            ConfigError: the folder holds another run, or one that is not complete.
        """
        status = self.status()
        if status is None:
            return None
        same = (self.path / "config.yaml").read_text(encoding="utf-8") == dump_config(self.config)
        if status["state"] == "done" and same:
            return dict(status["results"])
        what = f"a run that is {status['state']}" if same else "a run with another configuration"
        raise ConfigError(f"run_dir {self.path} holds {what}; choose another --run_dir, or delete the folder")

    def create(self) -> None:
        """Make the folder and describe the run in it.

        Raises:
            ConfigError: the folder holds a run already, or cannot be made or written to.
        """
        if idist.get_rank() != 0:
            return
        if self.status() is not None:
            raise ConfigError(f"run_dir {self.path} holds a run; choose another --run_dir, or delete the folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.yaml", dump_config(self.config))
            write_atomic(self.path / "environment.json", json.dumps(describe_environment(self.config), indent=2) + "\n")
            self.write_status("running", 0)
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be written to: {error.strerror}") from error

    def write_status(
        self, state: State, step: int, exit_code: int | None = None, reason: str = "", results: Any = None
    ) -> None:
        """Say how the run is: its state, last optimiser step, exit code, why, and the probe's results."""
        if idist.get_rank() == 0:
            record = {"state": state, "step": step, "exit_code": exit_code, "reason": reason, "results": results or {}}
            write_atomic(self.path / "status.json", json.dumps(record) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old or the new content, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
