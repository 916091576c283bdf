"""Runs of a recipe as processes of their own, hundreds of them: a server imports everything once and forks a child per run.

A child does what ``python recipes/pretrain.py`` does after its imports, ends as any interpreter ends, and leads a session
of its own, so that its loader processes are found and its process group can be signalled.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from hjepa_engine.recipes.common import build, run  # noqa: F401  (what children need; a recipe imports them late)
from hjepa_engine.run.cli import run_command

PRETRAIN = "hjepa_engine.recipes.pretrain:main"
PROGRAM = "forkserver:program"


class Child:
    """A process that the server has forked.

    Args:
        server: whose child it is.
        pid: of the process, its session and its process group.
        stderr: the file that its standard error goes to; standard output goes to one beside it.
    """

    def __init__(self, server: ForkServer, pid: int, stderr: Path) -> None:
        self.server, self.pid, self.stderr = server, pid, stderr
        self.code: int | None = None

    def poll(self, timeout: float = 0.0) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after ``timeout`` seconds."""
        if self.code is None:
            self.code = self.server.ask(wait=self.pid, timeout=timeout)
        return self.code

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code; it is killed and the test fails if it takes longer than ``timeout`` seconds."""
        code = self.poll(timeout)
        if code is None:
            os.killpg(self.pid, 9)
            raise AssertionError(f"still running after {timeout} s: {self.said}")
        return code

    def until(self, condition: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Wait until ``condition()`` is true, and return it; the child must not end before."""
        return poll_until(lambda: condition() or self._check_alive(), timeout)

    def _check_alive(self) -> None:
        if self.poll() is not None:
            raise AssertionError(f"ended with {self.code}: {self.said}")

    @property
    def said(self) -> str:
        """What it wrote to standard error."""
        return self.stderr.read_text()

    @property
    def printed(self) -> str:
        """What it wrote to standard output."""
        return self.stderr.with_suffix(".out").read_text()

    @property
    def last_line(self) -> str:
        """Its last line on standard error."""
        return self.said.splitlines()[-1]

    @property
    def family(self) -> list[int]:
        """Its living descendants: processes of its session."""
        return [pid for pid in living({self.pid}) if pid != self.pid]


def _search_path() -> str:
    """The folders of tests, whose modules children import, before what is on the path already."""
    folder = Path(__file__).parent
    tests = [str(folder / name) for name in ("unit", "integration", "faults")]
    return os.pathsep.join([*tests, *filter(None, [os.environ.get("PYTHONPATH")])])


class ForkServer:
    """See the module; end it with :meth:`close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()},
            text=True,
        )
        self.sessions: set[int] = set()
        assert self._answer() == "ready"

    def start(self, arguments: Sequence[str], stderr: Path, body: str = PRETRAIN, folder: Path | None = None) -> Child:
        """Start ``run_command(body, arguments)`` in a child.

        Args:
            arguments: of the command line.
            stderr: see :class:`Child`.
            body: ``module:function``; modules of the tests' folders can be imported too.
            folder: the working directory, whose modules can be imported then; this process's one by default.
        """
        place = str(folder or Path.cwd())
        pid = self.ask(body=body, arguments=list(arguments), stderr=str(stderr), folder=place)
        self.sessions.add(pid)
        return Child(self, pid, stderr)

    def call(self, *arguments: Any, folder: Path, body: str = PRETRAIN) -> tuple[str, str, int]:
        """Let a child do its work in ``folder``: what it wrote to standard output and standard error, and its exit code."""
        with tempfile.TemporaryDirectory() as place:
            child = self.start([*map(str, arguments)], Path(place) / "stderr", body, folder)
            code = child.wait(120)
            return child.printed, child.said, code

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def orphans(self, timeout: float) -> list[int]:
        """Processes of all children's sessions that are still there after ``timeout`` seconds."""
        with contextlib.suppress(TimeoutError):
            poll_until(lambda: not living(self.sessions), timeout)
        return living(self.sessions)

    def close(self) -> None:
        """End the server, and what is left of its children."""
        for pid in living(self.sessions):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def poll_until(condition: Callable[[], Any], timeout: float) -> Any:
    """Wait until ``condition()`` is true, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {timeout} s")
        time.sleep(0.002)
    return found


def living(sessions: set[int]) -> list[int]:
    """Processes of some sessions, dead ones that nobody has waited for apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def serve() -> None:
    """Fork a child for every request on standard input, or wait for one."""

    torch.set_num_threads(1)
    answers = os.dup(1)

    def answer(value: Any) -> None:
        os.write(answers, (json.dumps(value) + "\n").encode())

    gc.collect()
    gc.freeze()  # else a child spends seconds on looking through what it has inherited
    answer("ready")
    for request in _lines(0):
        if "wait" in request:
            answer(_wait(request["wait"], request["timeout"]))
        elif pid := os.fork():
            answer(pid)
        else:
            os.close(answers)
            _live(**request)
    os._exit(0)


def program(argv: list[str]) -> None:
    """A child's body: what ``python FILE ...`` does with ``argv``."""
    sys.argv[:] = argv
    runpy.run_path(argv[0], run_name="__main__")


def _live(body: str, arguments: list[str], stderr: str, folder: str) -> NoReturn:
    """A child's life."""
    os.setsid()
    _redirect(Path(stderr))
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv[:] = ["pretrain.py", *arguments]
    module, name = body.split(":")
    _end_with(lambda: run_command(getattr(importlib.import_module(module), name), arguments))


def _end_with(command: Callable[[], Any]) -> NoReturn:
    """End as an interpreter does behind ``command``, but for the taking down of modules that the server needs as well."""
    code: Any = 0
    try:
        command()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lines(descriptor: int) -> Iterator[Any]:
    """Requests, read without a buffer that a child would inherit."""
    rest = b""
    while piece := os.read(descriptor, 65536):
        *lines, rest = (rest + piece).split(b"\n")
        yield from map(json.loads, lines)


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def _redirect(stderr: Path) -> None:
    for number, path, how in ((0, Path(os.devnull), os.O_RDONLY), (1, stderr.with_suffix(".out"), 0), (2, stderr, 0)):
        descriptor = os.open(path, how or os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    serve()
