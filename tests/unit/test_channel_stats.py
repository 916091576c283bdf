"""Mean and standard deviation of the channels: given, the data set's own, or measured."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_config
from PIL import Image

from hjepa_engine import load_config
from hjepa_engine.config.schema import Config, DataConfig
from hjepa_engine.data import DatasetSplit, open_split
from hjepa_engine.data.channel_stats import measure_stats
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.recipes.pretrain import build


class Pictures(list):
    def __getitem__(self, index):
        return super().__getitem__(index), 0


def split(*images):
    return DatasetSplit(Pictures(images), ("a",), ((), ()))


def test_the_mean_and_deviation_of_known_pixels():
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = (255, 51, 7)
    mean, std = measure_stats(DataConfig(dataset="fake", image_size=4), split(half, half), 0)
    assert mean == (0.5, 0.1, round(7 / 255 / 2, 6))
    assert std == (0.5, 0.1, round(7 / 255 / 2, 6))


def test_a_constant_channel_is_not_scaled():
    flat = np.full((4, 4, 3), 51, np.uint8)
    assert measure_stats(DataConfig(dataset="fake", image_size=4), split(flat), 0) == ((0.2,) * 3, (1.0,) * 3)


def test_damaged_images_are_left_out_and_nothing_readable_is_a_data_error():
    good, bad = np.full((4, 4, 3), 51, np.uint8), np.zeros((4, 4, 2), np.uint8)
    config = DataConfig(dataset="fake", image_size=4)
    assert measure_stats(config, split(bad, good), 0)[0] == (0.2,) * 3
    with pytest.raises(DataError, match=r"no image could be read to measure data.mean and data.std, .*: 2 bands"):
        measure_stats(config, split(bad), 0)


def test_every_split_has_the_numbers_of_the_training_images():
    config = DataConfig(dataset="digits", image_size=8, mean="auto", std="auto")
    train, val = (open_split(config, name) for name in ("train", "val"))
    assert train.stats == val.stats == open_split(config, "probe").stats
    assert train.stats[0][0] == pytest.approx(0.305, abs=0.01) and train.stats[1][0] == pytest.approx(0.376, abs=0.01)
    assert "were measured on 1,024 images" in train.contents.notes[-1]


def test_what_is_given_counts_and_what_is_not_is_the_data_sets_own():
    config = DataConfig(dataset="digits", image_size=8, mean=[0.25])
    assert open_split(config, "val").stats == ((0.25,), (0.376,))
    assert open_split(config, "val").contents.notes == ()


def test_channels_that_the_data_set_has_no_numbers_for_are_measured():
    config = DataConfig(dataset="fake", image_size=8, fake_size=20, in_chans=1)
    assert len(open_split(config, "val").stats[0]) == 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"mean": [0.5, 0.5]}, r"data.mean must have one value per channel \(3\), got \[0.5, 0.5\]"),
        ({"std": [0.5], "in_chans": 2}, r"data.std must have one value per channel \(2\), got \[0.5\]"),
    ],
)
def test_wrong_numbers_of_numbers_are_refused(values, line):
    with pytest.raises(ConfigError, match=line):
        Config(data=DataConfig(dataset="fake", **values))


@pytest.mark.parametrize("values", ["[123.7, 116.3, 103.5]", "[-0.1, 0, 0]", "automatic", "0.5"])
def test_numbers_of_another_range_are_refused_in_one_line(values):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["--data.dataset=fake", f"--data.mean={values}"])
    assert str(error.value).startswith("data.mean must be") and "\n" not in str(error.value)


def folder_of(root, gray):
    for name in ("train", "val"):
        (root / name / "a").mkdir(parents=True, exist_ok=True)
        for number in range(8):
            pixels = np.full((8, 8, 3), gray + number, np.uint8)
            Image.fromarray(pixels).save(root / name / "a" / f"{number}.png")


def test_a_run_keeps_its_numbers_and_exports_them(tmp_path):
    folder_of(tmp_path / "data", 100)
    changes = {
        "data.dataset": "imagefolder",
        "data.data_path": str(tmp_path / "data"),
        "data.mean": "auto",
        "data.std": "auto",
        "data.batch_size": 4,
        "run_dir": str(tmp_path / "run"),
        "probe.enabled": False,
    }
    config = tiny_config(**changes)
    run = build(config)
    run.fit()
    mean = [pytest.approx(103.5 / 255, abs=1e-6)] * 3
    assert run.config.data.mean == mean and load_config(tmp_path / "run" / "config.yaml").data.mean == mean
    stats = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())["stats"]
    assert stats[0] == mean
    folder_of(tmp_path / "data", 10)
    assert build(config).config.data.mean == run.config.data.mean
    assert torch.isfinite(next(iter(build(config).data))["images"]).all()
    assert build(tiny_config(**changes | {"checkpoint.resume": "never"})).config.data.mean != mean
