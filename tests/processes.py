"""Several processes of one group, forked from the one that tests."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hjepa_engine.devices import process_group
from hjepa_engine.run.cli import run_command


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, number: int, port: int) -> dict[str, str]:
    """What a launcher tells the process ``rank`` of ``number``."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Commands:
    """A recipe's command in several processes of one group, as a launcher that does nothing else would start them.

    Args:
        number: how many.
        folder: for what they write: ``rank0.out`` and so on.
        main: the recipe's ``main``.
        arguments: of each rank.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        main: Callable[[Sequence[str]], None],
        arguments: Callable[[int], Sequence[str]],
    ) -> None:
        self.folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.pids: list[int] = []
        for rank in range(number):
            child = os.fork()
            if not child:
                try:
                    os.environ |= environment(rank, number, port)
                    out = os.open(folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(out, 1), os.dup2(out, 2)
                    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                    run_command(main, arguments(rank))
                except SystemExit as left:
                    os._exit(99 if left.code else 98)  # a process of a group leaves by itself
                finally:
                    os._exit(97)
            self.pids.append(child)

    def said(self, rank: int) -> str:
        """What a process wrote."""
        return (self.folder / f"rank{rank}.out").read_text()

    def wait(self, timeout: float = 60.0) -> list[int]:
        """Exit codes by rank; whoever is still there after ``timeout`` seconds is killed."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + timeout
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
                elif rank not in codes and time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return [codes[rank] for rank in range(len(self.pids))]


def in_processes(number: int, folder: Path, body: Callable[[], Any]) -> list[Any]:
    """Run ``body()`` in ``number`` processes of one group; what each returns, by rank."""
    port, children = free_port(), []
    for rank in range(number):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ |= environment(rank, number, port)
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
