"""What is on disk after a crash, a full disk or a broken one, at every file-system call of a save."""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import threading

import pytest
import torch
from helpers import linear_trainer, rows, same_bits, same_state, weights_of
from ignite.engine import Events

from hjepa_engine.checkpoint.folder import INDEX, list_checkpoints, load_newest
from hjepa_engine.checkpoint.retention import Record
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.state import resume
from hjepa_engine.checkpoint.storage import MANIFEST, STATE
from hjepa_engine.checkpoint.writer import CheckpointWriter, describe_record
from hjepa_engine.errors import CheckpointError
from hjepa_engine.handlers import Checkpointer, RetentionPolicy

#: Functions of ``os`` that are watched, and how many of their arguments name a file.
COUNT = {"mkdir": 1, "open": 1, "write": 1, "fsync": 1, "close": 1, "rename": 2, "replace": 2, "unlink": 1, "rmdir": 1}
COUNT |= {"listdir": 1, "lstat": 1}


class Disk:
    """The calls that the writing thread makes to the file system, in order; the ``at``-th one (from 0) goes wrong."""

    def __init__(self, monkeypatch, at=None, fault=None, largest_write=None):
        self.calls, self.at, self.fault, self.largest_write = [], at, fault, largest_write
        self._open = {}
        for name in COUNT:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def call(*args, **kwargs):
            if not threading.current_thread().name.startswith("checkpoint"):
                return real(*args, **kwargs)
            number = len(self.calls)
            places = [
                self._open.get(arg) if isinstance(arg, int) else os.path.basename(arg) for arg in args[: COUNT[name]]
            ]
            self.calls.append((name, *places))
            if self.at is not None and (number == self.at or (number > self.at and self.fault == "full")):
                if self.fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "close":
                    real(*args)
                code = errno.EIO if self.fault == "broken once" else errno.ENOSPC
                raise OSError(code, os.strerror(code))
            if name == "write" and self.largest_write is not None:
                args = (args[0], args[1][: self.largest_write])
            result = real(*args, **kwargs)
            if name == "open":
                self._open[result] = os.path.basename(args[0])
            return result

        return call

    def place(self, *call):
        """When the first such call was made."""
        return self.calls.index(call)


def state_of(iteration):
    generator = torch.Generator().manual_seed(iteration)
    return {"iteration": iteration, "weights": [torch.randn(3, 5, generator=generator), torch.zeros(0)]}


def save(writer, iteration):
    name = f"epoch_0000_step_{iteration:08d}"
    description = describe_record(Record(name, iteration, iteration, 0, False, 1.0 / iteration), "val/loss", {})
    description |= {"reasons": ["steps"], "config": {}, "environment": {}}
    writer.start(writer.copy(name, *flatten(state_of(iteration)), description))
    writer.wait()


def two_saves(folder):
    """A writer whose third save will also remove the first checkpoint."""
    writer = CheckpointWriter(folder, RetentionPolicy(keep_last_n=2, keep_best_n=0))
    writer.prepare()
    save(writer, 1)
    save(writer, 2)
    return writer


def trace(folder):
    """Calls of an undisturbed third save."""
    writer = two_saves(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        save(writer, 3)
    assert sorted(path.name[-1] for path in folder.glob("epoch_*")) == ["2", "3"]
    return disk


def assert_usable(folder, at_least):
    """As a new process finds it: the newest checkpoint is valid and has the bits that were saved."""
    checkpoint, state = load_newest(folder)
    assert checkpoint.record.iteration >= at_least
    assert same_state(state, state_of(checkpoint.record.iteration))
    assert not list(folder.glob("damaged_*"))
    assert len(list_checkpoints(folder)) >= 2


def assert_goes_on(folder, writer, iteration):
    """The next save works, and the next start leaves nothing but checkpoints and the index."""
    save(writer, iteration)
    assert writer.failure is None
    assert load_newest(folder)[0].record.iteration == iteration
    writer.prepare()
    assert all(name.startswith("epoch_") or name == INDEX for name in os.listdir(folder))
    assert len(list_checkpoints(folder)) == 2


def test_files_are_on_disk_before_the_rename_and_the_rename_before_anything_is_removed(tmp_path):
    disk = trace(tmp_path / "checkpoints")
    new, old = "epoch_0000_step_00000003", "epoch_0000_step_00000001"
    order = [
        ("mkdir", f".writing_{new}"),
        ("open", STATE),
        ("fsync", STATE),
        ("open", MANIFEST),
        ("fsync", MANIFEST),
        ("fsync", f".writing_{new}"),
        ("rename", f".writing_{new}", new),
        ("fsync", "checkpoints"),
        ("rename", old, f".deleted_{old}"),
        ("unlink", STATE),
        ("rmdir", f".deleted_{old}"),
    ]
    places = [disk.place(*call) for call in order]
    assert places == sorted(places)
    removals = [number for number, call in enumerate(disk.calls) if call[0] in ("rename", "unlink", "rmdir", "replace")]
    assert removals[0] == places[6]  # nothing at all is removed or renamed before
    assert disk.calls[-1] != order[-1] and any(call[0] == "replace" and call[2] == INDEX for call in disk.calls)
    last_write = max(number for number, call in enumerate(disk.calls[: places[5]]) if call[0] == "write")
    assert disk.calls[last_write] == ("write", MANIFEST) and last_write < places[4]


def faults(tmp_path, fault, every):
    """Let every ``every``-th call of a save go wrong; how many did."""
    disk = trace(tmp_path / "undisturbed")
    committed = disk.place("rename", ".writing_epoch_0000_step_00000003", "epoch_0000_step_00000003")
    count = len(disk.calls)
    assert count > 30
    for at in range(0, count, every):
        folder = tmp_path / f"{fault}-{at}"
        writer = two_saves(folder)
        if fault == "kill":
            child = os.fork()
            if child == 0:
                try:
                    Disk(pytest.MonkeyPatch(), at, fault)
                    save(CheckpointWriter(folder, writer.policy), 3)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, at
        else:
            with pytest.MonkeyPatch.context() as monkeypatch:
                Disk(monkeypatch, at, fault)
                save(writer, 3)
            assert writer.failure is None or "cannot be written" in writer.failure
            assert writer.failure is not None if at <= committed else True
        assert_usable(folder, 3 if at > committed else 2)
        if fault == "kill":
            writer = CheckpointWriter(folder, writer.policy)
            writer.prepare()
        assert_goes_on(folder, writer, 4)
    return len(range(0, count, every))


@pytest.mark.parametrize("fault", ["kill", "full once", "full", "broken once"])
def test_at_every_call_of_a_save_a_fault_leaves_a_valid_newest_checkpoint(tmp_path, fault):
    assert faults(tmp_path, fault, 1) > 30


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_a_disk_that_takes_less_than_asked_for_gets_the_rest_later(tmp_path, monkeypatch, length):
    writer = two_saves(tmp_path)
    Disk(monkeypatch, largest_write=length)
    save(writer, 3)
    assert writer.failure is None
    assert_usable(tmp_path, 3)


def test_leftovers_are_swept_up_and_a_link_among_them_loses_only_itself(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    two_saves(folder)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    for name in (".writing_epoch_1", ".deleted_epoch_1"):
        (folder / name / "inside").mkdir(parents=True)
        (folder / name / "inside" / STATE).touch()
        (folder / name / "link").symlink_to(elsewhere)
        (folder / f"{name}_link").symlink_to(elsewhere)
        (folder / f"{name}_broken").symlink_to(tmp_path / "nowhere")
        (folder / f"{name}_file").touch()
    (folder / f".{INDEX}.123-456.tmp").write_text("{")
    CheckpointWriter(folder, RetentionPolicy()).prepare()
    assert sorted(name[:6] for name in os.listdir(folder)) == ["epoch_", "epoch_", INDEX[:6]]
    assert (elsewhere / "precious").read_text() == "kept"


# A whole run on a disk that fills up


def train(folder, begin, end, iterations=8):
    """A run that saves at every step, with ``begin`` and ``end`` called before iteration 4 and 7; its parts."""
    trainer, _ = linear_trainer()
    checkpointer = Checkpointer(folder, RetentionPolicy(), metric="train/loss", every_epochs=None, every_steps=1)
    checkpointer.attach(trainer)
    for iteration, action in ((4, begin), (7, end)):

        def act(engine, action=action):
            checkpointer.wait(engine)
            action()

        trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), act)
    trainer.run(rows(*[[0.5 * number, 1.0] for number in range(iterations)]), max_epochs=1)
    return trainer, checkpointer


@pytest.fixture
def small_files():
    """Two functions: let no file grow beyond 4 kB from now on, and let them grow again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1])),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_goes_on_without_room_says_so_once_and_saves_again_when_there_is(tmp_path, caplog, small_files):
    trainer, checkpointer = train(tmp_path / "run", *small_files)
    undisturbed, _ = train(tmp_path / "undisturbed", lambda: None, lambda: None)
    assert same_bits(weights_of(trainer.modules), weights_of(undisturbed.modules))
    messages = [record.getMessage() for record in caplog.records if "written" in record.getMessage()]
    assert len(messages) == 2
    assert "step_00000004 cannot be written: File too large; training goes on" in messages[0]
    assert "can be written again" in messages[1] and "step_00000007" in messages[1]
    assert load_newest(tmp_path / "run")[0].record.iteration == 8
    assert not list((tmp_path / "run").glob(".*"))
    checkpointer.close()


def test_a_run_whose_last_save_failed_ends_with_an_error_and_keeps_the_old_ones(tmp_path, caplog, small_files):
    begin, end = small_files
    trainer, checkpointer = train(tmp_path, begin, lambda: None)
    end()
    assert trainer.state.iteration == 8
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(
        CheckpointError, match=r"the last checkpoint .*step_00000008 cannot be written: File too"
    ) as raised:
        checkpointer.close()
    assert raised.value.exit_code == 4 and "step_00000003" in str(raised.value)
    assert [checkpoint.record.iteration for checkpoint in list_checkpoints(tmp_path)] == [3, 2]
    again, _ = linear_trainer()
    assert resume(again, tmp_path)[0].record.iteration == 3
    assert same_bits(weights_of(again.modules), weights_of(train(tmp_path / "3", print, print, 3)[0].modules))


def test_a_full_file_system_is_survived_and_its_size_named(tmp_path):
    """A disk of 96 kB, in a name space of its own where the machine allows that."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = on_a_small_disk(tmp_path)
        except BaseException as error:
            answer = {"error": repr(error)}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.loads(pipe.read() or "null")
    os.waitpid(child, 0)
    if answer is None:
        pytest.skip("no mounting here")
    assert answer == {"iteration": 8, "newest": 8, "failed_meanwhile": True, "failure": None, "stray": []}


def on_a_small_disk(folder):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        return None
    subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    filler, failures = folder / "filler", []

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free():
        failures.append(checkpointers[0].writer.failure)
        filler.unlink()

    checkpointers = []
    real_attach = Checkpointer.attach

    def attach(self, engine):
        checkpointers.append(self)
        real_attach(self, engine)

    Checkpointer.attach = attach
    trainer, checkpointer = train(folder / "checkpoints", fill, free)
    checkpointer.close()
    return {
        "iteration": trainer.state.iteration,
        "newest": load_newest(folder / "checkpoints")[0].record.iteration,
        "failed_meanwhile": "No space left" in failures[0] and "MB are free" in failures[0],
        "failure": checkpointer.writer.failure,
        "stray": [str(path) for path in (folder / "checkpoints").glob(".*")],
    }
