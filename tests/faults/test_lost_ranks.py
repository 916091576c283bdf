"""One process of several fails, is killed, hangs or is asked to stop: the cause, its rank and its exit code are kept."""

import json
import os
import signal
import subprocess
import sys
import time

import ignite.distributed as idist
import pytest
from helpers import NOISE, ROOT, mostly_slow, options
from ignite.engine import Events
from processes import Commands

from hjepa_engine.errors import DataError
from hjepa_engine.recipes import pretrain
from hjepa_engine.run import agreement


def arguments(folder, **changes):
    named = {key.replace("__", "."): value for key, value in changes.items()}
    values = {"probe.enabled": "false", "collapse.enabled": "false", "checkpoint.save_every_steps": 1, **named}
    return options({**NOISE, "run_dir": folder / "run", **values})


def status(folder):
    return json.loads((folder / "run" / "status.json").read_text())


class OnOneRank:
    """Does something on rank 1 (or another) in iteration 7 (of 10)."""

    def __init__(self, action, rank=1, iteration=7):
        self.action, self.rank, self.iteration = action, rank, iteration

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self.act)

    def act(self, engine):
        if idist.get_rank() == self.rank:
            engine.add_event_handler(Events.ITERATION_STARTED, lambda: None)
            self.action()


def run_with(folder, action, rank=1, number=2, timeout=60.0, **changes):
    handler = OnOneRank(action, rank)
    commands = Commands(
        number, folder, lambda argv: pretrain.main(argv, handlers=[handler]), lambda _: arguments(folder, **changes)
    )
    return commands, commands.wait(timeout)


def fail():
    raise DataError("the shelf is empty")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", mostly_slow([0, 1], (1,)))
def test_the_cause_of_one_rank_is_what_the_run_ended_with(tmp_path, rank):
    commands, codes = run_with(tmp_path, fail, rank)
    assert codes == [3, 3], commands.said(0) + commands.said(1)
    found = status(tmp_path)
    assert found["state"] == "stopped" and found["exit_code"] == 3 and found["reason"].endswith("the shelf is empty")
    assert found["checkpoint"].endswith("step_00000006")
    assert commands.said(rank).splitlines()[-1] == "the shelf is empty"
    assert commands.said(1 - rank).splitlines()[-1] == f"another process ended: rank {rank}: the shelf is empty"


@pytest.mark.parametrize("rank", mostly_slow([0, 1], (1,)))
def test_a_killed_rank_is_named_and_the_run_is_to_be_queued_again(tmp_path, rank):
    commands, codes = run_with(tmp_path, kill, rank)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 75
    found = status(tmp_path)
    assert found["state"] == "preempted" and found["exit_code"] == 75
    assert found["reason"].startswith(f"lost contact with rank {rank} (killed, hanging, or its machine is gone: ")
    kept = int(found["checkpoint"][-1])
    assert kept in ((4, 5, 6) if rank == 0 else (6,))  # rank 0 may have been writing
    commands = Commands(2, tmp_path, pretrain.main, lambda _: arguments(tmp_path))
    assert commands.wait() == [0, 0], commands.said(0)
    assert "resumed step " in commands.said(0) and status(tmp_path)["state"] == "done"


def test_a_rank_that_is_asked_to_stop_in_the_final_probe_preempts_the_run(tmp_path):
    def main(argv):
        from hjepa_engine.recipes.common import run

        def probe(*args):
            time.sleep(0.5)
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        run.evaluate_encoders = probe
        pretrain.main(argv)

    commands = Commands(2, tmp_path, main, lambda _: arguments(tmp_path, probe__enabled="true"))
    assert commands.wait() == [75, 75]
    found = status(tmp_path)
    assert (found["state"], found["exit_code"]) == ("preempted", 75)
    assert "SIGTERM outside of training" in found["reason"] and found["checkpoint"].endswith("step_00000010")


@pytest.mark.slow
def test_a_hanging_rank_is_named_after_the_timeout(tmp_path):
    commands, codes = run_with(tmp_path, lambda: time.sleep(40), timeout=25, distributed__timeout=0.1)
    assert codes[0] == 75, commands.said(0)
    assert status(tmp_path)["reason"].startswith("lost contact with rank 1 (killed, hanging, ")


def test_different_configurations_are_refused_with_key_values_and_rank(tmp_path):
    given = {0: {"data__num_workers": 0}, 1: {"data__num_workers": 1, "training__lr": 0.5, "training__epochs": 3}}
    commands = Commands(2, tmp_path, pretrain.main, lambda rank: arguments(tmp_path, **given[rank]))
    assert commands.wait() == [2, 2]
    line = "all processes must have one configuration, but training.epochs is 2 on rank 0 and 3 on rank 1"
    assert [commands.said(rank).splitlines()[-1] for rank in (0, 1)] == [line] * 2
    assert not (tmp_path / "run").exists()


def test_folders_of_single_machines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_PATIENCE", 0.1)
    (tmp_path / "own").mkdir()

    def main(argv):
        (tmp_path / os.environ["RANK"]).mkdir()
        os.chdir(tmp_path / os.environ["RANK"])  # one path, a folder for each, as with disks of two machines
        pretrain.main([*argv, "--run_dir", "mine"])

    commands = Commands(2, tmp_path, main, lambda _: arguments(tmp_path))
    assert commands.wait() == [2, 2]
    line = "run_dir mine must be a folder that all processes share; what rank 0 wrote there is not seen by rank 1 on "
    assert all(commands.said(rank).splitlines()[-1].startswith(line) for rank in (0, 1))
    assert [path.name for path in (tmp_path / "0" / "mine").rglob("*") if path.is_file()] in ([".lock"], [".lock"] * 2)


KILLER = """
import os, signal
import ignite.distributed as idist
from ignite.engine import Events

class Killer:
    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=7), self.kill)

    def kill(self, engine):
        if idist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_torchrun_starts_killed_processes_again_and_the_run_goes_on(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    command = [
        *launch,
        str(ROOT / "recipes" / "pretrain.py"),
        *arguments(tmp_path, handlers="[{class_path: killer.Killer}]"),
    ]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run(
        [sys.executable, *command], env=paths, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed step 6" in done.stdout and "lost contact with rank 1" in done.stderr
    assert "FutureWarning" not in done.stderr and "terminate called" not in done.stderr
    assert status(tmp_path)["state"] == "done"


@pytest.mark.slow
def test_finished_processes_leave_with_0(tmp_path):
    for number in range(5):
        folder = tmp_path / str(number)
        changes = {"training__max_iters": 1, "data__batch_size": 8}
        commands = Commands(4, folder, pretrain.main, lambda _, f=folder, c=changes: arguments(f, **c))
        assert commands.wait() == [0] * 4
        assert not any("terminate called" in commands.said(rank) for rank in range(4))
        assert "run folder: " in commands.said(0)  # nothing that was printed is lost


@pytest.mark.slow
def test_a_failure_before_training_is_told_too(tmp_path):
    def main(argv):
        if os.environ["RANK"] == "1":
            argv = [*argv, "--data.fake_size", "4"]
        pretrain.main(argv)

    commands = Commands(2, tmp_path, main, lambda _: arguments(tmp_path))
    assert commands.wait() != [0, 0]
    assert "Connection" not in commands.said(0).splitlines()[-1]
