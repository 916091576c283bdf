"""Data sets of the user's own, by class_path."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from resuming import RICH, assert_same, outcome, train

from hjepa_engine import load_config
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import build_loader, open_split
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.recipes import pretrain


class Labeled(list):
    classes = ("a", "b")


def items(kind="tuple", size=40, label=1):
    image = {
        "array": np.full((32, 32, 3), 51, np.uint8),
        "tensor": torch.full((3, 32, 32), 0.2),
    }.get(kind, Image.new("RGB", (32, 32), (51, 51, 51)))
    return Labeled([{"dict": {"image": image, "label": label}, "alone": image}.get(kind, (image, label))] * size)


def unlabeled(size=40):
    return list(items(size=size))


def named_splits(split):
    return [np.zeros((32, 32, 3), np.uint8)] * {"train": 30, "val": 10}[split]


def config(name, **values):
    return DataConfig(class_path=f"{__name__}.{name}", batch_size=8, **values)


@pytest.mark.parametrize("kind", ["tuple", "dict", "alone", "array", "tensor"])
def test_items_of_every_kind_give_the_same_pixels(kind):
    data = config("items", init_args={"kind": kind}, mean=[0.0] * 3, std=[1.0] * 3)
    batch = next(iter(build_loader(data, open_split(data, "val"), 0, train=False)))
    torch.testing.assert_close(batch["images"], torch.full_like(batch["images"], 0.2))
    assert set(batch["labels"].tolist()) == {-1 if kind == "alone" else 1}


def test_without_splits_of_its_own_samples_stay_in_their_split_when_others_are_added():
    def held_out(size):
        return open_split(config("items", init_args={"size": size}), "val").images.indices

    assert held_out(40) == [index for index in held_out(80) if index < 40]
    train = open_split(config("items"), "train").images.indices
    assert sorted(train + held_out(40)) == list(range(40))


def test_a_function_that_takes_a_split_is_asked_for_each():
    assert [len(open_split(config("named_splits"), name).images) for name in ("train", "probe", "val")] == [30, 30, 10]


@pytest.mark.parametrize(
    ("name", "init_args", "error", "says"),
    [
        ("missing", {}, ConfigError, "data.class_path: '.*missing' cannot be imported"),
        ("items", {"sise": 3}, ConfigError, "data.init_args: .*sise"),
        ("items", {"size": 0}, DataError, "has no images for the val split"),
        ("config", {"name": "items"}, ConfigError, "must make a data set with __len__ and __getitem__"),
    ],
)
def test_what_cannot_be_opened_is_one_line(name, init_args, error, says):
    with pytest.raises(error, match=says):
        open_split(config(name, init_args=init_args), "val")


def test_a_label_that_is_no_class_is_refused_by_its_sample():
    images = open_split(config("items", init_args={"label": 2}), "train").images
    with pytest.raises(DataError, match=r"the label of sample .* must be from 0 to 1, or -1 for none, got 2"):
        images[0]


def test_a_wrong_label_ends_the_run_and_is_no_damaged_image():
    data = config("items", init_args={"label": 2})
    with pytest.raises(DataError, match=r"the label of sample .* must be from 0 to 1"):
        next(iter(build_loader(data, open_split(data, "train"), 0, train=True)))


class Drawn:
    """Images that are drawn from the global generators when they are asked for."""

    classes = ("a",)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8) + np.random.randint(2), 0


def test_what_a_data_set_draws_for_a_sample_depends_on_seed_epoch_and_index_alone():
    data = config("Drawn")

    def batches(workers, epoch=0):
        loader = build_loader(replace(data, num_workers=workers), open_split(data, "train"), 0, train=True)
        loader.sampler.set_position(epoch)
        return torch.cat([batch["images"] for batch in loader])

    alone = batches(0)
    torch.manual_seed(7)
    assert torch.equal(batches(2), alone) and not torch.equal(batches(0, epoch=1), alone)


def test_the_documented_data_set_can_be_trained_on(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "shapes.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = DataConfig(class_path="shapes.Shapes", batch_size=8)
    assert open_split(data, "val").classes == ("lying", "standing")
    batch = next(iter(build_loader(data, open_split(data, "train"), 0, train=True)))
    assert batch["images"].shape == (8, 3, 32, 32) and not batch["damaged"]
    sys.modules.pop("shapes")


def noise(size=20, split="train"):
    """Images of noise with labels of two classes."""
    generator = np.random.default_rng(size if split == "train" else 0)
    images = generator.integers(0, 256, (size, 24, 24, 3), dtype=np.uint8)
    return Labeled((image, index % 2) for index, image in enumerate(images))


def torchvision_like(classes):
    images = noise()
    images.classes = classes
    return images


def test_a_run_stopped_inside_an_epoch_goes_on_with_the_same_bits(tmp_path):
    values = {**RICH, "data.class_path": f"{__name__}.noise", "training.epochs": 2}
    whole = outcome(train(tmp_path / "whole", values))
    train(tmp_path / "halves", values, stop=7)
    assert_same(outcome(train(tmp_path / "halves", {**values, "data.num_workers": 1})), whole)


def pretrain_on(folder, data, *overrides):
    values = ["training.epochs=1", "training.warmup_epochs=0", "data.in_chans=3", "data.batch_size=8"]
    values += ["probe.epochs=2", "online_probe.every=1", "logging.progress_bar=false", *overrides]
    return pretrain.build(load_config(pretrain.DEFAULT_CONFIG, [f"run_dir={folder}", *values]), data=data)


def test_data_sets_can_be_passed_in_python(tmp_path):
    run = pretrain_on(tmp_path / "run", (noise(24), noise(split="val")))
    results = run.fit()
    assert set(results) == {"trained", "random", "pixels"}
    said = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (said["train"]["images"], said["val"]["images"], said["train"]["classes"]) == (24, 20, ["a", "b"])
    assert load_config(tmp_path / "run" / "config.yaml").data.dataset == "passed"
    with pytest.raises(DataError, match=r"the images are passed in Python, to build\(config, data=\(train, val\)\)"):
        pretrain.build(load_config(tmp_path / "run" / "config.yaml"))


def test_passed_data_are_trained_on_as_those_of_a_class_path_are(tmp_path):
    values = {**RICH, "training.epochs": 1}
    named = outcome(train(tmp_path / "named", {**values, "data.class_path": f"{__name__}.noise"}))
    passed = outcome(train(tmp_path / "passed", values, data=(noise(), noise(split="val"))))
    assert_same(passed, named)


def test_a_subset_has_the_classes_of_the_whole(tmp_path):
    whole = noise(40)
    train, val = torch.utils.data.random_split(whole, [30, 10], torch.Generator().manual_seed(0))
    assert pretrain_on(tmp_path, (train, val)).data.split.classes == ("a", "b")


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (noise(), ConfigError, r"data must be two data sets, \(train, val\)"),
        ((noise(), 3), ConfigError, "data: val must be a data set with __len__ and __getitem__, got 3"),
        ((noise(), []), DataError, "data: val has no images"),
        (
            (noise(), torchvision_like(("a", "c"))),
            DataError,
            "data: val must have the classes of train, a, b, got a, c",
        ),
    ],
)
def test_passed_data_that_cannot_be_used_are_one_line(tmp_path, data, error, says):
    with pytest.raises(error, match=says):
        pretrain_on(tmp_path, data)


def test_other_passed_data_are_refused_by_the_same_run(tmp_path):
    pretrain_on(tmp_path, (noise(24), noise(split="val"))).fit()
    with pytest.raises(DataError, match="train had 24 images, has 25 now"):
        pretrain_on(tmp_path, (noise(25), noise(split="val")), "training.epochs=2").fit()
