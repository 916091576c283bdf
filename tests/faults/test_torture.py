"""SIGKILL at random instants over a run's whole life: nothing is lost, and the completed run has the same bits."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from forkserver import ForkServer
from witness import TINY_RUN, checkpoints_of, command, is_same, outcome, strays_in, witnessed


@dataclass
class Tally:
    """What the kills have done."""

    kills: int = 0
    in_mid_write: int = 0
    """Kills that left a temporary file."""
    completed: int = 0
    identical: int = 0
    lost: int = 0
    """Kills after which a checkpoint was damaged, or none could be loaded although there had been one."""
    backwards: int = 0
    """Kills after which the newest checkpoint was an earlier one than before."""
    farthest: int = 0
    """The most iterations that a kill has cost."""


def torture(server: ForkServer, folder: Path, workers: int, kills: int, seed: int) -> Tally:
    """Kill runs, and start them again, until there have been so many kills and the last run is complete."""
    rng, tally = random.Random(seed), Tally()
    began = time.monotonic()
    whole = server.start(command(folder / "whole", data__num_workers=workers), folder / "whole.err")
    assert whole.wait() == 0, whole.said
    length = time.monotonic() - began
    wanted = outcome(folder / "whole")
    while tally.kills < kills:
        run = folder / f"run_{tally.completed}"
        arguments, newest = command(run, data__num_workers=workers), 0
        while True:
            child = server.start(arguments, run.with_suffix(".err"))
            code = child.poll(rng.uniform(0, length) if tally.kills < kills else 60)
            if code is None:
                # The loader's processes go with it or, if it is killed alone, see the next one start.
                (os.kill if rng.random() < 0.5 else os.killpg)(child.pid, signal.SIGKILL)
                code = child.wait(10)
            if code == 0:
                break
            assert code == -signal.SIGKILL, child.said
            tally.kills += 1
            newest = look_at(run, newest, tally)
        tally.completed += 1
        tally.identical += is_same(outcome(run), wanted)
        assert [record for record in witnessed(run) if record.get("strays")] == []
        assert strays_in(run) == []
    assert server.orphans(15) == []
    return tally


def look_at(run: Path, newest: int, tally: Tally) -> int:
    """Look at a killed run, without changing it; the iteration of its newest checkpoint, 0 if there is none."""
    found, problems = checkpoints_of(run)
    present = found[0].record.iteration if found else 0
    tally.lost += bool(problems) or (newest > 0 and not found)
    tally.backwards += present < newest
    tally.in_mid_write += bool(strays_in(run))
    for record in witnessed(run)[-1:]:
        tally.farthest = max(tally.farthest, record["iteration"] - present)
    return present


def check(tally: Tally, kills: int) -> None:
    assert tally.kills == kills
    assert (tally.lost, tally.backwards) == (0, 0)
    assert tally.identical == tally.completed > 0
    assert tally.farthest <= 2 * TINY_RUN["checkpoint.save_every_steps"]  # one may be under way when the next is due


@pytest.mark.parametrize(("workers", "kills"), [(0, 15), (2, 10)])
def test_no_kill_costs_a_checkpoint_or_a_bit(server, tmp_path, workers, kills):
    check(torture(server, tmp_path, workers, kills, seed=workers), kills)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, 250), (2, 250)])
def test_none_of_500_kills_costs_a_checkpoint_or_a_bit(server, tmp_path, workers, kills):
    tally = torture(server, tmp_path, workers, kills, seed=100 + workers)
    print(f"\n{workers} workers: {tally}")
    check(tally, kills)
