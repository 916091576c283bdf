"""Which data a run was trained on: its description, what differs, and going on with more of it."""

import json
import shutil

import pytest
from helpers import NOISE, logged, options, same_bits
from ignite.engine import Events
from PIL import Image
from resuming import assert_same, outcome, train

from hjepa_engine import load_config
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.data import describe
from hjepa_engine.data.contents import data_changes, fingerprint_folders
from hjepa_engine.data.split import Contents, DatasetSplit
from hjepa_engine.errors import DataError
from hjepa_engine.recipes import pretrain
from hjepa_engine.recipes.common.run import run_to_end
from hjepa_engine.schedules import CosineScheduler


def split(images, folders, classes=("cat", "dog")):
    return DatasetSplit(range(images), classes, ((0.5,), (0.25,)), contents=Contents(folders))


OLD = describe(split(80, {"cat": (40, "a"), "dog": (40, "b")}), split(20, {"cat": (10, "c"), "dog": (10, "d")}))


@pytest.mark.parametrize(
    ("train_folders", "val_folders", "said", "growth"),
    [
        ({"cat": (50, "x"), "dog": (40, "b")}, None, ["train/cat had 40 images, has 50 now"], True),
        ({"cat": (39, "x"), "dog": (40, "b")}, None, ["train/cat had 40 images, has 39 now"], False),
        (None, {"cat": (10, "c"), "dog": (10, "x")}, ["val/dog: other files than before"], False),
        ({"cat": (40, "a")}, None, ["train/dog (40 images) is gone"], False),
        (
            {"cat": (40, "a"), "dog": (40, "b"), "eel": (1, "e")},
            None,
            ["train/eel (1 image) is new"],
            True,
        ),
        (None, None, [], True),
    ],
)
def test_every_difference_is_named_and_says_whether_there_only_is_more(train_folders, val_folders, said, growth):
    train_folders = train_folders or {"cat": (40, "a"), "dog": (40, "b")}
    val_folders = val_folders or {"cat": (10, "c"), "dog": (10, "d")}
    now = describe(
        split(sum(count for count, _ in train_folders.values()), train_folders, tuple(train_folders)),
        split(20, val_folders),
    )
    changes = data_changes(json.loads(json.dumps(OLD)), now)
    assert [str(change) for change in changes] == said
    assert all(change.is_growth for change in changes) == growth


def test_without_folders_the_number_of_images_and_the_classes_count():
    def change(train):
        return list(map(str, data_changes(describe(split(80, {}), split(20, {})), describe(train, split(20, {})))))

    assert change(split(90, {})) == ["train had 80 images, has 90 now"]
    assert change(split(80, {}, ("cat", "eel"))) == ["train: the classes are others than before"]
    assert change(split(80, {})) == []


def test_a_fingerprint_is_of_paths_and_sizes_in_any_order():
    files = [("cat/1.png", 10), ("cat/2.png", 20), ("dog/deep/1.png", 30), ("top.png", 1)]
    found = fingerprint_folders(files)
    assert {name: count for name, (count, _) in found.items()} == {".": 1, "cat": 2, "dog": 1}
    assert fingerprint_folders(reversed(files)) == found
    assert fingerprint_folders([("cat/1.png", 11), *files[1:]])["cat"] != found["cat"]
    assert fingerprint_folders([("cat/3.png", 10), *files[1:]])["cat"] != found["cat"]


# A real folder of images


def add_images(root, start, number):
    for index in range(start, start + number):
        for name in ("train", "val"):
            path = root / name / f"class{index % 2}" / f"{index}.png"
            if name == "train" or start == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (24, 24), (7 * index % 256, 3, 5)).save(path)


@pytest.fixture
def values(tmp_path):
    add_images(tmp_path / "images", 0, 8)
    return {
        **NOISE,
        "data.dataset": "imagefolder",
        "data.data_path": str(tmp_path / "images"),
        "data.batch_size": 4,
        "training.epochs": 4,
        "checkpoint.keep_last_n": 9,
        "logging.log_frequency": 1,
        "probe.enabled": "false",
    }


def test_a_run_writes_its_data_into_its_folder_and_each_checkpoint(tmp_path, values):
    train(tmp_path / "run", {**values, "training.epochs": 1})
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["train"]["images"] == 8 and data["train"]["classes"] == ["class0", "class1"]
    assert data["train"]["folders"]["class0"][0] == 4 and len(data["val"]["fingerprint"]) == 32
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].data == data


def test_a_stopped_run_refuses_other_data_and_takes_the_same_at_another_place(tmp_path, values):
    train(tmp_path / "run", values, stop=3)
    (tmp_path / "images").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    add_images(tmp_path / "other", 8, 4)
    before = (tmp_path / "run" / "data.json").read_text()
    with pytest.raises(
        DataError, match=r"other data: train/class0 had 4 images, has 6 now; train/class1 .*allow_growth"
    ):
        train(tmp_path / "run", {**values, "data.data_path": tmp_path / "other"})
    assert (tmp_path / "run" / "data.json").read_text() == before
    run = train(tmp_path / "run", {**values, "data.data_path": tmp_path / "moved"})
    assert run.trainer.state.iteration == 8


def test_a_finished_run_compares_its_data_before_it_shows_old_figures(tmp_path, values, capsys):
    config = load_config(None, options({**values, "training.epochs": 1, "run_dir": tmp_path / "run"}))
    run_to_end(config, pretrain.build)
    run_to_end(config, pretrain.build)
    assert "was finished already" in capsys.readouterr().out
    (tmp_path / "images" / "val" / "class0" / "0.png").write_bytes(b"other")
    with pytest.raises(
        DataError, match=r"run holds a run with other data: val/class0: other files than before; choose"
    ):
        run_to_end(config, pretrain.build)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(
        DataError, match=r"a finished run whose data cannot be compared: data\.data_path .* does not exist"
    ):
        run_to_end(config, pretrain.build)


def test_grown_data_goes_on_from_an_epochs_end_on_the_clock_of_longer_epochs(tmp_path, values, capsys):
    train(tmp_path / "run", {**values, "training.max_iters": 4})  # 2 of 4 epochs of 2 steps
    add_images(tmp_path / "images", 8, 4)
    grown = {**values, "data.allow_growth": "true"}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    whole = train(tmp_path / "run", grown)
    out = capsys.readouterr().out
    assert "the data has grown: train/class0 had 4 images, has 6 now; train/class1 had 4 images, has 6 now" in out
    assert "epoch 3 starts at step 6 instead of 4, an epoch has 3 steps instead of 2; schedules follow" in out
    assert whole.trainer.state.iteration == whole.trainer.state.optimizer_step == 12
    schedule = CosineScheduler(1e-3, 1e-6, epochs=4, steps_per_epoch=3, warmup_epochs=1)
    rates = {line["step"]: line["train/lr"] for line in logged(tmp_path / "run") if "train/lr" in line}
    assert {step: rates[step] for step in range(7, 13)} == {step: schedule(step - 1) for step in range(7, 13)}
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["images"] == 12

    train(tmp_path / "again", grown, stop=8)
    assert_same(outcome(train(tmp_path / "again", values)), outcome(whole))  # the same data as its checkpoint's by now


def test_grown_data_is_refused_inside_an_epoch(tmp_path, values):
    train(tmp_path / "run", values, stop=3)
    add_images(tmp_path / "images", 8, 4)
    with pytest.raises(DataError, match=r"data.allow_growth: .*epoch_0001_step_00000003 is inside epoch 2, and grown"):
        train(tmp_path / "run", {**values, "data.allow_growth": "true"})
    start = tmp_path / "run" / "checkpoints" / "epoch_0001_step_00000002"
    run = train(tmp_path / "new", {**values, "data.allow_growth": "true", "checkpoint.resume": str(start)})
    assert run.trainer.state.iteration == 12


class WrongUntilRolledBack:
    """A metric that is wrong from iteration 5 on until the run is rolled back."""

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def write(self, engine):
        rollbacks = engine.stateful_handlers()["CollapseGuard"].rollbacks
        engine.state.metrics["mine"] = float(engine.state.iteration >= 5 and not rollbacks)


def test_a_rollback_to_before_the_data_had_grown_goes_on_as_a_resume_from_there_does(tmp_path, values, capsys):
    rule = "[{metric: mine, above: 0.5, readings: 3, action: rollback}]"
    values = {**values, "guard.rules": rule, "guard.lr_factor": 1.0}
    train(tmp_path / "run", {**values, "training.max_iters": 6}, [WrongUntilRolledBack])  # 3 epochs of 2 steps, 2 wrong
    add_images(tmp_path / "images", 8, 4)
    grown = {**values, "data.allow_growth": "true"}
    start = shutil.copytree(tmp_path / "run" / "checkpoints" / "epoch_0002_step_00000004", tmp_path / "start")
    resumed = train(tmp_path / "resumed", {**grown, "checkpoint.resume": str(start)})
    capsys.readouterr()
    run = train(tmp_path / "run", grown, [WrongUntilRolledBack])
    clock = "epoch 3 starts at step 6 instead of 4, an epoch has 3 steps instead of 2; schedules follow"
    assert clock in capsys.readouterr().out
    assert (run.guard.rollbacks, run.trainer.state.iteration, run.trainer.state.optimizer_step) == (1, 12, 12)
    one, other = outcome(run), outcome(resumed)
    assert same_bits(one[1], other[1])
    rates = [{line["step"]: line["train/lr"] for line in found[2] if "train/lr" in line} for found in (one, other)]
    assert {step: rates[0][step] for step in range(7, 13)} == {step: rates[1][step] for step in range(7, 13)}
    # What followed epoch 2 was forgotten: the end of epoch 3 was at iteration 6 as well, when epochs were shorter.
    records = [checkpoint.record for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert [(record.epoch, record.iteration) for record in records] == [(4, 12), (3, 9), (2, 6), (2, 4), (1, 2)]
