"""Checkpoints made by an enemy, with digests that are right: nothing in them runs, and none takes much memory or time."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import zipfile

import pytest
import torch
from helpers import LinearModel, save_state, sign_again
from torch import nn

from hjepa_engine.checkpoint.folder import find_checkpoint, load_newest, load_one
from hjepa_engine.checkpoint.storage import MANIFEST, STATE, CorruptCheckpoint, read_manifest
from hjepa_engine.errors import CheckpointError, ExportError
from hjepa_engine.export import load_encoder
from hjepa_engine.interop.fit import plan_weights
from hjepa_engine.interop.own import read_own

GOOD = {"modules": {"model": {"weight": torch.ones(2)}}, "engine": {}, "handlers": {}, "ranks": []}
ONE = {"modules": {"model": {"weight": {"$tensor": "a"}}}, "engine": {}, "handlers": {}, "ranks": []}


class Gadget:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_name(module, name, argument):
    """A pickle that calls ``module.name(argument)``, in the oldest protocol."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def gadgets(canary):
    """Pickles that create the file ``canary`` when they are loaded."""
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": pickle.dumps({"modules": Gadget(os.system, touch)}),
        "eval": pickle.dumps(Gadget(eval, code)),
        "exec": pickle.dumps([Gadget(exec, code)]),
        "open": pickle.dumps({"a": (Gadget(open, str(canary), "w"),)}),
        "posix.system": by_name("posix", "system", touch),
        "subprocess": by_name("subprocess", "getoutput", touch),
        "pty": by_name("pty", "spawn", f"/usr/bin/{touch}"),
        "cProfile": by_name("cProfile", "run", code),
    }


def torch_files(canary):
    """The same in each of torch's formats."""
    system, files = Gadget(os.system, f"touch {canary}"), {}
    for name, new in (("zip", True), ("legacy", False)):
        for kind, value in {"call": system, "in a state": {"modules": {"w": torch.ones(2)}, "call": system}}.items():
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=new)
            files[f"torch {name}, {kind}"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # the layout of a scripted module
        file.writestr("model/data.pkl", gadgets(canary)["os.system"])
        file.writestr("model/constants.pkl", gadgets(canary)["eval"])
        file.writestr("model/code/__torch__.py", f"import os\nos.system('touch {canary}')\n")
        file.writestr("model/version", "3\n")
    files["TorchScript"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"modules": {"model": {"weight": torch.ones(1).expand(10**10)}}}, buffer)
    files["torch zip, a tensor of stride 0 and 40 GB"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/data.pkl", bytes(2**26))
    files["zip bomb"] = buffer.getvalue()
    return files


def tensors_file(header, data=b"", structure=ONE):
    """A safetensors file with a header of one's own making."""
    if isinstance(header, dict):
        structure = structure if isinstance(structure, str) else json.dumps(structure)
        header = json.dumps({"__metadata__": {"structure": structure}, **header}).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NOUGHT = bytes(4)
MANY = b'{"__metadata__":{"structure":"{}"}' + b"".join(
    b',"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(150_000)
)
LIES = {
    "empty": b"",
    "no header": struct.pack("<Q", 0),
    "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 90 MB": struct.pack("<Q", 90 * 2**20) + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header is a list": tensors_file(b"[]"),
    "header nested deeply": tensors_file(b'{"a":' * 100_000),
    "no structure": tensors_file(json.dumps({"a": tensor()}).encode(), NOUGHT),
    "structure is a number": tensors_file(b'{"__metadata__":{"structure":5}}'),
    "offsets overlap": tensors_file({"a": tensor(), "b": tensor()}, NOUGHT),
    "offsets go backwards": tensors_file({"a": tensor(offsets=(4, 0))}, NOUGHT),
    "offsets leave a hole": tensors_file({"a": tensor(), "b": tensor(offsets=(8, 12))}, NOUGHT * 3),
    "offsets behind the end": tensors_file({"a": tensor(shape=[10**9], offsets=(0, 4 * 10**9))}, NOUGHT),
    "10**9 elements in 4 bytes": tensors_file({"a": tensor(shape=[10**9])}, NOUGHT),
    "negative shape": tensors_file({"a": tensor(shape=[-1])}, NOUGHT),
    "shape overflows": tensors_file({"a": tensor(shape=[2**40, 2**40])}, NOUGHT),
    "shape of 2**63": tensors_file({"a": tensor(shape=[0, 2**63], offsets=(0, 0))}),
    "shape of 2**64": tensors_file({"a": tensor(shape=[0, 2**64], offsets=(0, 0))}),
    "unknown dtype": tensors_file({"a": tensor("OBJECT")}, NOUGHT),
    "odd dtype": tensors_file({"a": tensor("F6_E2M3", [4], (0, 3))}, bytes(3)),
    "half a character": tensors_file({"\ud800": tensor()}, NOUGHT),
    "bytes behind the tensors": tensors_file({"a": tensor()}, NOUGHT * 2),
    "structure is no JSON": tensors_file({}, structure="{"),
    "structure names a missing tensor": tensors_file({"b": tensor()}, NOUGHT),
    "structure names a list": tensors_file({}, structure={"modules": {"$tensor": ["a"]}}),
    "structure nested deeply": tensors_file({}, structure="[" * 100_000 + "]" * 100_000),
    "structure nested a bit": tensors_file({}, structure='{"modules":' * 990 + "1" + "}" * 990),
    "structure with items that are none": tensors_file({}, structure={"$items": 5}),
    "structure with a key that is none": tensors_file({}, structure={"$items": [[[], 1]]}),
    "structure with half an item": tensors_file({}, structure={"$items": [["modules"]]}),
    "structure with a tuple that is none": tensors_file({}, structure={"$tuple": 3}),
    "structure with a number of 5000 digits": tensors_file({}, structure="9" * 5000),
    "structure of 40 MB": tensors_file({}, structure="[" + "[]," * 13_000_000 + "0]"),
}
#: Odd, but nothing is wrong with them: they are loaded, and nothing happens.
HARMLESS = {
    "the same name twice": tensors_file(
        b'{"__metadata__":{"structure":%s},"a":%s,"a":%s}'
        % (*[json.dumps(json.dumps(ONE)).encode()], *[json.dumps(tensor()).encode()] * 2),
        NOUGHT,
    ),
    "complex": tensors_file({"a": tensor("C64", [1], (0, 8))}, bytes(8)),
    "200 dimensions": tensors_file({"a": tensor(shape=[1] * 200)}, NOUGHT),
    "no elements of a huge shape": tensors_file({"a": tensor(shape=[0, 2**62], offsets=(0, 0))}),
    "structure of 7 MB": tensors_file(
        {"a": tensor()}, NOUGHT, structure=json.dumps(ONE)[:-1] + ', "x": [' + "[]," * 2_500_000 + "0]}"
    ),
    "150,000 tensors": tensors_file(MANY.replace(b'"{}"', json.dumps(json.dumps({"modules": {}})).encode()) + b"}"),
}


def with_state(data):
    def build(path):
        (path / STATE).write_bytes(data)
        sign_again(path)

    return build


def with_manifest(data):
    return lambda path: (path / MANIFEST).write_bytes(data)


def with_files(**files):
    """The state file under another name, there and signed for."""

    def build(path):
        entry = read_manifest_file(path)["files"][STATE]
        sign_again(path, files=dict.fromkeys(files["names"], entry))

    return build


def read_manifest_file(path):
    return json.loads((path / MANIFEST).read_text())


def instead_of(name, make):
    """Something else where a file (or, for ``.``, the folder) was."""

    def build(path):
        place = path / name
        shutil.move(place, path.parent / "moved") if name == "." else place.unlink()
        make(place if name != "." else path)

    return build


def link_to(target):
    return lambda place: place.symlink_to(target if target else place.parent / "moved")


def sparse(name, size):
    def build(path):
        with open(path / name, "ab") as file:
            file.truncate(size)
        if name == STATE:
            sign_again(path, files={STATE: {"bytes": size, "sha256": "0" * 64}})

    return build


def distributed(canary):
    """A folder of torch's distributed checkpoints: its ``.metadata`` is a pickle."""

    def build(path):
        for file in (STATE, MANIFEST):
            (path / file).unlink()
        (path / ".metadata").write_bytes(gadgets(canary)["os.system"])
        (path / "__0_0.distcp").write_bytes(gadgets(canary)["eval"])

    return build


PLACES = {
    f"{what} instead of {name}": instead_of(name, make)
    for name in (STATE, MANIFEST)
    for what, make in {
        "a folder": os.mkdir,
        "a pipe": os.mkfifo,
        "nothing": lambda place: None,
        "a link to /etc/passwd": link_to("/etc/passwd"),
        "a link to /dev/zero": link_to("/dev/zero"),
        "a link to itself": lambda place: place.symlink_to(place),
        "a link to nowhere": link_to("/nowhere"),
    }.items()
}
PLACES |= {
    "a link instead of the folder": instead_of(".", link_to(None)),
    "a link to a system folder": instead_of(".", link_to("/etc")),
    "a pipe instead of the folder": instead_of(".", os.mkfifo),
    "a file instead of the folder": instead_of(".", lambda place: place.write_bytes(b"")),
    "a manifest of 1 GB": sparse(MANIFEST, 2**30),
    "a state of 300 MB of nothing": sparse(STATE, 300 * 2**20),
    "manifest nested deeply": with_manifest(b'{"digest":' * 100_000),
    "manifest of 16 MB": with_manifest(b'{"digest": "x", "a": [' + b"{}," * 5_500_000 + b"0]}"),
    "manifest is a list": with_manifest(b"[]"),
    "manifest is a number": with_manifest(b"9" * 5000),
    "manifest is no text": with_manifest(b"\xff\xfe\0\0\xff"),
    "a file outside": with_files(names=["../state.safetensors"]),
    "a file of the system": with_files(names=["/etc/passwd"]),
    "another file too": with_files(names=[STATE, "../../x"]),
    "no file": with_files(names=[]),
    "a newer format": lambda path: sign_again(path, format="2\n" * 10**5),
}


def cases(named):
    """Names of cases, those of many seconds marked."""
    heavy = ("structure of 7 MB", "150,000 tensors", "manifest of 16 MB", "a state of 300 MB of nothing")
    return [pytest.param(name, marks=pytest.mark.slow if name in heavy else ()) for name in named]


def entry_points(run, path):
    modules = nn.ModuleDict({"model": LinearModel()})
    return {
        "load_one": lambda: load_one(path),
        "load_one of the run": lambda: load_one(run),
        "read_own": lambda: read_own(run),
        "plan_weights": lambda: plan_weights(modules, read_own(run)),
        "find_checkpoint": lambda: load_one(find_checkpoint(run, "latest").path),
        "load_encoder": lambda: load_encoder(run),
        "load_newest": lambda: load_newest(run / "checkpoints"),
    }


def report(run, path):
    """What each way of loading does: the error, or None; seconds of the processor; growth of the memory in MB."""
    results = {}
    for name, load in entry_points(run, path).items():
        memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            load()
            error = None
        except (CorruptCheckpoint, CheckpointError, ExportError) as raised:
            error = str(raised) or "?"
        except BaseException as raised:
            error = f"TRACEBACK {raised!r:.300}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        results[name] = error, time.process_time() - begin, grown
    return results


def in_a_child(action):
    """The JSON of what ``action`` returns, from a process of its own that a minute's waiting kills."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(action()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(text)


def check(tmp_path, build, refused=True):
    run = tmp_path / "run"
    path = save_state(make_folder(run / "checkpoints"), GOOD, 1)
    assert all(error is None for name, (error, *_) in report(run, path).items() if name != "load_encoder")
    build(path)
    for name, (error, seconds, grown) in in_a_child(lambda: report(run, path)).items():
        assert not (tmp_path / "canary").exists(), name
        assert "TRACEBACK" not in (error or ""), name
        assert len(error or "") < 1000 and "\n" not in (error or ""), name
        assert error if refused else True, name
        assert seconds < 5 and grown < 1000, (name, seconds, grown)
    assert not (tmp_path / "canary").exists()


def make_folder(path):
    path.mkdir(parents=True)
    return path


NAMES = [*gadgets("x"), *torch_files("x")]


@pytest.mark.parametrize("place", [STATE, MANIFEST])
@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_is_ever_loaded(tmp_path, name, place):
    data = {**gadgets(tmp_path / "canary"), **torch_files(tmp_path / "canary")}[name]
    check(tmp_path, with_state(data) if place == STATE else with_manifest(data))


def test_the_gadgets_do_work_when_they_are_loaded(tmp_path):
    for name, data in gadgets(tmp_path / "canary").items():
        if name != "pty":  # wants a terminal
            pickle.loads(data)
            assert (tmp_path / "canary").exists(), name
            (tmp_path / "canary").unlink()


def test_a_distributed_checkpoint_is_none(tmp_path):
    check(tmp_path, distributed(tmp_path / "canary"))


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(tmp_path, name):
    check(tmp_path, with_state(LIES[name]))


@pytest.mark.parametrize("name", cases(HARMLESS))
def test_an_odd_file_does_no_harm(tmp_path, name):
    check(tmp_path, with_state(HARMLESS[name]), refused=False)


@pytest.mark.parametrize("name", cases(PLACES))
def test_what_is_no_file_of_a_checkpoint_is_refused(tmp_path, name):
    check(tmp_path, PLACES[name])


WRONG = [None, "x", "", [], {}, [[[]]], True, -1, 0.5, 1e400, 10**400, "9" * 5000, {"a": []}, [["a", 1]], [[[], 1]]]


def test_wrong_types_in_every_field_of_a_manifest_are_refused_or_taken_for_the_right_ones(tmp_path):
    path = save_state(tmp_path, GOOD, 1)
    good = read_manifest(path)
    manifest = read_manifest_file(path)
    refused = 0
    for field in manifest.keys() - {"digest"}:
        for value in [*WRONG, *[{STATE: wrong} for wrong in WRONG if field == "files"]]:
            (path / MANIFEST).write_text(json.dumps(manifest))
            sign_again(path, **{field: value})
            try:
                found = read_manifest(path)
            except (CorruptCheckpoint, CheckpointError):
                refused += 1
                continue
            types = [[type(value) for value in one.record] for one in (found, good)]
            types = [[*one[:5], float if one[5] is type(None) else one[5]] for one in types]
            assert types[0] == types[1], (field, value)
            assert all(type(getattr(found, name)) is type(getattr(good, name)) for name in vars(good)), (field, value)
    assert refused > 80
    for field in manifest.keys() - {"digest"}:
        fields = {name: value for name, value in manifest.items() if name != field}
        (path / MANIFEST).write_text(json.dumps(fields))
        with pytest.raises((CorruptCheckpoint, CheckpointError)):
            read_manifest(path)
