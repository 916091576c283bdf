"""Several processes of one group, forked from the one that tests."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hjepa_engine.devices import process_group


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(number: int, folder: Path, body: Callable[[], Any]) -> list[Any]:
    """Run ``body()`` in ``number`` processes of one group; what each returns, by rank."""
    port, children = free_port(), []
    for rank in range(number):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                with process_group("cpu"):
                    torch.save(body(), folder / f"rank{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * number
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(number)]
