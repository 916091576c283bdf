"""Nested state in one file and back, and what damage to a checkpoint does."""

import math
import os
import random
import re
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import bytes_of, linear_trainer, rows, same_bits, same_state, save_state, sign_again, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hjepa_engine.checkpoint.folder import checkpoint_folders, find_checkpoint, list_checkpoints, load_newest, load_one
from hjepa_engine.checkpoint.serialization import _DTYPES, Snapshot, flatten, read_tensors, unflatten, write_tensors
from hjepa_engine.checkpoint.state import collect_state, resume
from hjepa_engine.checkpoint.storage import MANIFEST, STATE, CorruptCheckpoint, read_manifest
from hjepa_engine.errors import CheckpointError
from hjepa_engine.handlers import MetricAverager

KEYS = st.one_of(
    st.sampled_from(["", ".", "a", "b", "a.b", "a.b#1", "a.b#2", "#", "$", "$tensor", "$tuple", "$items"]),
    st.sampled_from(["__metadata__", "0", "1", "\ud800", "\udfff", "é\n\0"]),
    st.integers(-3, 3),
    st.text(max_size=3),
)
NUMBERS = st.one_of(st.integers(), st.integers(10**400, 10**400 + 9), st.floats(), st.booleans(), st.none(), st.text())


@st.composite
def any_tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    data = bytearray(draw(st.binary(min_size=8, max_size=8)) * 27)
    dtype = draw(st.sampled_from(list(_DTYPES)))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    tensor = torch.frombuffer(data, dtype=dtype)[: math.prod(shape)].reshape(shape)
    return tensor.transpose(0, -1) if tensor.ndim and draw(st.booleans()) else tensor


STATES = st.recursive(
    st.one_of(NUMBERS, any_tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=5),
    ),
    max_leaves=12,
)


def write(path, state):
    with open(path, "wb") as file:
        write_tensors(file.write, *flatten(state))


@settings(max_examples=300, deadline=None)
@given(STATES)
def test_whatever_can_be_saved_comes_back_with_the_same_bits_types_and_order(state):
    path = os.path.join("/dev/shm" if os.path.isdir("/dev/shm") else ".", f"state-{os.getpid()}.safetensors")
    try:
        write(path, state)
        structure, tensors = read_tensors(path)
        assert same_state(unflatten(structure, tensors), state)
        elsewhere = load_file(path)  # any program that knows the format reads the tensors
        assert elsewhere.keys() == tensors.keys()
        assert all(bytes_of(elsewhere[name]) == bytes_of(tensors[name]) for name in tensors)
    finally:
        os.unlink(path)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 2)])
def test_every_dtype_and_shape_comes_back(tmp_path, dtype, shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    write(tmp_path / "file", {"model.weight": tensor, "odd": torch.ones(3, dtype=torch.uint8)})
    structure, tensors = read_tensors(tmp_path / "file")
    assert same_state(unflatten(structure, tensors)["model.weight"], tensor)
    assert list(tensors) == list(load_file(tmp_path / "file")) or set(tensors) == {"model.weight", "odd"}


def test_views_are_saved_by_value_not_by_memory(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.t(), "column": base[:, 1], "step": base[::2, ::3], "expanded": torch.ones(1).expand(4)}
    write(tmp_path / "file", state)
    loaded = unflatten(*read_tensors(tmp_path / "file"))
    assert same_state(loaded, {name: tensor.clone() for name, tensor in state.items()})


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells what is mapped")
def test_mapped_tensors_stay_in_the_file_and_others_do_not(tmp_path):
    path = tmp_path / "file"
    write(path, {"weight": torch.arange(12.0).reshape(3, 4)})
    mapped = read_tensors(path, mapped=True)[1]["weight"]
    assert str(path) in Path("/proc/self/maps").read_text()
    copied = read_tensors(path)[1]["weight"]
    assert torch.equal(mapped, copied)
    del mapped
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_paths_that_collide_get_names_of_their_own():
    ones = [torch.full((1,), number) for number in range(5)]
    state = {"a.b#2": ones[0], "a.b": ones[1], "a": {"b": ones[2]}, "a.b#3": ones[3], "__metadata__": ones[4]}
    structure, tensors = flatten(state)
    assert len(tensors) == 5 and "__metadata__" not in tensors
    assert same_state(unflatten(structure, tensors), state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "here.0 is of type object"),
        ({1, 2}, "here.0 is of type set"),
        (b"bytes", "here.0 is of type bytes"),
        (torch.float32, "here.0 is of type dtype"),
        ({True: 1}, "here.0 is of type dict"),
        ({(1, 2): 1}, "here.0 is of type dict"),
        ({"deep": [print]}, "here.0.deep.0 is of type builtin_function_or_method"),
        (torch.ones(1, dtype=torch.complex64), "here.0 is a tensor of torch.complex64"),
        (torch.eye(2).to_sparse(), "here.0 is a tensor of torch.float32, torch.sparse_coo"),
        ([0.5] * 1_000_000, "the state holds 0 tensors and 5.0 MB of other things"),
    ],
)
def test_what_cannot_be_saved_is_named_with_its_place(value, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        flatten({"here": [value]})


def test_a_state_that_contains_itself_is_refused():
    state = {}
    state["self"] = state
    with pytest.raises(TypeError, match="contains itself"):
        flatten(state)


def test_a_snapshot_does_not_follow_its_source_and_uses_its_memory_again():
    source = {"weight": torch.arange(6.0).reshape(2, 3).t(), "step": torch.tensor(1)}
    snapshot = Snapshot()
    first = snapshot.take(source)
    kept = {name: tensor.clone() for name, tensor in source.items()}
    for tensor in source.values():
        tensor.add_(7)
    assert same_state(first, kept)
    memory = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = snapshot.take(source)
    assert same_state(second, source)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == memory
    source["step"], source["new"] = torch.ones(2), torch.ones(1, dtype=torch.bfloat16)
    assert same_state(snapshot.take(source), source)


# Damage


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Three checkpoints with states of their own; tests copy them."""
    folder = tmp_path_factory.mktemp("intact")
    for number in (1, 2, 3):
        generator = torch.Generator().manual_seed(number)
        state = {"number": number, "text": string.printable, "moments": {0: (torch.zeros(700), None, -0.0)}}
        save_state(folder, {**state, "weight": torch.randn(40, 30, generator=generator)}, number)
    return folder


def damage(folder, dice):
    """Do something to one of the newest checkpoint's files; what was done."""
    paths = sorted(folder.glob("epoch_*"))
    newest, other = paths[-1], dice.choice(paths[:-1])
    path = newest / dice.choice([STATE, STATE, MANIFEST])
    data = bytearray(path.read_bytes())
    place, length = dice.randrange(len(data)), dice.choice([1, 8, 512, 4096])
    kinds = ["flip", "flip", "flips", "truncate", "zeros", "tail", "append", "empty", "swap", "gone", "resign"]
    kind = dice.choice(kinds)
    if kind == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif kind == "flips":
        for spot in dice.sample(range(len(data)), 5):
            data[spot] ^= dice.randrange(1, 256)
    elif kind == "truncate":
        del data[place:]
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "tail":
        data[place:] = bytes(len(data) - place)
    elif kind == "append":
        data += dice.choice([b"\0", b"\n", dice.randbytes(length)])
    elif kind == "empty":
        data.clear()
    elif kind == "swap":
        data = (other / path.name).read_bytes()
    elif kind == "resign":  # a manifest of the right form and digest, but with other contents
        field = dice.choice(["iteration", "files", "metrics", "score", "saved_at", "config", "reasons"])
        wrong = (
            [None, "x", [1], {"a": "b"}, -1, 1e400] if field not in ("score", "config") else ["x", [1], 1e400 - 1e400]
        )
        sign_again(newest, **{field: dice.choice(wrong)})
        return f"{field} signed again"
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{path.name}: {kind} at {place}"


def fuzz(intact, folder, caplog, first, number):
    """Damage the newest checkpoint in ``number`` ways: how many changed a byte; each is noticed and the former one used."""
    expected = {path.name: load_one(path)[1] for path in intact.glob("epoch_*")}
    changed = 0
    for seed in range(first, first + number):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact, folder)
        caplog.clear()
        what = f"seed {seed}: {damage(folder, random.Random(seed))}"
        newest = max(expected)
        before = {name: (intact / newest / name).read_bytes() for name in (STATE, MANIFEST)}
        after = {path.name: path.read_bytes() for path in (folder / newest).iterdir()}
        checkpoint, state = load_newest(folder)
        assert same_state(state, expected[checkpoint.record.name]), what
        if before == after:  # zeros over zeros
            assert checkpoint.record.name == newest, what
            continue
        changed += 1
        if checkpoint.record.name == newest:  # signed again with a value of the right type, or only a blank differs
            same = replace(checkpoint, path=intact / newest) == read_manifest(intact / newest)
            assert same or "signed again" in what, what
            continue
        assert checkpoint.record.iteration == 2, what
        if (folder / newest).exists() and read_manifest(folder / newest).record.iteration <= 2:
            continue  # it says of itself, under its digest, that it is an older one: not looked at yet
        assert newest in caplog.text and (folder / f"damaged_{newest}").is_dir(), what
        assert not (folder / newest).exists(), what
    return changed


def test_damage_is_noticed_named_set_aside_and_the_former_checkpoint_used(intact, tmp_path, caplog):
    assert fuzz(intact, tmp_path / "run", caplog, 0, 400) > 350


@pytest.mark.slow
def test_ten_thousand_kinds_of_damage_are_noticed(intact, tmp_path, caplog):
    assert fuzz(intact, tmp_path / "run", caplog, 10**6, 10_000) > 9_000


def test_every_bit_of_a_manifest_counts_but_for_blanks(tmp_path):
    path = save_state(tmp_path, {"x": 1}, 1)
    data = (path / MANIFEST).read_bytes()
    silent = []
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST).write_bytes(flipped)
        try:
            checkpoint = read_manifest(path)
        except CorruptCheckpoint:
            continue
        silent.append((bit, checkpoint))
    (path / MANIFEST).write_bytes(data)
    same = read_manifest(path)
    assert all(checkpoint == same for _, checkpoint in silent)  # blanks between the fields: the meaning is the same
    assert len(silent) < 0.1 * 8 * len(data) / 5


def test_a_checkpoint_under_another_name_is_what_its_manifest_says(intact, tmp_path):
    """A name is a label; order comes from the manifest, which the digest protects."""
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    shutil.copytree(folder / "epoch_0001_step_00000001", folder / "epoch_0009_step_00000009")
    checkpoint, state = load_newest(folder)
    assert checkpoint.record.iteration == state["number"] == 3
    assert [found.record.iteration for found in list_checkpoints(folder)] == [3, 2, 1, 1]


def test_when_all_are_damaged_loading_fails_each_time_and_says_so(intact, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    for path in folder.glob("epoch_*"):
        (path / STATE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable.*resume never") as raised:
            load_newest(folder)
        assert raised.value.exit_code == 4
    assert len(list(folder.glob("damaged_*"))) == 3


def test_one_that_is_not_the_newest_is_named_when_a_folder_is_loaded(intact, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder / "checkpoints")
    (folder / "checkpoints" / "epoch_0003_step_00000003" / MANIFEST).write_bytes(b"{}")
    assert load_one(folder)[0].record.iteration == 2
    assert "epoch_0003_step_00000003 is damaged" in caplog.text
    assert (folder / "checkpoints" / "epoch_0003_step_00000003").exists()  # reading changes nothing


def test_of_a_damaged_newest_checkpoint_the_one_used_is_named_and_by_its_name_it_is_called_damaged(
    intact, tmp_path, caplog
):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(intact, folder)
    names = [f"epoch_000{number}_step_0000000{number}" for number in (1, 2, 3)]
    (folder / names[2] / MANIFEST).write_bytes(b"{}")
    assert find_checkpoint(tmp_path / "run", "latest").record.name == names[1]
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint {names[2]} is damaged: ") and line.endswith(f"; {names[1]} is used instead")
    assert find_checkpoint(tmp_path / "run", names[0]).record.iteration == 1 and len(caplog.messages) == 1
    with pytest.raises(CheckpointError, match=f"the checkpoint {names[2]} in .* is damaged: "):
        find_checkpoint(tmp_path / "run", names[2])
    for name in names[:2]:
        (folder / name / MANIFEST).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is usable: {names[2]} is damaged"):
        find_checkpoint(tmp_path / "run", "latest")


def test_a_copied_run_folder_never_uses_the_checkpoints_of_the_run_that_it_was_copied_from(intact, tmp_path):
    run, copy, far = tmp_path / "run", tmp_path / "copy", tmp_path / "far"
    shutil.copytree(intact, run / "checkpoints")
    name = "epoch_0003_step_00000003"
    (run / "status.json").write_text(f'{{"checkpoint": "{run}/checkpoints/{name}"}}')
    for config in (
        "checkpoint: {checkpoint_dir: null}\n",
        f"run_dir: {run}\ncheckpoint: {{checkpoint_dir: {run}/checkpoints}}\n",
    ):
        (run / "config.yaml").write_text(config)
        shutil.copytree(run, copy)
        assert find_checkpoint(copy, "latest").path == copy / "checkpoints" / name
        shutil.rmtree(copy / "checkpoints")
        for find in (lambda: find_checkpoint(copy, "latest"), lambda: load_one(copy)):
            with pytest.raises(CheckpointError, match="holds no checkpoint") as raised:
                find()
            assert raised.value.exit_code == 4
        shutil.rmtree(copy)
    (run / "checkpoints").rename(far)
    (run / "config.yaml").write_text(f"run_dir: {run}\ncheckpoint: {{checkpoint_dir: {far}}}\n")
    assert checkpoint_folders(run)[0] == far and find_checkpoint(run, name).path == far / name


# Restoring


def trained():
    """A linear model with momentum after three steps, and a checkpoint's state of it."""
    trainer, handler = linear_trainer()
    for group in handler.optimizer.param_groups:
        group["momentum"] = 0.9
    MetricAverager().attach(trainer)
    trainer.run(rows([1, 2], [3, 4], [5, 6]), max_epochs=1)
    structure, tensors = flatten(collect_state(trainer))
    return trainer, unflatten(structure, {name: tensor.clone() for name, tensor in tensors.items()})


def drop(path):
    def change(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        del state[last]

    return change


def put(value, *path):
    def change(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        state[last] = value

    return change


MISFITS = {
    "wrong shape": (put(torch.ones(3), "modules", "model", "weight"), r"model\.weight is \(3,\) .* \(2,\) in the run"),
    "missing tensor": (drop(["modules", "model", "weight"]), r"lacks the tensor model\.weight"),
    "extra tensor": (put(torch.ones(1), "modules", "model", "bias"), r"has a tensor model\.bias that the run has no"),
    "missing module": (drop(["modules", "model"]), r"the run needs model"),
    "extra module": (put({}, "modules", "other"), r"modules model, other, the run needs model"),
    "missing optimizer": (drop(["handlers", "OptimizerStep"]), r"lacks the state of OptimizerStep"),
    "optimizer without groups": (drop(["handlers", "OptimizerStep", "optimizer", "param_groups"]), r"OptimizerStep"),
    "optimizer without counter": (drop(["handlers", "OptimizerStep", "skipped_updates"]), r"OptimizerStep.*skipped_up"),
    "momentum of another shape": (
        put(torch.ones(3), "handlers", "OptimizerStep", "optimizer", "state", 0, "momentum_buffer"),
        r"OptimizerStep.*momentum_buffer of parameter 0 is \(3,\), the parameter \(2,\)",
    ),
    "a weight that is no tensor": (put([1.0, 2.0], "modules", "model", "weight"), "no weights of modules"),
    "no modules": (drop(["modules"]), "no weights of modules"),
    "no engine": (drop(["engine"]), "no state of a run: it lacks 'engine'"),
    "engine without clock": (drop(["engine", "iteration"]), "no state of a run: it lacks 'iteration'"),
    "no ranks": (put([], "ranks"), "no state of a run"),
    "no random numbers": (put({}, "ranks", 0, "random"), "no state of a run: it lacks 'python'"),
    "optimizer of others": (put([], "handlers", "OptimizerStep", "optimizer", "param_groups"), r"OptimizerStep"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_says_what_and_where_and_changes_no_weight(tmp_path, name):
    change, message = MISFITS[name]
    _, state = trained()
    change(state)
    save_state(tmp_path, state, 3)
    trainer, handler = linear_trainer()
    MetricAverager().attach(trainer)
    trainer.run(rows([7, 8]), max_epochs=1)
    weights, iteration = weights_of(trainer.modules), trainer.state.iteration
    with pytest.raises(CheckpointError, match=message) as raised:
        resume(trainer, tmp_path)
    assert raised.value.exit_code == 4 and "\n" not in str(raised.value)
    assert same_bits(weights_of(trainer.modules), weights) and trainer.state.iteration == iteration
    assert handler.optimizer.state_dict()["state"].get(0, {}).get("momentum_buffer") is None


def test_a_checkpoint_that_fits_restores_weights_and_momentum_to_the_bit(tmp_path):
    first, state = trained()
    save_state(tmp_path, state, 3)
    trainer, _ = linear_trainer()
    MetricAverager().attach(trainer)
    resume(trainer, tmp_path)
    assert same_bits(weights_of(trainer.modules), weights_of(first.modules))
    before, after = flatten(collect_state(first)), flatten(collect_state(trainer))
    before[1].pop("ranks.0.random.torch"), after[1].pop("ranks.0.random.torch")
    assert same_state(after, before)
