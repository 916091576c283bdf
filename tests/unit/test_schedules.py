"""Schedules: exact values at step 0, at the end of the warm-up, in the middle, at the last step and after it."""

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

# 31 steps, of which 10 are warm-up: the last is step 30, the middle between the peak (10) and it is step 20.
RUN = {"epochs": 3.1, "steps_per_epoch": 10, "warmup_epochs": 1}
EVERY = [CosineScheduler, LinearScheduler, ConstantScheduler, EMAScheduler]


def values(schedule, *steps):
    return [schedule(step) for step in steps]


def test_cosine():
    schedule = CosineScheduler(1.0, 0.2, **RUN)
    assert values(schedule, 0, 5, 10) == [0.0, 0.5, 1.0]
    assert schedule(20) == pytest.approx(0.6)
    # A quarter of the way: (1 + cos 45 degrees) / 2 of the height.
    assert schedule(15) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert values(schedule, 30, 31, 10**6) == [0.2, 0.2, 0.2]


def test_linear():
    schedule = LinearScheduler(1.0, 0.2, **RUN)
    assert values(schedule, 0, 5, 10) == [0.0, 0.5, 1.0]
    assert values(schedule, 15, 20, 25) == pytest.approx([0.8, 0.6, 0.4])
    assert values(schedule, 30, 31, 10**6) == [0.2, 0.2, 0.2]


def test_constant_ignores_the_minimum():
    schedule = ConstantScheduler(0.7, 0.2, **RUN)
    assert values(schedule, 0, 5, 10, 20, 30, 31, 10**6) == [0.0, 0.35, 0.7, 0.7, 0.7, 0.7, 0.7]


def test_ema_momentum_rises_by_half_a_cosine():
    schedule = EMAScheduler(0.996, 1.0, epochs=3.1, steps_per_epoch=10)
    assert schedule(0) == pytest.approx(0.996)
    assert schedule(15) == pytest.approx(0.998)
    assert values(schedule, 30, 31, 10**6) == [1.0, 1.0, 1.0]
    # BYOL's formula: 1 - (1 - base) (cos(pi k / K) + 1) / 2
    for step in range(31):
        assert schedule(step) == pytest.approx(1 - 0.004 * (math.cos(math.pi * step / 30) + 1) / 2)


def test_ema_with_a_warm_up_rises_from_zero_first():
    schedule = EMAScheduler(0.9, 1.0, **RUN)
    assert values(schedule, 0, 5) == pytest.approx([0.0, 0.45])
    assert schedule(10) == pytest.approx(0.9)
    assert schedule(20) == pytest.approx(0.95)
    assert values(schedule, 30, 31) == [1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_base():
    for cls in (CosineScheduler, LinearScheduler, ConstantScheduler):
        assert cls(0.3, 0.1, epochs=2, steps_per_epoch=5)(0) == pytest.approx(0.3)


@pytest.mark.parametrize("cls", EVERY)
def test_warm_up_as_long_as_the_run_works(cls):
    schedule = cls(0.8, 0.4, epochs=2, steps_per_epoch=4, warmup_epochs=2)
    assert values(schedule, *range(8)) == pytest.approx([0.1 * step for step in range(8)])
    assert all(0.4 <= value <= 0.8 for value in values(schedule, 8, 9, 100))


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (1, 1)])
def test_a_run_of_one_step_works(cls, epochs, warmup):
    schedule = cls(0.8, 0.4, epochs, 1, warmup)
    assert schedule(0) == (0.0 if warmup else 0.8)
    assert all(0.4 <= value <= 0.8 for value in values(schedule, 1, 2))


@pytest.mark.parametrize("cls", EVERY)
def test_one_step_after_the_warm_up_has_the_base(cls):
    schedule = cls(0.8, 0.4, epochs=4, steps_per_epoch=1, warmup_epochs=3)
    assert values(schedule, 0, 3) == pytest.approx([0.0, 0.8])


@pytest.mark.parametrize("cls", [CosineScheduler, LinearScheduler, EMAScheduler])
def test_nothing_leaves_the_range_and_the_decay_is_monotonous(cls):
    schedule = cls(0.9, 0.1, epochs=7, steps_per_epoch=13, warmup_epochs=1.5)
    found = values(schedule, *range(100))
    peak = round(1.5 * 13)
    assert found.index(max(found)) == peak and found[peak] == pytest.approx(0.9)
    assert all(before < after for before, after in pairwise(found[: peak + 1]))
    assert all(before >= after >= 0.1 for before, after in pairwise(found[peak:]))


def test_fractions_of_epochs_are_steps():
    schedule = CosineScheduler(1.0, 0.0, epochs=2, steps_per_epoch=10, warmup_epochs=0.5)
    assert (schedule.warmup_steps, schedule.total_steps) == (5, 20)
    assert values(schedule, 4, 5) == pytest.approx([0.8, 1.0])


def test_a_schedule_is_a_function_of_the_step_and_of_nothing_before_it():
    schedule = CosineScheduler(1.0, 0.2, **RUN)
    forwards = values(schedule, *range(31))
    assert [schedule(step) for step in reversed(range(31))] == forwards[::-1]


def test_hierarchy_has_one_value_per_level():
    fine, coarse = CosineScheduler(1.0, 0.2, **RUN), LinearScheduler(0.5, 0.1, **RUN)
    schedule = HierarchicalScheduler([fine, coarse])
    assert schedule(0) == [0.0, 0.0]
    assert schedule(10) == [1.0, 0.5]
    assert schedule(20) == pytest.approx([0.6, 0.3])
    assert schedule(30) == schedule(99) == [0.2, 0.1]


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
