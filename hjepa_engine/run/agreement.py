"""What all processes of a run must have in common, found out before it starts."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from hjepa_engine.config.changes import flat, plain_config
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import ConfigError
from hjepa_engine.utils.distributed import gather_objects, rank, rank_zero, world_size

#: Seconds that a file may take to be seen on another machine: network file systems remember for a while what there was.
_PATIENCE = 10.0
#: Keys that may differ between machines.
_LOCAL = ("device", "data.data_path", "data.num_workers", "data.pin_memory", "data.on_device")


def refuse_other_configs(config: Config) -> None:
    """Refuse processes with different configurations; devices and what loads the data may differ. Collective.

    Raises:
        ConfigError: on all ranks, with the first key that differs, its values and a rank.
    """
    if world_size() == 1:
        return
    ours = {key: value for key, value in flat(plain_config(config)).items() if key not in _LOCAL}
    theirs = rank_zero(lambda: ours)
    keys = dict.fromkeys((*theirs, *ours))
    difference = next((key for key in keys if theirs.get(key) != ours.get(key)), None)
    for number, found in enumerate(gather_objects((difference, ours.get(difference or "")))):
        if found[0] is not None:
            raise ConfigError(
                f"all processes must have one configuration, but {found[0]} is {theirs.get(found[0])} on rank 0 and "
                f"{found[1]} on rank {number}"
            )


def refuse_local_folders(folders: Mapping[str, Path]) -> None:
    """Refuse folders that not all processes see, because each machine has its own. Collective.

    Args:
        folders: by their keys in the configuration; rank 0 can write there.

    Raises:
        ConfigError: on all ranks.
    """
    if world_size() == 1:
        return
    for key, folder in folders.items():
        token = folder / rank_zero(lambda: f".seen_by_all_{secrets.token_hex(8)}")
        try:
            rank_zero(lambda token=token: token.write_text(""))  # type: ignore[misc]
            blind = [where for where in gather_objects(None if _is_seen(token) else _name()) if where]
        except OSError as error:
            raise ConfigError(f"{key} {folder} cannot be written to: {error.strerror}") from error
        finally:
            if rank() == 0:
                token.unlink(missing_ok=True)
        if blind:
            more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
            raise ConfigError(
                f"{key} {folder} must be a folder that all processes share; what rank 0 wrote there is not seen by "
                f"{blind[0]}{more}"
            )


def _is_seen(token: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        if token.parent.is_dir():
            os.listdir(token.parent)  # lets a network file system look again
        time.sleep(0.05)
    return True


def _name() -> str:
    return f"rank {rank()} on {socket.gethostname()}"
