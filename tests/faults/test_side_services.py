"""Loggers and screens that fail do not touch the run: its bits, its exit code, its time."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from forkserver import poll_until
from helpers import NOISE, ROOT, bytes_of, logged, options
from ignite.engine import Events

from hjepa_engine.checkpoint.folder import load_newest
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.handlers import MetricsLogger
from hjepa_engine.loggers import wandb as wandb_writer
from hjepa_engine.loggers.wandb import WandbWriter
from hjepa_engine.recipes import pretrain
from hjepa_engine.run.cli import run_command

RUN = {**NOISE, "probe.enabled": "false", "logging.log_frequency": 1}
TENSORBOARD = {"logging.tensorboard.enabled": "true"}
WANDB = {"logging.wandb.enabled": "true"}


def final(folder):
    """The bits of all tensors in a run's last checkpoint, by name, and its records, but for what is a time."""
    _, state = load_newest(folder / "checkpoints")
    _, tensors = flatten({"modules": state["modules"], "optimizer": state["handlers"]["OptimizerStep"]})
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}, logged(folder)


def command(folder, **changes):
    """Run the recipe in this process: its exit code, and the bits it ends with."""
    values = {**RUN, **{key.replace("__", "."): value for key, value in changes.items()}, "run_dir": folder}
    with pytest.raises(SystemExit) as stop:
        run_command(pretrain.main, options(values))
    return stop.value.code, final(folder)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the run ends with when nobody but metrics.jsonl listens."""
    code, end = command(tmp_path_factory.mktemp("alone") / "run")
    assert code == 0
    losses = [record["step"] for record in end[1] if {"train/loss", "val/loss"} & record.keys()]
    assert losses == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]  # each step, and the validation of each epoch
    return end


# --- TensorBoard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["__init__", "write_event", "flush", "close"])
def test_tensorboard_may_raise_wherever_it_likes(tmp_path, monkeypatch, caplog, alone, place):
    from tensorboardX.event_file_writer import EventsWriter

    def fail(*args, **kwargs):
        raise OSError(28, "No space\nleft on device")

    monkeypatch.setattr(EventsWriter, place, fail)
    code, end = command(tmp_path / "run", **TENSORBOARD)
    assert (code, end) == (0, alone)
    (warning,) = warnings_of(caplog)
    assert warning == "TensorBoardWriter failed and is off from now on: [Errno 28] No space left on device"


def test_a_log_folder_that_cannot_be_written_to_costs_the_event_files_and_nothing_else(tmp_path, caplog, alone):
    (tmp_path / "logs").write_text("a file, not a folder")
    code, end = command(tmp_path / "run", logging__log_dir=tmp_path / "logs", **TENSORBOARD, **WANDB)
    assert (code, end) == (0, alone)
    first, second = warnings_of(caplog)
    assert first.startswith("TensorBoardWriter failed and is off from now on: ") and str(tmp_path / "logs") in first
    assert second.startswith("WandbWriter failed and is off from now on: ") and str(tmp_path / "logs") in second
    assert (tmp_path / "logs").read_text() == "a file, not a folder"


class Bomb:
    """Ends a run within iteration 7, unsaved, unless a file says that it is defused."""

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), self.explode)

    def explode(self):
        if not Path("defused").exists():
            raise RuntimeError("boom")


def events_of(folder):
    """Of every event file, the oldest first: the step at which it begins, and (step, tag) of its scalars."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    files = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data, start, scalars = path.read_bytes(), None, []
        while data:  # TFRecords: a length, its CRC, an event, its CRC
            size, event = int.from_bytes(data[:8], "little"), Event()
            event.ParseFromString(data[12 : 12 + size])
            scalars += [(event.step, value.tag) for value in event.summary.value]
            if event.session_log.status == SessionLog.START:
                start = event.step
            data = data[16 + size :]
        files.append((start, scalars))
    return files


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    changes = {"checkpoint__save_every_steps": 4, "handlers": f"[{{class_path: {__name__}.Bomb}}]", **TENSORBOARD}
    assert command(tmp_path / "run", **changes)[0] == 1
    Path("defused").touch()
    assert command(tmp_path / "run", **changes) == (0, alone)
    (first_start, first), (second_start, second) = events_of(tmp_path / "run" / "tensorboard")
    assert [step for step, tag in first if tag == "train/loss"] == [1, 2, 3, 4, 5, 6]
    # The checkpoint that the run went on from is that of the first epoch's end, step 5.
    assert (first_start, second_start) == (None, 6)
    shown = [entry for entry in first if entry[0] < second_start] + second  # TensorBoard's rule for such a start
    assert [step for step, tag in shown if tag == "train/loss"] == list(range(1, 11))
    assert len(set(shown)) == len(shown)


# --- Weights & Biases ---------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Stands for the client in this process; raises or hangs where it is told to."""

    def __init__(self, place="", hangs=False):
        super().__init__("wandb")
        self.place, self.hangs, self.calls, self.rows, self.over = place, hangs, [], [], threading.Event()

    def act(self, place, **arguments):
        self.calls.append((place, arguments))
        if place != self.place:
            return
        if self.hangs:
            self.over.wait()
        raise ConnectionError(f"no {place}\nat all")

    def Settings(self, **arguments):
        assert arguments.get("init_timeout", 0) < 10
        return arguments

    def setup(self, settings):
        self.act("setup")

    def init(self, **arguments):
        self.act("init", **arguments)
        return self

    def define_metric(self, *args, **kwargs):
        self.act("define_metric")

    def log(self, row):
        self.act("log")
        self.rows.append(row)

    def finish(self):
        self.act("finish")

    def teardown(self, exit_code):
        self.act("teardown")
        sys.exit(exit_code)  # as the real one may


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("place", ["setup", "init", "define_metric", "log", "finish"])
def test_weights_and_biases_may_raise_or_hang_wherever_it_likes(tmp_path, monkeypatch, caplog, alone, place, hangs):
    fake = FakeWandb(place, hangs)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_writer, "PATIENCE", 0.5)
    code, end = command(tmp_path / "run", **WANDB)
    fake.over.set()
    assert (code, end) == (0, alone)
    (warning,) = warnings_of(caplog)
    why = "W&B does not answer" if hangs else f"no {place} at all"
    assert warning == f"WandbWriter failed and is off from now on: {why}"
    assert [name for name, _ in fake.calls].count("teardown") == 1  # its exit hook would wait for it


def test_weights_and_biases_goes_on_with_the_same_run_after_a_resume(tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    changes = {"checkpoint__save_every_steps": 4, "handlers": f"[{{class_path: {__name__}.Bomb}}]", **WANDB}
    assert command(tmp_path / "run", **changes)[0] == 1
    Path("defused").touch()
    assert command(tmp_path / "run", **changes) == (0, alone)
    first, second = [arguments for name, arguments in fake.calls if name == "init"]
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert [row["step"] for row in fake.rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]


def test_a_service_that_takes_nothing_any_more_does_not_fill_the_memory(tmp_path, monkeypatch, caplog):
    fake = FakeWandb("log", hangs=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_writer, "MAX_WAITING", 5)
    logger = MetricsLogger([WandbWriter(folder=tmp_path, config={}, project="p", name="n")])
    for step in range(10):
        logger.log_metrics({"a": 1.0}, step)
        poll_until(lambda: ("log", {}) in fake.calls, 10)
        assert bool(warnings_of(caplog)) == (step > 5)  # one is being sent, five wait
    fake.over.set()
    assert warnings_of(caplog) == ["WandbWriter failed and is off from now on: W&B does not answer"]


# --- Screens ------------------------------------------------------------------------------------------------------------


def leave_wandb_core(number):
    """Send a signal to the service process of this one's W&B."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition(" (")[2].rpartition(")")
            if name == "wandb-core" and int(rest.split()[1]) == os.getpid():
                os.kill(int(path.parent.name), number)
                Path("core").write_text(path.parent.name)


class BreakWandb:
    """Kill or stop the service in mid-run, and wait until it is dead or stopped."""

    def __init__(self, signal):
        self.signal = signal

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), self.hit)

    def hit(self):
        leave_wandb_core(self.signal)
        stat = Path("/proc") / Path("core").read_text() / "stat"
        poll_until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZTX", 10)


def full(argv):
    """The recipe on a full disk."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    _onto(descriptor, argv)


def gone(argv):
    """The recipe in a pipe whose reader has left."""
    reader, descriptor = os.pipe()
    os.close(reader)
    _onto(descriptor, argv)


def _onto(descriptor, argv):
    for name in argv.pop().split("+"):
        os.dup2(descriptor, {"stdout": 1, "stderr": 2}[name])
    pretrain.main(argv)


@pytest.mark.parametrize("body", ["full", "gone"])
@pytest.mark.parametrize("which", ["stdout", "stderr", "stdout+stderr"])
def test_a_screen_that_cannot_be_written_to_does_not_end_a_run(tmp_path, server, alone, body, which):
    words = options({**RUN, "logging.progress_bar": "true", "run_dir": tmp_path / "run"})
    child = server.start([*words, which], tmp_path / "stderr", f"{__name__}:{body}")
    assert child.wait() == 0, child.said
    assert final(tmp_path / "run") == alone
    if which == "stdout":
        reason = "No space left on device" if body == "full" else "Broken pipe"
        (warning,) = [line for line in child.said.splitlines() if "WARNING" in line]
        assert warning == f"WARNING: standard output cannot be written to: {reason}; the run goes on without it"
        assert "epoch 2/2" in child.said and "Traceback" not in child.said
    elif which == "stderr":
        assert "run folder: " in (tmp_path / "stderr.out").read_text()


def test_a_run_whose_output_and_error_are_closed_ends_as_any_other(tmp_path, alone):
    words = options({**RUN, "logging.progress_bar": "true", "run_dir": tmp_path / "run"})
    line = 'exec "$@" >&- 2>&- <&-'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shell = ["sh", "-c", line, "sh", sys.executable, str(ROOT / "recipes" / "pretrain.py"), *words]
    assert subprocess.run(shell, env=environment, timeout=120).returncode == 0
    assert final(tmp_path / "run") == alone


class InterruptPipeline:
    """What Ctrl-C does to ``pretrain.py 2>&1 | tee log``: the reader ends first, then the signal comes."""

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=4), self.interrupt)

    def interrupt(self):
        reader, descriptor = os.pipe()
        os.close(reader)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_in_a_pipeline_is_saved_on_ctrl_c_though_its_reader_is_gone(tmp_path, server):
    words = options({**RUN, "run_dir": tmp_path / "run"})
    handlers = f"--handlers=[{{class_path: {__name__}.InterruptPipeline}}]"
    child = server.start([*words, handlers], tmp_path / "stderr")
    assert child.wait() == 75
    assert load_newest(tmp_path / "run" / "checkpoints")[0].record.iteration == 4


# --- The real service, W&B's own process --------------------------------------------------------------------------------


def recipe_environment(tmp_path, **settings):
    """Of a process that is not logged in to W&B and finds the handlers of this file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**kept, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), **settings}


def wandb_run(tmp_path, signal=None, **settings):
    """The recipe as a process that logs to W&B: exit code, standard error, seconds from the run's start."""
    handlers = [] if signal is None else [f"{{class_path: {__name__}.BreakWandb, init_args: {{signal: {signal}}}}}"]
    words = options({**RUN, **WANDB, "run_dir": tmp_path / "run", "handlers": f"[{', '.join(handlers)}]"})
    recipe = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *words]
    try:
        with open(tmp_path / "stderr", "w") as stderr:  # no pipe: a service that hangs keeps it open
            environment = recipe_environment(tmp_path, **settings)
            code = subprocess.run(recipe, cwd=tmp_path, env=environment, stderr=stderr, timeout=200).returncode
        seconds = time.time() - (tmp_path / "run" / "environment.json").stat().st_mtime
    finally:
        if (tmp_path / "core").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((tmp_path / "core").read_text()), 9)
    return code, (tmp_path / "stderr").read_text().splitlines(), seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "settings", "says"),
    [
        (None, {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a"}, "connection refused"),
        (None, {"WANDB_MODE": "online"}, "No API key configured"),
        (None, {}, None),  # offline, and nothing to say
        (signal.SIGKILL, {}, ""),
        (signal.SIGSTOP, {}, "W&B does not answer"),
    ],
)
def test_the_real_service_may_be_away_or_die(tmp_path, alone, number, settings, says):
    code, errors, seconds = wandb_run(tmp_path, number, **settings)
    assert code == 0, errors
    assert final(tmp_path / "run") == alone
    if says is None:
        assert errors == []
        assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    else:
        (line,) = errors  # no traceback of its exit hook, no word of its own
        assert line.startswith("WARNING: WandbWriter failed and is off from now on: ") and says in line
    assert seconds < 50  # ten at the start, ten at the end; the rest is for a busy machine


@pytest.mark.slow
def test_the_files_of_the_real_service_carry_on_one_run_after_a_resume(tmp_path, alone):
    words = {**RUN, **WANDB, "run_dir": tmp_path / "run", "checkpoint.save_every_steps": 4}
    words["handlers"] = f"[{{class_path: {__name__}.Bomb}}]"
    environment = recipe_environment(tmp_path)
    recipe = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *options(words)]
    codes = []
    for _ in range(2):
        codes.append(subprocess.run(recipe, cwd=tmp_path, env=environment, timeout=120).returncode)
        (tmp_path / "defused").touch()
    assert codes == [1, 0]
    assert final(tmp_path / "run") == alone
    first, second = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert first.name == second.name  # which is that of the run's id
