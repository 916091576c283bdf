"""Which checkpoints stay: the policy against a naive one, and real folders through real saves and crashes."""

import json
import math
import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import same_state, save_state
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_engine.checkpoint import folder as checkpoint_folder
from hjepa_engine.checkpoint import storage
from hjepa_engine.checkpoint.folder import INDEX, list_checkpoints, load_newest
from hjepa_engine.checkpoint.retention import Record, RetentionPolicy, best, latest
from hjepa_engine.checkpoint.serialization import flatten
from hjepa_engine.checkpoint.writer import CheckpointWriter, describe_record
from hjepa_engine.utils import files

SCORES = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, math.nan, math.inf, -math.inf]), st.floats(width=16)
)
POLICIES = st.builds(
    RetentionPolicy,
    st.integers(2, 4),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from(["min", "max"]),
)


@st.composite
def histories(draw):
    """Records as a run leaves them: places grow; some of them at an epoch's end; in any order of listing."""
    records, iteration = [], 0
    for number in range(draw(st.integers(0, 9))):
        iteration += draw(st.integers(1, 3))
        ends = draw(st.booleans())
        records.append(Record(f"epoch_{number}", iteration, iteration, iteration // 2, ends, draw(SCORES)))
    return draw(st.permutations(records))


def kept_by_the_letter(records, policy):
    """The policy in the plainest words: a checkpoint stays if few enough others go before it."""
    names = set()
    for one in records:
        newer = [other for other in records if other.iteration > one.iteration]
        if len(newer) < policy.keep_last_n:
            names.add(one.name)
        if one.ends_epoch and policy.keep_every_epochs is not None and one.epoch % policy.keep_every_epochs == 0:
            names.add(one.name)
        if one.score is None or math.isnan(one.score) or math.isinf(one.score):
            continue
        better = 0
        for other in records:
            if other.score is None or not -math.inf < other.score < math.inf or other is one:
                continue
            wins = other.score < one.score if policy.mode == "min" else other.score > one.score
            better += wins or (other.score == one.score and other.iteration < one.iteration)
        if better < policy.keep_best_n:
            names.add(one.name)
    return names


@settings(max_examples=500, deadline=None)
@given(histories(), POLICIES)
def test_the_policy_keeps_what_its_words_say(records, policy):
    kept = policy(records)
    assert set(kept) == kept_by_the_letter(records, policy)
    assert all(reasons for reasons in kept.values())
    assert len(kept) >= min(2, len(records))
    if records:
        assert "latest" in kept[latest(records).name]
    assert policy([record for record in records if record.name in kept]).keys() == kept.keys()  # what stays once, stays


@settings(max_examples=300, deadline=None)
@given(histories(), st.sampled_from(["min", "max"]))
def test_a_score_that_is_no_number_never_wins(records, mode):
    foremost = best(records, mode)
    finite = [record for record in records if record.score is not None and math.isfinite(record.score)]
    assert (foremost is None) == (not finite)
    scores = [record.score for record in finite]
    assert foremost is None or foremost.score == (min if mode == "min" else max)(scores)
    kept = RetentionPolicy(keep_best_n=2, mode=mode)(records)
    for record in records:
        if record not in finite:
            assert not any(reason.startswith("best") for reason in kept.get(record.name, []))


@settings(max_examples=200, deadline=None)
@given(histories(), POLICIES)
def test_pruning_at_every_save_never_loses_what_the_policy_would_keep_of_all(records, policy):
    """Pruning as one goes keeps the same as looking at the whole history at the end: no good one is dropped too early."""
    folder = []
    for record in sorted(records, key=lambda record: record.iteration):
        before = kept_by_the_letter(folder, policy)
        folder = [*folder, record]
        kept = policy(folder)
        assert record.name in kept
        folder = [one for one in folder if one.name in kept]
        assert len(folder) >= 2 or len(before) < 1
    assert {record.name for record in folder} == kept_by_the_letter(records, policy)


class Crash(BaseException):
    """The process is gone."""


class CrashingOs:
    """The os module of a process that ends at its n-th change of the disk."""

    def __init__(self, number):
        self.left = number

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"):
            return real

        def call(*args):
            self.left -= 1
            if self.left < 0:
                raise Crash
            return real(*args)

        return call


def state_of(iteration):
    return {"iteration": iteration, "weight": torch.full((3,), float(iteration))}


def save(writer, iteration, score, **more):
    """One save of a run, as its handler makes it."""
    name = f"epoch_{iteration // 2:04d}_step_{iteration:08d}"
    record = Record(name, iteration, iteration, iteration // 2, iteration % 2 == 0, score)
    description = describe_record(record, "val/loss", {})
    description |= {"reasons": ["steps"], "config": {}, "environment": {}, **more}
    writer.start(writer.copy(name, *flatten(state_of(iteration)), description))
    writer.wait()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SCORES, st.one_of(st.none(), st.none(), st.integers(0, 30))), min_size=1, max_size=9), POLICIES
)
def test_saves_and_crashes_leave_what_the_policy_says(saves, policy):
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "checkpoints"
    try:
        saved, iteration = {}, 0  # what a run that sees only the folder knows
        writer = CheckpointWriter(folder, policy)
        writer.prepare()
        for score, crash_at in saves:
            iteration += 1
            everything = {**saved, iteration: score}
            if crash_at is None:
                save(writer, iteration, score)
                saved = check(folder, everything, policy)
                assert iteration in saved
                continue
            storage.os = checkpoint_folder.os = files.os = CrashingOs(crash_at)
            try:
                save(writer, iteration, score)
            except Crash:
                pass
            finally:
                storage.os = checkpoint_folder.os = files.os = os
            found = load_newest(folder)
            assert found is None if not saved and iteration not in on_disk(folder) else found is not None
            if found is not None:
                assert found[0].record.iteration in (iteration, max(saved, default=0))
                assert same_state(found[1], state_of(found[0].record.iteration))
                iteration = found[0].record.iteration  # a run goes on from there
            assert len(on_disk(folder)) >= min(2, len(saved))
            must_stay = {int(name[7:]) for name in kept_by_the_letter(records_of(everything), policy)}
            assert must_stay & saved.keys() <= on_disk(folder) <= everything.keys()
            saved = {number: everything[number] for number in on_disk(folder)}
            writer = CheckpointWriter(folder, policy)
            writer.prepare()
            assert not [name for name in os.listdir(folder) if not name.startswith("epoch_") and name != INDEX]
    finally:
        shutil.rmtree(folder.parent)


def records_of(scores):
    return [
        Record(f"number_{number}", number, number, number // 2, number % 2 == 0, score)
        for number, score in scores.items()
    ]


def on_disk(folder):
    return {checkpoint.record.iteration for checkpoint in list_checkpoints(folder)}


def check(folder, everything, policy):
    """The folder holds what the policy keeps of ``everything``, and the index says the same."""
    names = kept_by_the_letter(records_of(everything), policy)
    kept = {number: score for number, score in everything.items() if f"number_{number}" in names}
    assert on_disk(folder) == kept.keys()
    index = json.loads((folder / INDEX).read_text())
    by_name = {checkpoint.record.name: checkpoint.record for checkpoint in list_checkpoints(folder)}
    assert {entry["name"] for entry in index["checkpoints"]} == by_name.keys()
    assert by_name[index["latest"]].iteration == max(kept)
    foremost = best(list(by_name.values()), policy.mode)
    assert index["best"] == (foremost and foremost.name)
    return kept


@pytest.mark.parametrize("content", [None, b"", b"\0\xff", b"[]", b'{"latest": "epoch_0000_step_00000001"}'])
def test_the_index_is_only_a_cache(tmp_path, content):
    writer = CheckpointWriter(tmp_path, RetentionPolicy(keep_best_n=1))
    for iteration, score in enumerate([0.5, 0.1, 0.4, 0.3], 1):
        save(writer, iteration, score)
    index = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).unlink()
    if content is not None:
        (tmp_path / INDEX).write_bytes(content)
    assert on_disk(tmp_path) == {2, 3, 4} and load_newest(tmp_path)[0].record.iteration == 4
    writer = CheckpointWriter(tmp_path, writer.policy)
    writer.prepare()
    save(writer, 5, 0.2)
    assert on_disk(tmp_path) == {2, 4, 5}
    assert json.loads((tmp_path / INDEX).read_text()).keys() == json.loads(index).keys()


def test_what_was_just_saved_stays_even_if_others_claim_a_later_place(tmp_path):
    for iteration in (98, 99):  # could not be read when the run began again at 90
        save_state(tmp_path, state_of(iteration), iteration)
    writer = CheckpointWriter(tmp_path, RetentionPolicy(keep_best_n=0))
    writer.prepare()
    save(writer, 91, None)
    assert on_disk(tmp_path) == {91, 98, 99}


def test_saving_the_same_place_twice_keeps_both_under_names_of_their_own(tmp_path):
    writer = CheckpointWriter(tmp_path, RetentionPolicy(keep_best_n=0))
    writer.prepare()
    for saved_at in range(3):
        save(writer, 1, None, saved_at=saved_at)
    names = sorted(path.name for path in tmp_path.glob("epoch_*"))
    assert len(names) == 2 and load_newest(tmp_path)[0].record.name == writer.newest.name
    assert all(first != second for first, second in pairwise(names))


@pytest.mark.parametrize(
    "arguments", [{"keep_last_n": 1}, {"keep_best_n": -1}, {"keep_every_epochs": 0}, {"mode": "least"}]
)
def test_policies_that_could_lose_everything_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RetentionPolicy(**arguments)
