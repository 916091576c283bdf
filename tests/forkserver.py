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
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from helpers import NOISE, is_time, options

from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.storage import Checkpoint, read_state
from hjepa_engine.recipes import pretrain  # noqa: F401  (what children need)
from hjepa_engine.run.cli import run_command

PRETRAIN = "hjepa_engine.recipes.pretrain:main"


@cache
def shared_server() -> ForkServer:
    """The server of this test session, ended with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


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

    def start(self, arguments: Sequence[str], stderr: Path, body: str = PRETRAIN) -> Child:
        """Start ``run_command(body, arguments)`` in a child.

        Args:
            arguments: of the command line.
            stderr: see :class:`Child`.
            body: ``module:function``; modules of this folder can be imported too.
        """
        pid = self.ask(body=body, arguments=list(arguments), stderr=str(stderr))
        self.sessions.add(pid)
        return Child(self, pid, stderr)

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


class Witness:
    """A handler that writes what it sees to ``path``, a JSON object a line.

    Each has ``iteration`` and ``what``: ``began``, ``trained`` (an iteration is complete) or ``validated``; the first one
    of a process has ``strays`` too, temporary files in the run folder once all of the run has started.

    Args:
        path: appended to.
        run_dir: of the run.
        pause: seconds that every iteration takes longer.
    """

    def __init__(self, path: str, run_dir: str, pause: float = 0.0) -> None:
        self.run_dir, self.pause = Path(run_dir), pause
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, last of all handlers."""
        from ignite.engine import Events

        from hjepa_engine import TrainEvents

        for event, what in (
            (Events.STARTED, "began"),
            (TrainEvents.ITERATION_FINALIZED, "trained"),
            (Events.EPOCH_COMPLETED, "validated"),
        ):
            engine.add_event_handler(event, self.write, what)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: time.sleep(self.pause))

    def write(self, engine: Any, what: str) -> None:
        """Write a line."""
        record = {"what": what, "iteration": engine.state.iteration}
        if what == "began":
            record["strays"] = strays_in(self.run_dir)
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())


def strays_in(run: Path) -> list[str]:
    """Hidden files and folders, at any depth, that a finished or just started run has no use for."""
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


#: Seconds, with validation, three epochs of five iterations, and a save after every fourth step.
TINY_RUN = {
    **NOISE,
    "training.epochs": 3,
    "checkpoint.save_every_steps": 4,
    "probe.enabled": "false",
    "logging.tensorboard.enabled": "false",
}


def command(run: Path, pause: float = 0.0, **changes: Any) -> list[str]:
    """Options of a tiny run in folder ``run``, witnessed beside it; ``data__num_workers=2`` sets ``data.num_workers``."""
    arguments = {"path": str(run.with_suffix(".jsonl")), "run_dir": str(run), "pause": pause}
    witness = {"class_path": "forkserver.Witness", "init_args": arguments}
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return options({**TINY_RUN, "run_dir": run, "handlers": json.dumps([witness]), **named})


def witnessed(run: Path, what: str = "") -> list[dict[str, Any]]:
    """What the witness has seen, or the part of it that is ``what``."""
    path = run.with_suffix(".jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for line in lines if (record := json.loads(line))["what"] == what or not what]


def checkpoints_of(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints of a run that can be loaded, newest first, and what is wrong with others; changes nothing."""
    problems: list[str] = []
    loadable = []
    for checkpoint in list_checkpoints(run / "checkpoints", lambda path, error: problems.append(f"{path}: {error}")):
        try:
            read_state(checkpoint)
            loadable.append(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(f"{checkpoint.path}: {error}")
    return loadable, problems


def outcome(run: Path) -> tuple[Any, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a run leaves and time has no part in: structure and tensors of its last checkpoint, all of them, and its log."""
    text, tensors = flatten(read_state(list_checkpoints(run / "checkpoints")[0]))
    structure = json.loads(text)
    values = structure["engine"]["metrics"]["values"]
    structure["engine"]["metrics"]["values"] = {name: values[name] for name in values if not is_time(name)}
    structure["handlers"]["MetricsLogger"]["writers"]["JsonlWriter"].pop("bytes")  # as long as its numbers are
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [{name: line[name] for name in line if not is_time(name)} for line in lines]
    assert len(tensors) > 150 and len(log) > 3  # modules, target encoder and optimizer; or nothing is compared
    return structure, tensors, log


def is_same(one: Any, other: Any) -> bool:
    """Whether two outcomes have the same bits."""
    (structure, tensors, log), (other_structure, other_tensors, other_log) = one, other
    equal = tensors.keys() == other_tensors.keys() and all(torch.equal(tensors[k], other_tensors[k]) for k in tensors)
    return equal and structure == other_structure and log == other_log


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


def _live(body: str, arguments: list[str], stderr: str) -> NoReturn:
    """A child's life."""
    os.setsid()
    _redirect(Path(stderr))
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
