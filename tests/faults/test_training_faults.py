"""What goes wrong in training, and what a run makes of it: every fault on the real thing."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import NOISE, ROOT, logged, options, same_state, weights_of
from ignite.engine import Events
from PIL import Image

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.checkpoint.folder import list_checkpoints, load_newest
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.storage import read_state
from hjepa_engine.errors import Preempted
from hjepa_engine.loggers import jsonl
from hjepa_engine.recipes import pretrain
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.run.cli import run_command
from hjepa_engine.utils import files

ME = __name__
RUN = {**NOISE, "probe.enabled": "false", "logging.log_frequency": 1, "run_dir": "run"}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("seed: 0\n")  # all else is in RUN


def configured(**changes):
    return load_config(None, options({**RUN, **{key.replace("__", "."): value for key, value in changes.items()}}))


def own(name, **arguments):
    """The value of ``handlers`` that attaches one of this file's own."""
    words = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"[{{class_path: {ME}.{name}, init_args: {{{words}}}}}]"


@pytest.fixture
def command(capsys):
    """Run the recipe's command in this process: exit code, standard output, standard error."""

    def run(**changes):
        values = {**RUN, **{key.replace("__", "."): value for key, value in changes.items()}}
        with pytest.raises(SystemExit) as stop:
            run_command(pretrain.main, ["--config", "empty.yaml", *options(values)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def status(folder="run"):
    return json.loads((Path(folder) / "status.json").read_text())


def records(folder="run"):
    return logged(Path(folder))


def ending_of(folder="run"):
    """Modules, optimizer (with scaler and counts), guard and records of a run that has ended."""
    checkpoint, state = load_newest(Path(folder) / "checkpoints")
    handlers = {name: state["handlers"][name] for name in ("OptimizerStep", "NonFiniteGuard")}
    parts = {name: state[name] for name in ("modules", "ranks")}
    return {"iteration": checkpoint.record.iteration, "records": records(folder), **handlers, **parts}


def stopped(run, iteration):
    """Ask the run to end after an iteration, which it does, saved."""
    ask = partial(run.preemption.request, "a wish")
    run.trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED(once=iteration), ask)
    with pytest.raises(Preempted, match="a wish at step"):
        run.fit()
    assert status()["state"] == "preempted"
    return load_newest(Path("run/checkpoints"))[0]


def all_finite(state):
    return all(tensor.isfinite().all() for tensor in flatten(state)[1].values() if tensor.is_floating_point())


class Poison:
    """Puts NaN into the images of some iterations: for good, or until there is a file ``cured``."""

    def __init__(self, at, curable=False):
        self.at, self.curable = at, curable

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.FORWARD_STARTED, self.poison)

    def poison(self, engine):
        if engine.state.iteration in self.at and not (self.curable and Path("cured").exists()):
            engine.state.batch["images"][0].fill_(float("nan"))


# --- Numbers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 8])
def test_a_loss_that_is_no_number_leaves_a_good_checkpoint_and_the_same_command_goes_on(command, at):
    changes = {"handlers": own("Poison", at=[at], curable="true"), "checkpoint__save_every_steps": 3}
    code, _, err = command(**changes)
    assert code == 5
    reason = err.splitlines()[-1]
    assert reason.startswith(f"non-finite loss at optimizer step {at - 1}; the weights are those of the last good step")
    assert (status()["state"], status()["exit_code"], status()["reason"]) == ("stopped", 5, reason)
    for checkpoint in list_checkpoints(Path("run/checkpoints")):
        assert checkpoint.record.iteration < at
        assert all_finite(read_state(checkpoint))
    newest = load_newest(Path("run/checkpoints"))[0].record
    assert newest.iteration == {4: 3, 8: 6}[at]
    code, out, _ = command(**changes)  # nothing has changed, and nothing gets worse
    assert code == 5
    assert f"resumed step {newest.step} " in out
    Path("cured").touch()
    assert command(**changes)[0] == 0
    assert command(run_dir="plain", checkpoint__save_every_steps=3)[0] == 0
    assert same_state(ending_of(), ending_of("plain"))


SKIPPING = {"training__non_finite": "skip", "checkpoint__save_every_steps": 1, "checkpoint__keep_last_n": 20}


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 8, 10])
def test_a_run_that_drops_updates_resumes_exactly_around_them(stop, caplog):
    """Iterations 3, 4 and 8 are dropped, and stopped after: saves at one optimizer step have names of their own."""
    changes = {**SKIPPING, "handlers": own("Poison", at=[3, 4, 8, 10])}
    build(configured(**changes, run_dir="whole")).fit()
    whole = ending_of("whole")
    assert (whole["iteration"], whole["OptimizerStep"]["skipped_updates"]) == (10, 4)
    assert all_finite(whole["modules"]) and all_finite(whole["OptimizerStep"])
    newest = stopped(build(configured(**changes)), stop)
    assert newest.record.step == stop - sum(at <= stop for at in (3, 4, 8, 10))
    assert newest.record.iteration == stop
    assert str(newest.path) == status()["checkpoint"]
    second = build(configured(**changes))
    seen = []
    second.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: seen.append(second.trainer.state.iteration))
    second.fit()
    assert seen == list(range(stop + 1, 11))
    assert same_state(ending_of(), whole)
    assert warnings_of(caplog) == []


FP16 = {"training__use_amp": "true", "training__amp_dtype": "float16", "checkpoint__save_every_steps": 1}


def overflowing(**changes):
    """A run in fp16 whose scaler begins far too high, and what it holds before its first step."""
    run = build(configured(**FP16, **changes))
    step = run.trainer.stateful_handlers()["OptimizerStep"]
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return run, step


def test_an_update_that_overflows_moves_nothing_and_is_saved_and_resumed():
    whole, step = overflowing(run_dir="whole")
    before, seen = weights_of(whole.modules), []

    def look(engine):
        moved = any(not torch.equal(before[name], tensor) for name, tensor in engine.modules.state_dict().items())
        seen.append((engine.state.optimizer_step, moved, len(step.optimizer.state) > 0, step.scaler.get_scale()))

    whole.trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, look)
    whole.fit()
    skipped = sum(number == 0 for number, _, _, _ in seen)
    assert 1 <= skipped <= 8
    # The first step has a learning rate of 0: only Adam's moments show that there was one.
    assert seen[:skipped] == [(0, False, False, 2.0 ** (19 - place)) for place in range(skipped)]
    assert all(moments for _, _, moments, _ in seen[skipped:])
    assert ending_of("whole")["OptimizerStep"]["skipped_updates"] >= skipped
    for stop in (1, skipped, skipped + 1, 9):
        shutil.rmtree("run", ignore_errors=True)
        stopped(overflowing()[0], stop)
        second, restored = overflowing()
        scales = []
        look = partial(lambda scales, scaler: scales.append(scaler.get_scale()), scales, restored.scaler)
        second.trainer.add_event_handler(Events.STARTED, look)
        second.fit()
        assert scales == [seen[stop - 1][3]]
        assert same_state(ending_of(), ending_of("whole")), stop


# --- Data ---------------------------------------------------------------------------------------------------------------


def images(folder, number, damaged=()):
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "val" / "cat").mkdir(parents=True)
    for split, count in (("train", number), ("val", 8)):
        for image in range(count):
            Image.new("RGB", (24, 24), (image, 9, 9)).save(folder / split / "cat" / f"{image:03d}.png")
    for image in damaged:
        path = folder / "train" / "cat" / f"{image:03d}.png"
        path.write_bytes(path.read_bytes()[:40])


FOLDER = {"data__dataset": "imagefolder", "data__data_path": "images"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: None, "does not exist"),
        (lambda: Path("images").mkdir(), "holds no images"),
        (lambda: Path("images/train/cat").mkdir(parents=True), "images holds no images"),
        (
            lambda: images(Path("images"), 7),
            "the train split has 7 images, data.batch_size must be at most that, got 8",
        ),
        (lambda: Path("images").write_text("no folder"), "images"),
    ],
)
def test_too_little_data_is_one_line_before_the_model_is_built(command, monkeypatch, make, says):
    def refuse(config):
        raise AssertionError("the model is built")

    make()
    monkeypatch.setattr("hjepa_engine.build.build_modules", refuse)
    code, out, err = command(**FOLDER)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert says in err
    assert not Path("run").exists()


def test_damaged_images_within_bounds_are_counted_through_a_resume_and_beyond_them_end_the_run(command, caplog):
    images(Path("images"), 64, damaged=[5, 40])
    assert command(**FOLDER, run_dir="whole", data__max_damaged=0.1)[0] == 0
    whole = ending_of("whole")
    assert len(whole["ranks"][0]["handlers"]["DamagedImages"]["damaged"]) == 2
    named = [line for line in warnings_of(caplog) if "unreadable training image" in line]
    assert len(named) == 2 and all(sum(f"{image:03d}.png" in line for line in named) == 1 for image in (5, 40))
    for stop in (3, 8, 11):
        shutil.rmtree("run", ignore_errors=True)
        stopped(build(configured(**FOLDER, data__max_damaged=0.1)), stop)
        build(configured(**FOLDER, data__max_damaged=0.1)).fit()
        assert same_state(ending_of(), whole), stop
    # Those before the stop count too.
    shutil.rmtree("run")
    stopped(build(configured(**FOLDER, data__max_damaged=0.1)), 9)
    code, _, err = command(**FOLDER, data__max_damaged=0.01)
    assert code == 3
    assert re.match(
        r"2 of 64 training images could not be read, more than data.max_damaged 0.01 allows; one of them: ",
        err.splitlines()[-1],
    )
    # The bound may change, and the run goes on.
    code, out, _ = command(**FOLDER, data__max_damaged=0.1)
    assert code == 0 and "resumed" in out
    assert same_state(ending_of(), whole)


class KillWorker:
    """Kills a loader process in mid-run, until there is a file ``cured``."""

    def __init__(self, cured):
        self.cured = Path(cured)

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), self.kill)

    def kill(self, engine):
        if not self.cured.exists():
            worker = engine.state.dataloader.processes._iterator._workers[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()


def test_a_loader_process_that_is_killed_ends_the_run_in_words_and_the_same_command_goes_on(tmp_path, server, command):
    changes = {"checkpoint__save_every_steps": 3, "training__epochs": 3}
    values = {key.replace("__", "."): value for key, value in changes.items()} | {"data.num_workers": 2}
    handlers = own("KillWorker", cured=tmp_path / "cured")
    words = ["--config", str(tmp_path / "empty.yaml")]
    words += options({**RUN, **values, "run_dir": tmp_path / "run", "handlers": handlers})
    child = server.start(words, tmp_path / "stderr")
    assert child.wait() == 3, child.said
    assert "DataLoader worker" in child.last_line and "run the same command again" in child.last_line
    assert "Traceback" not in child.said
    assert server.orphans(10) == []
    Path("cured").touch()
    child = server.start(words, tmp_path / "stderr")
    assert child.wait() == 0
    # What the loader had read ahead was still trained on.
    assert int(re.search(r"resumed step (\d+) ", child.printed)[1]) >= 6
    assert command(run_dir="plain", **changes)[0] == 0
    assert same_state(ending_of(), ending_of("plain"))


# --- Disks --------------------------------------------------------------------------------------------------------------


class FullDisk:
    """``os`` with a disk that takes no more bytes while ``is_full``."""

    def __init__(self):
        self.is_full = False

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, descriptor, data):
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)


@pytest.mark.parametrize(("until", "code"), [(7, 0), (99, 4)])
@pytest.mark.parametrize("log_too", [False, True])
def test_a_full_disk_is_named_once_and_ends_a_run_only_if_it_stays_full(
    monkeypatch, command, caplog, until, code, log_too
):
    disk = FullDisk()
    monkeypatch.setattr(files, "os", disk)
    if log_too:
        monkeypatch.setattr(jsonl, "os", disk)
    command(run_dir="plain", checkpoint__save_every_steps=1)

    class Fill:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.fill)

        def fill(self, engine):
            disk.is_full = 3 <= engine.state.iteration < until

    monkeypatch.setattr(sys.modules[ME], "Fill", Fill, raising=False)
    end, _, err = command(checkpoint__save_every_steps=1, handlers=f"[{{class_path: {ME}.Fill}}]")
    disk.is_full = False
    said = warnings_of(caplog)
    saving = [line for line in said if line.startswith("checkpoint ") and "cannot be written" in line]
    assert end == code
    assert len(saving) == 1 and "No space left on device (it needs " in saving[0]
    assert saving[0].endswith("training goes on, the next save tries again")
    assert sum("metrics.jsonl cannot be written" in line for line in said) == log_too
    if code == 0:
        assert any(line.startswith("checkpoints can be written again") for line in said)
        assert same_state(ending_of(), ending_of("plain"))
    else:
        assert "cannot be written: No space left on device" in err.splitlines()[-1]
        assert re.search("the newest one is run/checkpoints/epoch_0000_step_0000000[12]$", err.splitlines()[-1])
        if not log_too:
            assert records() == records("plain")
        assert command(checkpoint__save_every_steps=1, handlers="[]")[0] == 0
        assert same_state(ending_of() | {"records": 0}, ending_of("plain") | {"records": 0})
    assert [path.name for path in Path("run/checkpoints").iterdir() if path.name.startswith(".writing")] == []


@pytest.mark.parametrize("key", ["checkpoint.checkpoint_dir", "run_dir"])
def test_a_folder_that_cannot_be_written_to_is_found_out_before_the_first_step(command, key):
    Path("taken").write_text("a file, not a folder")
    changes = {key.replace(".", "__"): "taken", "handlers": own("Poison", at=[1])}  # a first step would be exit code 5
    code, _, err = command(**changes)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"{key} ") and "taken" in err.splitlines()[-1]
    assert Path("taken").read_text() == "a file, not a folder"


class MakeRoom:
    """Removes what fills the small disk."""

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=8), lambda: Path("small/filler").unlink())


@pytest.mark.slow
@pytest.mark.parametrize("room", [False, True])
def test_a_disk_that_is_really_full(tmp_path, room):
    handlers = f"[{{class_path: {ME}.MakeRoom}}]" if room else "[]"
    values = {"checkpoint.checkpoint_dir": "small", "checkpoint.save_every_steps": 1, "handlers": handlers}
    words = " ".join(f"'{word}'" for word in options({**RUN, **values}))
    lines = f"""mkdir small && mount -t tmpfs -o size=1m none small && head -c 900000 /dev/zero > small/filler
        {sys.executable} {ROOT / "recipes" / "pretrain.py"} {words}; code=$?; ls -A small; exit $code"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    alone = ["unshare", "-rm"]  # with mounts of its own
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run([*alone, "sh", "-c", lines], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == (0 if room else 4), done.stderr
    assert done.stderr.count("cannot be written: No space left on device (it needs ") == (1 if room else 2)
    assert ".writing_" not in done.stdout
    assert [record["step"] for record in records() if "train/loss" in record] == list(range(1, 11))
    assert status()["exit_code"] == done.returncode
