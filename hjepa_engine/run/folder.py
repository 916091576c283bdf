"""The run folder: its files, its lock, and how the run ended."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import ignite.distributed as idist

from hjepa_engine.config.changes import LENGTH_KEYS, MAY_CHANGE, Change, config_changes, plain_config
from hjepa_engine.config.loading import dump_config, load_config
from hjepa_engine.config.schema import Config
from hjepa_engine.data.contents import Description
from hjepa_engine.errors import ConfigError, DataError, PeerEnded
from hjepa_engine.run.environment import describe_environment
from hjepa_engine.run.other_data import accepted_changes
from hjepa_engine.utils.files import replace_file

logger = logging.getLogger(__name__)


#: How the reasons of processes begin that ended because of others.
_TOLD = ("another process ended", "lost contact")
_OF_CHECKPOINTS = ("epoch_", "damaged_", "index.json")


def own_folders(config: Config) -> dict[Path, str]:
    """Folders that a run writes to, which are no data where they lie in an image folder, and what a note says of them."""
    folder = RunFolder(config)
    return dict.fromkeys((folder.path, folder.checkpoint_path, folder.log_path), "this run writes there")


class RunFolder:
    """The folder of one run: ``config.yaml``, ``data.json``, ``environment.json``, ``status.json``, what handlers write.

    Args:
        config: of the run; ``run_dir`` names the folder, ``runs/<logging.experiment_name>`` by default.
        data: description of its data; None: it is not known.
    """

    def __init__(self, config: Config, data: Description | None = None) -> None:
        self.config, self.data = config, data
        self.path = Path(config.run_dir or Path("runs") / config.logging.experiment_name)
        self._locks: list[Any] = []
        self._newest: Path | None = None
        self._has_ended = False

    @property
    def log_path(self) -> Path:
        """Where TensorBoard and W&B write."""
        return Path(self.config.logging.log_dir) if self.config.logging.log_dir else self.path

    @property
    def checkpoint_path(self) -> Path:
        """Where the checkpoints are."""
        named = self.config.checkpoint.checkpoint_dir
        return Path(named) if named else self.path / "checkpoints"

    def status(self) -> dict[str, Any] | None:
        """What ``status.json`` says; None where there is none."""
        try:
            return dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run_dir {self.path} holds a damaged status.json; choose another one") from error

    def cause(self) -> PeerEnded | None:
        """What ``status.json`` says of another process that has ended since this run was started; None: nothing."""
        with suppress(ConfigError):
            status = self.status() or {}
            if status.get("state") in ("stopped", "preempted"):
                reason = str(status["reason"])
                if not reason.startswith(_TOLD):
                    reason = f"{_TOLD[0]}: rank {status.get('rank', 0)}: {reason}"
                return PeerEnded(reason, status["exit_code"])
        return None

    def changes(self) -> list[Change]:
        """How the configuration differs from that of the run in the folder; empty where there is none."""
        saved = self.path / "config.yaml"
        if not saved.exists():
            return []
        return config_changes(plain_config(load_config(saved)), self.config)

    @staticmethod
    def refuse(changes: Sequence[Change], where: str) -> None:
        """Refuse to go on with changes that make another run.

        Args:
            changes: since the run, or its checkpoint, was written.
            where: what holds that run.

        Raises:
            ConfigError: there are any.
        """
        if refused := [change for change in changes if not change.key.startswith(MAY_CHANGE)]:
            raise ConfigError(
                f"{where} holds a run with another configuration: {'; '.join(map(str, refused[:3]))}"
                f"{f' and {len(refused) - 3} more' if len(refused) > 3 else ''}; choose another --run_dir"
            )

    def finished_results(self, describe_data: Callable[[], Description | None]) -> dict[str, float] | None:
        """Results of the run if it is complete here; None if there is something to do.

        Args:
            describe_data: opens the data of a finished run and describes it; None: it never changes.

        Raises:
            ConfigError: the folder holds a run with another configuration.
            DataError: it holds a finished run with other data, or the data cannot be opened.
        """
        status = None if self.config.checkpoint.resume == "never" else self.status()
        if status is None:
            return None
        changes = self.changes()
        self.refuse(changes, f"run_dir {self.path}")
        if status.get("state") == "done" and not any(change.key.startswith(LENGTH_KEYS) for change in changes):
            return None if self._has_grown(describe_data) else dict(status["results"])
        return None

    def _has_grown(self, describe_data: Callable[[], Description | None]) -> bool:
        """Whether the finished run in the folder may go on with data that has grown."""
        saved = self._saved_data()
        if not saved:
            return False
        try:
            now = describe_data()
        except DataError as error:
            raise DataError(
                f"run_dir {self.path} holds a finished run whose data cannot be compared: {error}"
            ) from error
        return bool(accepted_changes(saved, now, f"run_dir {self.path}", self.config.data.allow_growth))

    def _saved_data(self) -> Description:
        """What ``data.json`` says; empty where there is none."""
        try:
            return dict(json.loads((self.path / "data.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run_dir {self.path} holds a damaged data.json; choose another one") from error

    def lock(self) -> None:
        """Lock the folder and that of the checkpoints against other processes; the lock of a dead process is gone.

        Raises:
            ConfigError: another process does, or the folder cannot be written to.
        """
        self.unlock()
        for key, folder in {"run_dir": self.path, "checkpoint.checkpoint_dir": self.checkpoint_path}.items():
            if key != "run_dir" and folder.absolute() == self.path.absolute():
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = open(folder / ".lock", "a+", encoding="utf-8")
                self._locks.append(file)
                # Unlike flock()'s, this lock is not inherited by loader processes, which may outlive a killed main process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                other = file.read().strip() or "another process"
                self.unlock()
                raise ConfigError(f"{folder} is in use by {other}") from error
            except OSError as error:
                self.unlock()
                raise ConfigError(f"{key} {folder} cannot be written to: {error.strerror}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

    def unlock(self) -> None:
        """Release the locks."""
        while self._locks:
            self._locks.pop().close()

    def set_aside(self) -> Path | None:
        """Move an earlier run in the folder, and its checkpoints, to ``previous_<n>``; returns that path, or None."""
        run, checkpoints = self.path.absolute(), self.checkpoint_path.absolute()
        # Elsewhere than in the run folder, only checkpoints are the run's for sure.
        elsewhere = [item for item in list_folder(checkpoints) if item.name.startswith(_OF_CHECKPOINTS)]
        if not (self.path / "status.json").exists() and not elsewhere:
            return None
        number = 1
        while any((folder / f"previous_{number}").exists() for folder in (run, checkpoints)):
            number += 1
        # Checkpoints first: if this is cut short, what is left of the run still says that it had some.
        for item in [*([] if checkpoints.is_relative_to(run) else elsewhere), *list_folder(run)]:
            if not item.name.startswith("previous_"):
                aside = item.with_name(f"previous_{number}")
                aside.mkdir(exist_ok=True)
                item.rename(aside / item.name)
        return self.path / f"previous_{number}"

    def enter(self) -> None:
        """Write ``config.yaml``, ``data.json`` and ``environment.json`` once the run is about to start.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        self._has_ended = False
        try:
            for stray in self.path.glob(".*.tmp"):
                stray.unlink()
            replace_file(self.path / "config.yaml", dump_config(self.config, absolute=True))
            if self.data is not None:
                replace_file(self.path / "data.json", json.dumps(self.data, indent=1) + "\n")
            replace_file(self.path / "environment.json", json.dumps(describe_environment(self.config), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be written to: {error.strerror}") from error

    def write_status(
        self,
        state: Literal["running", "done", "stopped", "preempted"],
        *,
        step: int,
        exit_code: int | None = None,
        reason: str = "",
        results: Any = None,
        checkpoint: Path | None = None,
        any_rank: bool = False,
    ) -> None:
        """Write ``status.json``: state, optimizer step, exit code, reason, who says so, results of the probe, checkpoint.

        Rank 0 writes; with ``any_rank`` others do too, for an error that rank 0 may not hear of.
        """
        if idist.get_rank() != 0 and not any_rank:
            return
        if state == "running" and self._has_ended:
            return  # a checkpoint that was written while the process ended
        self._has_ended = state != "running"
        self._newest = checkpoint or self._newest
        record = {
            "state": state,
            "step": step,
            "exit_code": exit_code,
            "reason": reason,
            "rank": idist.get_rank(),
            "results": results or {},
            "checkpoint": self._newest and str(self._newest),
        }
        try:
            replace_file(self.path / "status.json", json.dumps(record) + "\n")
        except OSError as error:  # a full disk: the exit code still says how the run ended
            logger.warning("%s cannot be written: %s", self.path / "status.json", error.strerror)


def list_folder(path: Path) -> list[Path]:
    """Files and folders in ``path`` except hidden ones; empty if it does not exist."""
    return [item for item in sorted(path.iterdir()) if not item.name.startswith(".")] if path.is_dir() else []
