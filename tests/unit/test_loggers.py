"""What is logged arrives, whole and once, in every logger's real files; what cannot be logged is refused or survived."""

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import NOISE, ROOT, linear_trainer, options, pretraining, rows, same_bits, tiny_config
from ignite.engine import Events
from torch import nn

from hjepa_engine import TrainEvents
from hjepa_engine.handlers import MetricsLogger, ParameterHistograms, parameter_histograms
from hjepa_engine.loggers import wandb as wandb_writer
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.loggers.media import Histogram, Image, JsonValue, Text
from hjepa_engine.loggers.tensorboard import TensorBoardWriter
from hjepa_engine.loggers.wandb import WandbWriter
from hjepa_engine.utils.imports import block_import


def read_events(folder):
    """Every value in TensorBoard's files: TFRecords of a length, its CRC, an event, its CRC. (step, tag, value)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size, event = int.from_bytes(data[:8], "little"), Event()
            event.ParseFromString(data[12 : 12 + size])
            found += [(event.step, value.tag, value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def read_wandb(path):
    """(run, rows) of W&B's offline file: LevelDB's log format (32 KiB blocks of CRC, length, kind, data) of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, run, history = path.read_bytes(), 7, [], None, []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "run":
                run = record.run
            elif record.WhichOneof("record_type") == "history":
                row = {}
                for item in record.history.item:
                    names, inner = item.nested_key or [item.key], row
                    for name in names[:-1]:
                        inner = inner.setdefault(name, {})
                    inner[names[-1]] = json.loads(item.value_json)
                history.append({name: value for name, value in row.items() if not name.startswith("_")})
    return run, history


def read_lines(path):
    """Records of a file of JSON lines but for their times; a constant that is no JSON is an error."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- One handle, three real loggers, a resume ---------------------------------------------------------------------------

PICTURE = torch.linspace(-0.5, 1.5, 60).reshape(3, 4, 5)
PIXELS = (PICTURE.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
VALUES = torch.tensor([0.0, 1.0, 1.0, 4.0, math.nan, -math.inf])
OBJECT = {"list": [1, None, {"a": []}], "bad": [math.nan, math.inf], "tensor": torch.ones(2), "empty": {}}
PLAIN = {"list": [1, None, {"a": []}], "bad": [None, None], "tensor": [1.0, 1.0], "empty": {}}
SPECTRUM = {"rank": [1, 2], "share": [0.75, 0.25]}


def session(folder, state=None):
    """A logger with all writers; its engine is at step 4, in epoch 2, with the validation of the epochs logged."""
    config = {"seed": 3, "training": {"lr": 0.1}}
    writers = [
        JsonlWriter(folder / "metrics.jsonl"),
        TensorBoardWriter(folder / "tensorboard"),
        WandbWriter(
            folder=folder, config=config, project="proj", name="name", entity="us", tags=["a", "b"], mode="offline"
        ),
    ]
    logger, (trainer, _) = MetricsLogger(writers), linear_trainer(log_frequency=2)
    if state is not None:
        logger.load_state_dict(state)
        return logger
    logger.attach(trainer)

    def window(engine):
        engine.state.metrics["train/loss"] = float(engine.state.optimizer_step)
        engine.state.media["spectrum"] = JsonValue(SPECTRUM)

    def validate(engine):
        engine.state.metrics["val/loss"] = 10.0 * engine.state.epoch
        engine.fire_event(TrainEvents.VALIDATION_COMPLETED)

    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, window)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.run(rows((0, 0), (0, 0)), max_epochs=2)
    return logger


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_writer, "PATIENCE", 100.0)  # the machine may be busy
        folder = log_everything(tmp_path_factory.mktemp("logged"))
    wandb.teardown()  # as at the process's exit: waits until all is written
    return folder


def log_everything(folder):
    """Two sessions, of which the second goes on from the state of the first; their folder."""
    logger = session(folder)
    logger.log_metrics({"linear": 0.5, "worst": torch.tensor(math.nan)}, prefix="probe/")
    logger.log_metrics({"early": 1}, step=1)
    logger.log_system_metrics({"load": np.float32(0.25)})
    logger.log_image("pictures/noise", PICTURE)
    logger.log_histogram("values", VALUES, bins=4)
    logger.log_text("note", "a < b\n*c*")
    logger.log_object("thing", OBJECT, step=np.int64(2))
    state = json.loads(json.dumps(logger.state_dict()))
    logger.log_metrics({"after the checkpoint": 1.0}, step=9)
    logger.close()
    logger = session(folder, state)
    logger.log_metrics({"later": 2.0}, step=5)
    logger.close()
    return folder


def test_json_lines_hold_everything_once(logged):
    image, histogram = (
        "media/pictures_noise_00000004.png",
        {"counts": [1, 2, 0, 1], "edges": [0, 1, 2, 3, 4], "non_finite": 2},
    )
    assert read_lines(logged / "metrics.jsonl") == [
        {"step": 2, "epoch": 1, "train/loss": 2.0},
        {"step": 2, "epoch": 1, "spectrum": SPECTRUM},
        {"step": 2, "epoch": 1, "val/loss": 10.0},
        {"step": 4, "epoch": 2, "train/loss": 4.0},
        {"step": 4, "epoch": 2, "spectrum": SPECTRUM},
        {"step": 4, "epoch": 2, "val/loss": 20.0},
        {"step": 4, "epoch": 2, "probe/linear": 0.5, "probe/worst": None},
        {"step": 1, "epoch": 2, "early": 1.0},
        {"step": 4, "epoch": 2, "system/load": 0.25},
        {"step": 4, "epoch": 2, "pictures/noise": image},
        {"step": 4, "epoch": 2, "values": histogram},
        {"step": 4, "epoch": 2, "note": "a < b\n*c*"},
        {"step": 2, "epoch": 2, "thing": PLAIN},
        {"step": 5, "epoch": 0, "later": 2.0},
    ]
    assert np.array_equal(np.array(PIL.Image.open(logged / image)), PIXELS)


def test_event_files_hold_everything(logged):
    events = read_events(logged / "tensorboard")
    scalars = [
        (step, tag, value.simple_value) for step, tag, value in events if value.WhichOneof("value") == "simple_value"
    ]
    assert [entry for entry in scalars if entry[1] != "probe/worst"] == [
        (2, "train/loss", 2.0),
        (2, "val/loss", 10.0),
        (4, "train/loss", 4.0),
        (4, "val/loss", 20.0),
        (4, "probe/linear", 0.5),
        (1, "early", 1.0),
        (4, "system/load", 0.25),
        (9, "after_the_checkpoint", 1.0),
        (5, "later", 2.0),
    ]
    assert [(step, math.isnan(value)) for step, tag, value in scalars if tag == "probe/worst"] == [(4, True)]
    others = {tag: (step, value) for step, tag, value in events if value.WhichOneof("value") != "simple_value"}
    assert {tag: step for tag, (step, _) in others.items()} == {
        "spectrum/text_summary": 4,
        "pictures/noise": 4,
        "values": 4,
        "note/text_summary": 4,
        "thing/text_summary": 2,
    }
    picture, histogram = others["pictures/noise"][1].image, others["values"][1].histo
    (logged / "shown.png").write_bytes(picture.encoded_image_string)
    assert (picture.height, picture.width) == (4, 5)
    assert np.array_equal(np.array(PIL.Image.open(logged / "shown.png")), PIXELS)
    assert (list(histogram.bucket), list(histogram.bucket_limit)) == ([1, 2, 0, 1], [1, 2, 3, 4])
    # Middles of bins are 0.5, 1.5, 1.5 and 3.5.
    assert (histogram.min, histogram.max, histogram.num) == (0, 4, 4)
    assert (histogram.sum, histogram.sum_squares) == (7.0, 0.25 + 2 * 2.25 + 12.25)
    note, thing = (others[f"{name}/text_summary"][1].tensor.string_val[0].decode() for name in ("note", "thing"))
    assert note == "a < b\n*c*"
    assert thing.startswith("    ") and json.loads(thing) == PLAIN


def test_weights_and_biases_files_hold_everything_in_one_run(logged):
    second, first = sorted(logged.glob("wandb/offline-run-*/*.wandb"), key=lambda path: len(read_wandb(path)[1]))
    (run, history), (resumed, rest) = read_wandb(first), read_wandb(second)
    assert (run.entity, run.project, run.display_name, list(run.tags)) == ("us", "proj", "name", ["a", "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["seed"], config["training"]) == (3, {"lr": 0.1})
    assert (resumed.run_id, resumed.project) == (run.run_id, "proj") and len(run.run_id) == 8
    media = [row for row in history if {"pictures/noise", "note"} & row.keys()]
    rows = [row for row in history if row not in media]
    assert math.isnan(float(rows[6].pop("probe/worst")))
    assert rows == [
        {"step": 2, "epoch": 1, "train/loss": 2},
        {"step": 2, "epoch": 1, "spectrum": SPECTRUM},
        {"step": 2, "epoch": 1, "val/loss": 10},
        {"step": 4, "epoch": 2, "train/loss": 4},
        {"step": 4, "epoch": 2, "spectrum": SPECTRUM},
        {"step": 4, "epoch": 2, "val/loss": 20},
        {"step": 4, "epoch": 2, "probe/linear": 0.5},
        {"step": 1, "epoch": 2, "early": 1},
        {"step": 4, "epoch": 2, "system/load": 0.25},
        {"step": 4, "epoch": 2, "values": {"_type": "histogram", "values": [1, 2, 0, 1], "bins": [0, 1, 2, 3, 4]}},
        {"step": 2, "epoch": 2, "thing": json.dumps(PLAIN)},  # W&B itself would lose its empty mapping
        {"step": 9, "epoch": 2, "after the checkpoint": 1},
    ]
    picture, note = media[0]["pictures/noise"], media[1]["note"]
    assert [(row["step"], row["epoch"]) for row in media] == [(4, 2), (4, 2)]
    assert picture["_type"] == "image-file" and note["_type"] == "html-file"
    assert np.array_equal(np.array(PIL.Image.open(first.parent / "files" / picture["path"])), PIXELS)
    assert "a &lt; b\n*c*</pre>" in (first.parent / "files" / note["path"]).read_text()
    assert rest == [{"step": 5, "epoch": 0, "later": 2}]


def test_going_back_in_a_running_process_cuts_off_what_came_later(tmp_path):
    writers = [JsonlWriter(tmp_path / "metrics.jsonl"), TensorBoardWriter(tmp_path)]
    logger = MetricsLogger(writers)
    logger.log_metrics({"a": 1.0}, step=4)
    state = json.loads(json.dumps(logger.state_dict()))
    for round_ in range(3):
        logger.log_metrics({"a": 2.0 + round_}, step=5)
        if round_ < 2:
            logger.load_state_dict(state)
    logger.close()
    assert [(line["step"], line["a"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [(4, 1.0), (5, 4.0)]
    assert [(step, value.simple_value) for step, _, value in read_events(tmp_path)] == [(4, 1), (5, 2), (5, 3), (5, 4)]


# --- What is refused, by one error to whoever asked ---------------------------------------------------------------------


class Memory:
    """A writer that remembers, or fails where it is told to."""

    def __init__(self, fails_in=""):
        self.fails_in, self.records, self.states = fails_in, [], []

    def act(self, place):
        if place == self.fails_in:
            raise ConnectionError

    def open(self, state):
        self.states.append(state)
        self.act("open")

    def write(self, metrics, step, epoch):
        self.act("write")
        self.records.append((dict(metrics), step))

    def write_media(self, media, step, epoch):
        self.act("write_media")
        self.records.append((dict(media), step))

    def close(self):
        self.act("close")

    def state_dict(self):
        return {"records": len(self.records)}


NO_NAME = "a logged name must be a string that begins with a letter, and not step, epoch, time, got "
REFUSED = [
    (lambda log: log.log_metrics({"": 1.0}), NO_NAME + "''"),
    (lambda log: log.log_metrics({3: 1.0, "good": 1.0}), None),
    (lambda log: log.log_metrics({"step": 1.0}), NO_NAME + "'step'"),
    (lambda log: log.log_text("epoch", "x"), NO_NAME + "'epoch'"),
    (lambda log: log.log_image("../../x", PICTURE), NO_NAME + "'../../x'"),
    (lambda log: log.log_object("_step", 1), NO_NAME + "'_step'"),
    (lambda log: log.log_text("two\nlines", "x"), NO_NAME + r"'two\nlines'"),
    (lambda log: log.log_metrics({"x": "fast"}), "metric 'x' must be a number, or a tensor of one, got 'fast'"),
    (lambda log: log.log_metrics({"x": None}), "metric 'x' must be a number, or a tensor of one, got None"),
    (
        lambda log: log.log_metrics({"x": torch.ones(2, 3)}),
        "metric 'x' must be a number, or a tensor of one, got Tensor (2, 3)",
    ),
    (lambda log: log.log_metrics({"x": 1.0}, step=1.5), "step must be an integer of at least 0, or None, got 1.5"),
    (lambda log: log.log_metrics({"x": 1.0}, step=-1), "step must be an integer of at least 0, or None, got -1"),
    (
        lambda log: log.log_image("x", torch.ones(8, 8, 3)),
        "an image must be (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3, got (8, 8, 3)",
    ),
    (
        lambda log: log.log_image("x", np.zeros((2, 3, 8, 8))),
        "an image must be (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3, got (2, 3, 8, 8)",
    ),
    (
        lambda log: log.log_image("x", torch.zeros(8, 8).long()),
        "an image must be uint8, or floats from 0 to 1, got int64",
    ),
    (
        lambda log: log.log_image("x", "x.png"),
        "an image must be (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3, got ()",
    ),
    (lambda log: log.log_histogram("x", torch.ones(3), bins=0), "bins must be from 1 to 512, got 0"),
    (
        lambda log: log.log_histogram("x", torch.ones(3) * 1j),
        "a histogram must be of real numbers, got torch.complex64",
    ),
    (lambda log: log.log_text("x", b"bytes"), "a text must be a string, got bytes"),
    (
        lambda log: log.log_object("x", {"a": {1, 2}}),
        "an object must be what JSON can hold: set is none of dict, list, number, string, None, tensor",
    ),
]


@pytest.mark.parametrize(("action", "says"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_logged_is_one_error_and_no_writer_sees_it(caplog, action, says):
    memory = Memory()
    logger = MetricsLogger([memory])
    with pytest.raises((ValueError, TypeError)) as caught:
        action(logger)
    assert says is None or str(caught.value) == says
    assert memory.states == [] and warnings_of(caplog) == []


def test_a_handlers_wrong_medium_is_an_error_that_names_it_and_no_writers_failure(caplog):
    trainer, _ = linear_trainer()
    logger = MetricsLogger([Memory()])
    logger.attach(trainer)
    trainer.add_event_handler(
        TrainEvents.LOG_INTERVAL_COMPLETED, lambda engine: engine.state.media.update({"x": torch.ones(2)})
    )
    with pytest.raises(TypeError, match=r"^state.media\['x'\] must be an Image, .* or JsonValue of .*, got Tensor$"):
        trainer.run(rows((0, 0)))
    assert not [line for line in warnings_of(caplog) if "is off" in line]


def test_a_closed_logger_says_so(tmp_path):
    logger = MetricsLogger([JsonlWriter(tmp_path / "metrics.jsonl")])
    logger.log_metrics({"a": 1.0})
    logger.close()
    with pytest.raises(RuntimeError, match="the run has ended and its loggers are closed: log before that"):
        logger.log_metrics({"b": 1.0})
    assert [record["a"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1.0]


# --- What fails, and is survived ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["open", "write", "write_media", "close"])
def test_a_writer_that_fails_is_named_once_and_the_others_get_everything(caplog, place):
    first, bad, last = Memory(), Memory(place), Memory()
    logger = MetricsLogger([first, bad, last])
    for step in (1, 2):
        logger.log_metrics({"a": 1.0}, step)
        logger.log_text("b", "c", step)
    logger.close()
    expected = [({"a": 1.0}, 1), ({"b": Text("c")}, 1), ({"a": 1.0}, 2), ({"b": Text("c")}, 2)]
    assert first.records == last.records == expected
    assert warnings_of(caplog) == ["Memory failed and is off from now on: ConnectionError"]


def test_a_writer_that_has_failed_with_the_metrics_gets_no_media(caplog):
    bad, (trainer, _) = Memory("write"), linear_trainer()
    MetricsLogger([bad]).attach(trainer)

    def measure(engine):
        engine.state.metrics["a"], engine.state.media["b"] = 1.0, Text("c")

    trainer.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, measure)
    trainer.run(rows((0, 0), (0, 0)))
    assert bad.records == [] and warnings_of(caplog) == ["Memory failed and is off from now on: ConnectionError"]


def test_each_of_several_writers_goes_on_from_its_own_state_also_where_it_could_not_be_opened(caplog):
    states = {"Memory": {"records": 5}, "Memory 2": {"records": 7}, "Memory 3": {"records": 9}}
    writers = [Memory(), Memory("open"), Memory("write")]
    logger = MetricsLogger(writers)
    logger.load_state_dict({"seen": 0, "writers": states})
    logger.log_metrics({"a": 1.0})
    assert [writer.states for writer in writers] == [[state] for state in states.values()]
    # What one that was never opened says of itself would make the next process start its file anew.
    assert logger.state_dict()["writers"] == {
        "Memory": {"records": 1},
        "Memory 2": {"records": 7},
        "Memory 3": {"records": 0},
    }


def test_an_image_that_the_disk_does_not_take_costs_the_image_and_nothing_else(tmp_path, caplog):
    logger = MetricsLogger([JsonlWriter(tmp_path / "metrics.jsonl")])
    (tmp_path / "media").mkdir()
    for step in (1, 2, 4):
        (tmp_path / "media" / f"x_{step:08d}.png").symlink_to("/dev/full")
    for step in range(1, 5):
        logger.log_image("x", torch.rand(8, 8), step)
        logger.log_metrics({"a": 1.0}, step)
    logger.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["x"] for line in lines if "x" in line] == [None, None, "media/x_00000003.png", None]
    assert [line["step"] for line in lines if "a" in line] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "media").iterdir()] == ["x_00000003.png"]
    lost = "cannot be written: No space left on device; images are lost as long as that is so"
    assert warnings_of(caplog) == [f"{tmp_path}/media/x_{step:08d}.png {lost}" for step in (1, 4)]


def test_a_disk_that_fills_up_costs_the_event_file_one_warning_and_nothing_else(tmp_path, caplog):
    (tmp_path / "full").mkdir()
    first, last = TensorBoardWriter(tmp_path / "full"), Memory()
    logger = MetricsLogger([first, last])
    logger.log_metrics({"a": 1.0}, 1)
    (file,) = (tmp_path / "full").iterdir()
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.readlink() == file:
                os.dup2(full, int(descriptor.name))
    os.close(full)
    for step in (2, 3):
        logger.log_image("noise", torch.rand(300, 300), step)  # larger than any buffer
    logger.close()
    assert [step for _, step in last.records] == [1, 2, 3]
    assert warnings_of(caplog) == [
        "TensorBoardWriter failed and is off from now on: [Errno 28] No space left on device"
    ]


def test_event_files_are_flushed_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hjepa_engine.loggers.tensorboard.time.monotonic", lambda: now[0])
    logger = MetricsLogger([TensorBoardWriter(tmp_path)])
    seen = []
    for seconds in (100.0, 110.0, 120.0, 131.0):
        now[0] = seconds
        logger.log_metrics({"a": seconds})
        seen.append(len(read_events(tmp_path)))
    logger.close()
    assert seen == [1, 1, 1, 4]


# --- What is logged -----------------------------------------------------------------------------------------------------


def test_pictures_of_all_shapes_and_types_are_the_same_pixels():
    gray = np.array([[0, 51, 255]], np.uint8)
    expected = np.repeat(gray[..., None], 3, axis=-1)
    for image in (
        gray,
        gray[..., None],
        expected,
        gray / 255,
        torch.tensor(gray),
        torch.tensor(gray)[None],
        torch.tensor(expected).permute(2, 0, 1),
        torch.tensor(gray / 255, dtype=torch.float16, requires_grad=True),
        torch.tensor(gray / 255, dtype=torch.bfloat16),
        np.array([[math.nan, 0.2, math.inf]]),
    ):
        assert np.array_equal(Image.of(image).pixels, expected), image
    assert np.array_equal(Image.of(gray > 100).pixels[0, :, 0], [0, 0, 255])


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=5000),
        np.random.default_rng(1).normal(size=500).astype(np.float32) * 1e-20,
        np.arange(10),
        np.arange(65) / 64,  # every value on an edge
        np.array([1e30, 1.0, -1e30]),
    ],
)
def test_a_histogram_is_numpys(values):
    found = Histogram.of(torch.tensor(values), bins=32)
    assert np.allclose(found.edges, np.histogram(values, 32)[1], rtol=1e-12)
    assert found.counts == tuple(np.histogram(values, np.array(found.edges))[0]) and found.non_finite == 0


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([], -0.5, 0.5), ([3, 3], 1.5, 4.5), ([-1e-30], -0.5, 0.5), ([math.nan], -0.5, 0.5), ([1, 1 + 2**-52], 0.5, 1.5)],
)
def test_a_histogram_of_nothing_or_one_value_has_bins_around_it(values, low, high):
    found = Histogram.of(np.array(values, dtype=np.float64), bins=8)
    assert (found.edges[0], found.edges[-1]) == pytest.approx((low, high))
    assert sum(found.counts) + found.non_finite == len(values)


def test_a_histogram_survives_the_largest_numbers():
    most = np.finfo(np.float64).max
    for values in ([-most, most], [most, most], [0.0, 5e-324]):
        found = Histogram.of(np.array(values))
        assert sum(found.counts) == 2 and all(map(math.isfinite, found.edges))


@pytest.mark.parametrize(
    ("counts", "edges"),
    [((), (0.0,)), ((1,), (0.0,)), ((1,), (0.0, 0.0)), ((1,), (0.0, math.inf)), ((1,) * 513, range(514))],
)
def test_a_histogram_made_by_hand_must_be_one(counts, edges):
    with pytest.raises(ValueError, match="histogram"):
        Histogram(counts, tuple(edges))


def test_an_object_is_a_copy_that_json_can_hold():
    inner = [1, math.nan, np.float32(0.5)]
    thing = JsonValue({"a": inner, 2: (True, None, "text")})
    inner.clear()
    assert thing.value == {"a": [1, None, 0.5], "2": [True, None, "text"]}
    inner.append(inner)
    with pytest.raises(TypeError, match="an object must be what JSON can hold: Circular reference detected"):
        JsonValue(inner)
    assert Text("half a \ud83d pair").text == "half a ? pair"


# --- Histograms of gradients and parameters -----------------------------------------------------------------------------


def watched(handler, batches, epochs=1, wrap=lambda modules: None, **arguments):
    """Media by step, as they are when metrics are ready."""
    trainer, _ = linear_trainer(**arguments)
    wrap(trainer.modules)
    seen = {}

    def look(engine):
        if engine.state.media:
            seen[engine.state.optimizer_step] = engine.state.media
            engine.state.media = {}

    handler.attach(trainer)
    trainer.add_event_handler(TrainEvents.METRICS_READY, look)
    trainer.run(rows(*batches), max_epochs=epochs)
    return seen


def test_gradients_are_those_before_clipping_and_parameters_those_after_the_step():
    # The mean of a window's two rows is its gradient, of length 5; clipped to 1 it is a fifth of that.
    batches = [(0, 0), (0, 0), (2, 8), (4, 0), (0, 0), (0, 0), (-6, 0), (0, -8)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = watched(ParameterHistograms("all", every=2), batches, accumulation_steps=2, clip_grad=1.0, scaler=scaler)
    assert seen.keys() == {2, 4}
    for step, gradient, weight in ((2, (3, 4), (0.4, 0.2)), (4, (-4, -3), (1.0, 1.0 - 0.8 + 0.6))):
        assert seen[step].keys() == {"gradients/model.weight", "parameters/model.weight"}
        found = seen[step]["gradients/model.weight"]
        assert (found.edges[0], found.edges[-1], sum(found.counts)) == (min(gradient), max(gradient), 2)
        if step == 2:
            found = seen[step]["parameters/model.weight"]
            assert (found.edges[0], found.edges[-1]) == pytest.approx((min(weight), max(weight)), abs=1e-5)
            assert found.counts[0] == found.counts[-1] == 1


@pytest.mark.parametrize(("watch", "groups"), [("gradients", {"gradients"}), ("parameters", {"parameters"})])
def test_one_of_both_may_be_watched_and_wrapped_modules_keep_their_names(watch, groups):
    def wrap(modules):
        modules["model"] = nn.DataParallel(modules["model"])
        modules["twin"] = modules["model"]  # shared weights count once
        modules["frozen"] = nn.Linear(1, 1).requires_grad_(False)

    seen = watched(ParameterHistograms(watch, every=1), [(1, 3)], wrap=wrap)
    assert seen[1].keys() == {f"{group}/model.weight" for group in groups}


def test_a_skipped_update_is_not_written_and_comes_with_the_next():
    trainer, _ = linear_trainer()
    seen = []
    ParameterHistograms("all", every=2).attach(trainer)

    def skip(engine):
        engine.state.skip_update = engine.state.iteration in (2, 3, 5)

    def look(engine):
        state = engine.state
        seen.extend(
            (state.iteration, state.optimizer_step, item.edges[0])
            for name, item in state.media.items()
            if "grad" in name
        )
        state.media = {}

    trainer.add_event_handler(TrainEvents.GRADIENTS_READY, skip)
    trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, look)
    trainer.run(rows(*[(place, 9) for place in range(1, 4)]), max_epochs=2)
    assert seen == [(4, 2, 1.0)]  # neither the skipped second and third, nor the window that the fifth ends


def test_watching_changes_no_bit_and_other_ranks_do_nothing(monkeypatch):
    config = tiny_config(logging__log_frequency=2)
    alone = pretraining(config).run().weights
    run = pretraining(config, extra=[ParameterHistograms("all", every=4)])
    sizes = []
    run.trainer.add_event_handler(
        TrainEvents.LOG_INTERVAL_COMPLETED, lambda engine: sizes.append(len(engine.state.media))
    )
    assert same_bits(run.run().weights, alone)
    parameters = [p for p in run.trainer.modules.parameters() if p.requires_grad]
    assert max(sizes) == 2 * len(parameters)
    monkeypatch.setattr(parameter_histograms, "rank", lambda: 1)
    assert watched(ParameterHistograms("all", every=1), [(1, 3)]) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every": 3}, r"every must be a multiple of log_frequency \(2\), got 3"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"watch": "none"}, "watch must be gradients, parameters, all, got 'none'"),
    ],
)
def test_watching_in_the_wrong_way_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        ParameterHistograms(**arguments).attach(linear_trainer(log_frequency=2)[0])


# --- Packages -----------------------------------------------------------------------------------------------------------


def test_a_hidden_module_cannot_be_imported_unless_it_is_there_already():
    import_name = "this_module_is_not_there"
    for name in (import_name, "antigravity"):
        with block_import(name), pytest.raises(ImportError):
            __import__(name)
        assert name not in sys.modules
    with block_import("json"):
        import json as same
    assert same is json and sys.modules["json"] is json
    with pytest.raises(RuntimeError), block_import("antigravity"):
        raise RuntimeError
    assert "antigravity" not in sys.modules


def test_with_every_logger_off_none_of_their_packages_is_imported(tmp_path):
    off = {**NOISE, "probe.enabled": "false", "pictures.enabled": "false", "training.epochs": 1}
    on = {"logging.wandb.enabled": "true", "logging.tensorboard.enabled": "true", "logging.log_frequency": 1}
    script = """
        import ast, sys
        from hjepa_engine.loggers import wandb as wandb_writer
        from hjepa_engine.recipes import pretrain

        wandb_writer.PATIENCE = 100.0
        names = ("wandb", "tensorboardX", "tensorboard", "matplotlib", "torch.utils.tensorboard")
        for words in ast.literal_eval(sys.argv[1]):
            pretrain.main(words)
            print("imported:", *(name for name in names if name in sys.modules))
    """
    runs = [options({**off, "run_dir": "off"}), options({**off, **on, "run_dir": "on"})]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), repr(runs)],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert lines == [[], ["wandb", "tensorboardX"]], done.stdout
    assert not [name for name in ("wandb", "tensorboard") if (tmp_path / "off" / name).exists()]
    (path,) = (tmp_path / "on" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = read_wandb(path)[1]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 1 + len(steps))) and any("val/loss" in row for row in rows)
    scalars = [(step, tag) for step, tag, _ in read_events(tmp_path / "on" / "tensorboard")]
    assert [step for step, tag in scalars if tag == "train/loss"] == steps
    assert [step for step, tag in scalars if tag == "val/loss"] == steps[-1:]


# --- Documentation ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny = {**NOISE, "probe.enabled": "false", "run_dir": "run"}
    assert program.count('load_config("my_run.yaml")') == 1
    exec(program.replace('load_config("my_run.yaml")', f"load_config(None, {options(tiny)!r})"), {})
    names = {name for line in read_lines(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert names >= set(re.findall(r'"(mine/[a-z_]+)"', program)) != set()
