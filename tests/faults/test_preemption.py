"""Runs that are asked to stop: they end at once, saved at the very step, and the same command completes them."""

import json
import os
import random
import signal
import threading
import time
from itertools import count, product
from pathlib import Path

import pytest
from forkserver import PRETRAIN, poll_until
from helpers import tiny_config
from ignite.engine import Events
from witness import checkpoints_of, command, is_same, outcome, strays_in, witnessed

from hjepa_engine.errors import Preempted
from hjepa_engine.handlers import preemption
from hjepa_engine.recipes import pretrain
from hjepa_engine.recipes.common import build as build_recipe
from hjepa_engine.recipes.common import run as run_recipe

ITERATIONS = 15
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What a run without interruption leaves, and how long it trains."""
    run = tmp_path_factory.mktemp("whole") / "run"
    child = server.start(command(run), run.with_suffix(".err"))
    child.until(lambda: witnessed(run, "began"))
    began = time.monotonic()
    assert child.wait() == 0, child.said
    return outcome(run), time.monotonic() - began


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def trained(run: Path) -> int:
    """The iteration that was last completed."""
    return max((record["iteration"] for record in witnessed(run, "trained")), default=0)


def start(server, run: Path, body: str = PRETRAIN, **changes):
    """Start the command, and wait until it trains, or has ended because there is nothing to train."""
    earlier = len(witnessed(run, "began"))
    child = server.start(command(run, **changes), run.with_suffix(".err"), body)
    poll_until(lambda: len(witnessed(run, "began")) > earlier or child.poll() is not None, 60)
    return child


def complete(server, run: Path, wanted, **changes) -> None:
    """The same command completes the run, with the same bits."""
    child = server.start(command(run, **changes), run.with_suffix(".err"))
    assert child.wait() == 0, child.said
    state, tensors, log = outcome(run)
    assert is_same((state, tensors, [line for line in log if "probe/linear" not in line]), wanted[0])
    assert strays_in(run) == []


def assert_saved_at_the_interrupted_step(run: Path, child, name: str) -> None:
    found, problems = checkpoints_of(run)
    status = status_of(run)
    assert not problems
    assert "interrupted" in found[0].reasons
    assert found[0].record.iteration == trained(run)  # nothing is lost
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, found[0].record.step)
    assert status["checkpoint"] == str(found[0].path)
    where = f"at step {found[0].record.step}: saved {found[0].path}"
    assert child.last_line == f"{name} {where}; run the same command again to go on" == status["reason"]


def interrupt_at_random(server, folder: Path, wanted, number: int, seed: int) -> dict[int, list[float]]:
    """Send signals until there have been so many; the seconds from each to the end of the process, by loader processes."""
    rng, seconds, runs = random.Random(seed), {0: [], 2: []}, 0
    kinds = list(product((0, 2), (TERM, USR1, INT), (os.kill, os.killpg)))
    rng.shuffle(kinds)
    while (heard := len(seconds[0]) + len(seconds[2])) < number:
        run, code, runs = folder / f"run_{runs}", 75, runs + 1
        while code == 75 and heard < number:
            workers, name, send = kinds[heard % len(kinds)]
            child = start(server, run, data__num_workers=workers)
            if (code := child.poll(rng.uniform(0, wanted[1]))) is not None:
                break
            before = time.monotonic()
            send(child.pid, name)
            code = child.wait(20)
            if f"{name.name} at step" in child.said:
                assert code == 75, child.said
                assert_saved_at_the_interrupted_step(run, child, name.name)
                seconds[workers].append(time.monotonic() - before)
                heard += 1
            else:  # it came when all was trained and saved
                assert trained(run) == ITERATIONS and code in (0, 75, 130, -INT), (code, child.said)
        complete(server, run, wanted)
    assert server.orphans(10) == []
    return seconds


def test_a_signal_at_any_instant_costs_no_step_and_no_bit(server, tmp_path, whole):
    interrupt_at_random(server, tmp_path, whole, 9, seed=0)


@pytest.mark.slow
def test_none_of_100_signals_costs_a_step_or_a_bit(server, tmp_path, whole):
    seconds = interrupt_at_random(server, tmp_path, whole, 100, seed=1)
    for workers, taken in seconds.items():
        ordered = sorted(taken)
        print(
            f"\n{workers} workers: {len(taken)} exits, median {ordered[len(taken) // 2]:.2f} s, longest {ordered[-1]:.2f} s"
        )
        assert ordered[-1] < 5


def signal_itself(argv: list[str]) -> None:
    """A child's body: a run that gets the signal ``argv[1]`` as it enters ``argv[0]``, a name of the recipe."""
    place, name, *argv = argv
    recipe = next(module for module in (pretrain, run_recipe, build_recipe) if hasattr(module, place))
    original = getattr(recipe, place)

    def hit(*_):
        os.kill(os.getpid(), int(name))

    def entered(*args, **kwargs):
        if place == "create_evaluator":
            evaluator = original(*args, **kwargs)
            batches = count(1)  # the seventh is the second one of the second validation
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: hit() if next(batches) == 7 else None)
            return evaluator
        hit()
        return original(*args, **kwargs)

    if place == "EncoderExport":
        write = original.write
        original.write = lambda self: (hit(), write(self))  # the first thing that follows the last save point
    else:
        setattr(recipe, place, entered)
    pretrain.main(argv)


HIT = f"{__name__}:signal_itself"


def hit(server, run: Path, place: str, name: signal.Signals, **changes):
    child = server.start([place, str(int(name)), *command(run, **changes)], run.with_suffix(".err"), HIT)
    child.wait()
    return child


def test_a_signal_during_validation_saves_the_epoch_before_it(server, tmp_path, whole):
    run = tmp_path / "run"
    child = hit(server, run, "create_evaluator", TERM)
    assert_saved_at_the_interrupted_step(run, child, "SIGTERM")
    newest = checkpoints_of(run)[0][0]
    assert (newest.record.iteration, newest.record.ends_epoch) == (10, False)
    assert [record["iteration"] for record in witnessed(run, "validated")] == [5]
    complete(server, run, whole)
    assert [record["iteration"] for record in witnessed(run, "validated")] == [5, 10, 15]


def test_a_signal_while_the_encoder_is_exported_is_not_forgotten(server, tmp_path, whole):
    run = tmp_path / "run"
    child = hit(server, run, "EncoderExport", TERM, probe__enabled="true")
    assert_saved_at_the_interrupted_step(run, child, "SIGTERM")
    complete(server, run, whole)
    assert (run / "encoder" / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["read_config", "build", "start_run", "evaluate_encoders"])
def test_a_signal_before_and_after_training_loses_nothing(server, tmp_path, whole, place):
    run = tmp_path / "run"
    child = start(server, run)
    child.until(lambda: trained(run) >= 6)
    os.kill(child.pid, USR1)
    assert child.wait() == 75
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.safetensors")}
    probe = {"probe__enabled": str(place == "evaluate_encoders").lower(), "probe__epochs": 1}
    for name, code in ((TERM, 75), (USR1, 75), (INT, 130)):
        child = hit(server, run, place, name, **probe)
        reason = f"{name.name} outside of training: run the same command again to go on"
        assert (child.code, child.last_line) == (code, "interrupted" if name == INT else reason)
        if place == "evaluate_encoders":
            assert (checkpoints_of(run)[0][0].record.iteration, status_of(run)["exit_code"]) == (ITERATIONS, code)
        else:
            assert before == {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.safetensors")}
    complete(server, run, whole, **probe)
    assert len(status_of(run)["results"]) == (3 if place == "evaluate_encoders" else 0)


def slow_disk(argv: list[str]) -> None:
    """A child's body: a run whose checkpoints take half a minute to reach the disk once ``argv[0]`` exists."""
    slow, sync = Path(argv[0]), os.fsync

    def fsync(descriptor: int) -> None:
        if slow.exists() and threading.current_thread() is not threading.main_thread():
            slow.with_suffix(".reached").touch()
            time.sleep(30)
        sync(descriptor)

    os.fsync = fsync
    pretrain.main(argv[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_ctrl_c_leaves_at_once_and_the_former_checkpoint_is_valid(server, tmp_path, whole, workers):
    run, slow = tmp_path / "run", tmp_path / "slow"
    arguments = command(run, data__num_workers=workers)
    child = server.start([str(slow), *arguments], run.with_suffix(".err"), f"{__name__}:slow_disk")
    child.until(lambda: trained(run) >= 6)
    former = child.until(lambda: checkpoints_of(run)[0])[0].record.iteration
    slow.touch()
    os.killpg(child.pid, INT)  # as a terminal does
    child.until(lambda: "SIGINT: finishing the step, then saving (again: leave at once)" in child.said)
    child.until(slow.with_suffix(".reached").exists)
    before = time.monotonic()
    os.killpg(child.pid, INT)
    assert child.wait() == 130
    taken = time.monotonic() - before
    print(f"\n{workers} workers: out {taken:.2f} s after the second Ctrl-C")
    assert taken < 8  # of a write of at least 30
    assert (child.last_line, status_of(run)["exit_code"]) == ("interrupted", 130)
    found, problems = checkpoints_of(run)
    assert found[0].record.iteration >= former and not problems
    assert server.orphans(10) == []
    complete(server, run, whole, data__num_workers=workers)


def test_a_supervisor_that_repeats_the_command_while_it_exits_with_75_completes_the_run(server, tmp_path, whole):
    run, codes = tmp_path / "run", []
    arguments = command(run, pause=0.2, training__time_limit=0.03)
    while not codes or codes[-1] == 75:
        child = server.start(arguments, run.with_suffix(".err"))
        codes.append(child.wait())
        if codes[-1] == 75:
            assert child.last_line.startswith("time limit of 0.03 minutes at step ")
            assert trained(run) == checkpoints_of(run)[0][0].record.iteration
            assert len(codes) < 30
    assert codes[-1] == 0 and len(codes) > 1
    assert is_same(outcome(run), whole[0])


def test_signals_are_given_back_after_a_run_and_after_an_interrupted_one(tmp_path):
    former = {name: signal.getsignal(name) for name in preemption.SIGNALS}
    config = tiny_config(run_dir=tmp_path, probe__enabled="false", checkpoint__save_frequency=1)
    run = pretrain.build(config)
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: os.kill(os.getpid(), TERM))
    with pytest.raises(Preempted, match=r"^SIGTERM at step 3: saved .*epoch_0000_step_00000003; run the same command"):
        run.fit()
    assert {name: signal.getsignal(name) for name in preemption.SIGNALS} == former
    pretrain.build(config).fit()
    assert {name: signal.getsignal(name) for name in preemption.SIGNALS} == former


def test_loader_processes_ignore_signals_that_are_not_their_parents(server, tmp_path, whole):
    run = tmp_path / "run"
    child = start(server, run, data__num_workers=2)
    child.until(lambda: trained(run) >= 1)
    loaders = child.family
    assert len(loaders) == 2
    for name in (INT, USR1, TERM):
        for pid in loaders:
            os.kill(pid, name)
    assert child.wait() == 0, child.said
    assert is_same(outcome(run), whole[0])
    assert "Traceback" not in child.said and server.orphans(10) == []


@pytest.mark.parametrize("when", [1, 6])
def test_a_killed_loader_process_ends_the_run_with_the_cause_and_the_same_command_completes_it(
    server, tmp_path, whole, when
):
    run = tmp_path / "run"
    child = start(server, run, data__num_workers=2, pause=0.1)  # on a busy machine it would be over before the kill
    child.until(lambda: trained(run) >= when)
    os.kill(child.family[0], signal.SIGKILL)
    assert child.wait(10) == 3, child.said
    assert "worker" in child.last_line and child.last_line.endswith("run the same command again to resume")
    assert (status_of(run)["exit_code"], status_of(run)["reason"]) == (3, child.last_line)
    assert checkpoints_of(run)[1] == []
    assert server.orphans(10) == []
    complete(server, run, whole, data__num_workers=2)


def test_loader_processes_vanish_when_the_main_process_is_killed(server, tmp_path):
    run = tmp_path / "run"
    child = start(server, run, data__num_workers=2)
    child.until(lambda: trained(run) >= 1)
    assert len(child.family) >= 2
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert server.orphans(15) == []


def test_a_volley_of_signals_changes_neither_the_exit_code_nor_the_last_line(server, tmp_path):
    rng = random.Random(0)
    for number, name in enumerate((TERM, USR1, TERM, USR1)):
        run = tmp_path / f"run_{number}"
        child = start(server, run, data__num_workers=2 * (number % 2))
        child.until(lambda run=run: trained(run) >= 1)
        while child.poll(rng.uniform(0, 0.02)) is None:
            os.killpg(child.pid, name)
        assert child.code == 75
        assert "Traceback" not in child.said
        assert child.last_line == status_of(run)["reason"] or "outside of training" in child.last_line
    assert server.orphans(10) == []
