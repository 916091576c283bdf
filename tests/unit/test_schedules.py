"""Schedules: exact values at the first step, at the end of the warm-up, in the middle, at the last step and after it."""

import math
from itertools import pairwise

import pytest

from hjepa_engine.schedules import (
    SCHEDULES,
    ConstantScheduler,
    CosineScheduler,
    EMAScheduler,
    HierarchicalScheduler,
    LinearScheduler,
)

# 30 steps, of which 10 are warm-up: step 9 is its last, step 29 the run's, and step 19 is in the middle between them.
RUN = {"epochs": 3, "steps_per_epoch": 10, "warmup_epochs": 1}
RATES = [CosineScheduler, LinearScheduler, ConstantScheduler]
EVERY = [*RATES, EMAScheduler]


def values(schedule, *steps):
    return [schedule(step) for step in steps]


def test_cosine():
    schedule = CosineScheduler(1.0, 0.2, **RUN)
    assert values(schedule, 0, 4, 9) == [0.1, 0.5, 1.0]
    assert schedule(19) == pytest.approx(0.6)
    # A quarter of the way: (1 + cos 45 degrees) / 2 of the height.
    assert schedule(14) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert values(schedule, 29, 30, 10**6) == [0.2, 0.2, 0.2]


def test_linear():
    schedule = LinearScheduler(1.0, 0.2, **RUN)
    assert values(schedule, 0, 4, 9) == [0.1, 0.5, 1.0]
    assert values(schedule, 14, 19, 24) == pytest.approx([0.8, 0.6, 0.4])
    assert values(schedule, 29, 30, 10**6) == [0.2, 0.2, 0.2]


def test_constant_ignores_the_minimum():
    schedule = ConstantScheduler(0.7, 0.2, **RUN)
    assert values(schedule, 0, 4, 9, 10, 19, 29, 10**6) == pytest.approx([0.07, 0.35, 0.7, 0.7, 0.7, 0.7, 0.7])


@pytest.mark.parametrize("cls", RATES)
def test_the_warm_up_rises_from_where_it_is_told_to(cls):
    schedule = cls(1.0, 0.1, **RUN, start=0.2)
    assert values(schedule, 0, 4, 9) == pytest.approx([0.28, 0.6, 1.0])


def test_rates_are_those_of_ijepas_code():
    """Its schedules count the update before they compute its rate: 1 of 40 x 10 is the first."""
    warm_up, total = 40, 300
    schedule = CosineScheduler(1e-3, 1e-6, epochs=30, steps_per_epoch=10, warmup_epochs=4, start=2e-4)
    for update in range(1, total + 1):
        if update < warm_up:
            expected = 2e-4 + update / warm_up * (1e-3 - 2e-4)
        else:
            turn = math.pi * (update - warm_up) / (total - warm_up)
            expected = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(turn))
        assert schedule(update - 1) == pytest.approx(expected, rel=1e-9)


def test_ema_momentum_rises_by_half_a_cosine():
    schedule = EMAScheduler(0.996, 1.0, epochs=3, steps_per_epoch=10)
    assert schedule(0) == 0.996
    assert schedule(15) == pytest.approx(0.998)
    assert values(schedule, 30, 31, 10**6) == [1.0, 1.0, 1.0]
    # BYOL's formula: 1 - (1 - base) (cos(pi k / K) + 1) / 2
    for step in range(30):
        assert schedule(step) == pytest.approx(1 - 0.004 * (math.cos(math.pi * step / 30) + 1) / 2)


def test_ema_momentum_rises_linearly_as_in_ijepas_code():
    schedule = EMAScheduler(0.996, 1.0, epochs=3, steps_per_epoch=10, shape="linear")
    for step in range(31):
        assert schedule(step) == pytest.approx(0.996 + step * (1.0 - 0.996) / 30, abs=1e-15)


def test_a_warm_up_holds_the_momentum_before_it_rises():
    schedule = EMAScheduler(0.9, 1.0, **RUN)
    assert values(schedule, 0, 5, 9, 10) == [0.9, 0.9, 0.9, 0.9]
    assert schedule(20) == pytest.approx(0.95)
    assert values(schedule, 30, 31) == [1.0, 1.0]


def test_a_warm_up_leads_from_another_momentum_if_it_is_told_to():
    schedule = EMAScheduler(0.9, 1.0, **RUN, start=0.5)
    assert values(schedule, 0, 5, 10) == pytest.approx([0.5, 0.7, 0.9])
    assert schedule(20) == pytest.approx(0.95)


@pytest.mark.parametrize("cls", RATES)
def test_warm_up_as_long_as_the_run_works(cls):
    schedule = cls(0.8, 0.4, epochs=2, steps_per_epoch=4, warmup_epochs=2)
    assert values(schedule, *range(8)) == pytest.approx([0.1 * update for update in range(1, 9)])
    assert values(schedule, 8, 9, 100) == [0.8, 0.8, 0.8]


def test_momentum_with_a_warm_up_as_long_as_the_run_stays():
    assert values(EMAScheduler(0.8, 0.9, 2, 4, 2), *range(10)) == [0.8] * 10


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_works(cls, warmup):
    schedule = cls(0.8, 0.4, 1, 1, warmup)
    assert all(0.4 <= value <= 0.8 for value in values(schedule, 0, 1, 2))
    assert schedule(0) == (0.8 if warmup or cls in (ConstantScheduler, EMAScheduler) else 0.4)


@pytest.mark.parametrize("cls", [CosineScheduler, LinearScheduler])
def test_nothing_leaves_the_range_and_the_decay_is_monotonous(cls):
    schedule = cls(0.9, 0.1, epochs=7, steps_per_epoch=13, warmup_epochs=1.5)
    found = values(schedule, *range(100))
    peak = round(1.5 * 13) - 1
    assert found.index(max(found)) == peak and found[peak] == pytest.approx(0.9)
    assert all(before < after for before, after in pairwise(found[: peak + 1]))
    assert all(before >= after >= 0.1 for before, after in pairwise(found[peak:]))


def test_fractions_of_epochs_are_steps():
    schedule = CosineScheduler(1.0, 0.0, epochs=2, steps_per_epoch=10, warmup_epochs=0.5)
    assert (schedule.warmup_steps, schedule.total_steps) == (5, 20)
    assert values(schedule, 3, 4) == pytest.approx([0.8, 1.0])


def test_a_schedule_is_a_function_of_the_step_and_of_nothing_before_it():
    schedule = CosineScheduler(1.0, 0.2, **RUN)
    forwards = values(schedule, *range(31))
    assert [schedule(step) for step in reversed(range(31))] == forwards[::-1]


def test_hierarchy_has_one_value_per_level():
    fine, coarse = CosineScheduler(1.0, 0.2, **RUN), LinearScheduler(0.5, 0.1, **RUN)
    schedule = HierarchicalScheduler([fine, coarse])
    assert schedule(0) == [0.1, 0.05]
    assert schedule(9) == [1.0, 0.5]
    assert schedule(19) == pytest.approx([0.6, 0.3])
    assert schedule(29) == schedule(99) == [0.2, 0.1]


def test_learning_rate_schedules_by_name():
    assert {"cosine": CosineScheduler, "linear": LinearScheduler, "constant": ConstantScheduler} == SCHEDULES


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("epochs", {"epochs": 0}),
        ("steps_per_epoch", {"steps_per_epoch": 0}),
        ("warmup_epochs", {"warmup_epochs": -1}),
        ("warmup_epochs", {"warmup_epochs": 3}),
    ],
)
def test_bad_lengths_are_refused(cls, argument, arguments):
    with pytest.raises(ValueError, match=argument):
        cls(0.5, 0.1, **{"epochs": 2, "steps_per_epoch": 5, **arguments})


@pytest.mark.parametrize(("base", "final"), [(-0.1, 1.0), (0.9, 1.1), (1.5, 1.0)])
def test_a_momentum_outside_its_range_is_refused(base, final):
    with pytest.raises(ValueError, match="momentum must be from 0 to 1"):
        EMAScheduler(base, final, 2, 5)


def test_a_hierarchy_without_levels_is_refused():
    with pytest.raises(ValueError, match="schedules must not be empty"):
        HierarchicalScheduler([])
