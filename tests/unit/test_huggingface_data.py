"""Data sets that the library ``datasets`` reads."""

import pickle
import socket
import sys
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image
from resuming import RICH, assert_same, outcome, train

from hjepa_engine.config import Config
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import build_loader, describe_data, open_split
from hjepa_engine.errors import ConfigError, DataError

CLASSES = ["cat", "dog"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def png(value):
    buffer = BytesIO()
    Image.fromarray(np.full((24, 30, 3), value, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def table(size=12, first=0, **more):
    """Image i is of one value, i + ``first``; its class is i mod 2."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    columns = {"image": [png(first + i) for i in range(size)], "label": [i % 2 for i in range(size)]}
    for name, (feature, values) in more.items():
        features[name], columns[name] = feature, values
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write(folder, kind):
    """The same training and validation images in each kind of store."""
    splits = datasets.DatasetDict({"train": table(12), "validation": table(6, 100)})
    if kind == "saved":
        splits.save_to_disk(folder)
    for name, split in splits.items():
        if kind == "arrow":
            for shard in range(2):
                split.shard(2, shard).save_to_disk(folder / "whole" / f"{name}{shard}")
                target = folder / f"x-{name}-0000{shard}-of-00002.arrow"
                (folder / "whole" / f"{name}{shard}" / "data-00000-of-00001.arrow").rename(target)
        elif kind == "parquet":
            folder.mkdir(exist_ok=True)
            split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        elif kind == "images":
            for index, row in enumerate(split):
                path = folder / name / CLASSES[row["label"]] / f"{index:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                row["image"].save(path)
    return folder


def config(folder, **values):
    return DataConfig(dataset="huggingface", data_path=str(folder), batch_size=4, **values)


def values_of(split):
    pairs = [split.images[index] for index in range(len(split.images))]
    return sorted((np.asarray(image)[0, 0, 0].item(), label) for image, label in pairs)


@pytest.mark.parametrize("kind", ["saved", "arrow", "parquet", "images"])
def test_every_kind_of_folder_gives_the_same_images_and_classes(tmp_path, kind):
    folder = write(tmp_path / "data", kind)
    train_split, val = (open_split(config(folder), name) for name in ("train", "val"))
    assert train_split.classes == val.classes == ("cat", "dog")
    assert values_of(train_split) == [(i, i % 2) for i in range(12)]
    assert values_of(val) == [(100 + i, i % 2) for i in range(6)]
    assert values_of(pickle.loads(pickle.dumps(train_split))) == values_of(train_split)  # as loader processes get it
    assert train_split.name_of(3).endswith(".png")


def test_images_stay_encoded_until_they_are_asked_for(tmp_path):
    split = open_split(config(write(tmp_path / "data", "saved")), "train")
    image, _ = split.images[0]
    assert isinstance(image, Image.Image) and image.format == "PNG"


def test_a_table_without_validation_split_is_split_by_the_number_of_the_row(tmp_path):
    held_out = []
    for size in (40, 80):
        table(size).save_to_disk(tmp_path / str(size))
        parts = [values_of(open_split(config(tmp_path / str(size)), name)) for name in ("train", "val")]
        assert sorted(parts[0] + parts[1]) == [(i, i % 2) for i in range(size)]
        held_out.append(parts[1])
    assert held_out[0] == [pair for pair in held_out[1] if pair[0] < 40] != []


def test_columns_are_named_where_there_are_several(tmp_path):
    more = {
        "second": (datasets.Image(), [png(200 + i) for i in range(12)]),
        "kind": (datasets.Value("string"), ["b", "a", None] * 4),
        "grid": (datasets.Array2D((2, 2), "uint8"), [np.full((2, 2), i) for i in range(12)]),
    }
    table(**more).select_columns(["image", "second", "label", "kind"]).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"data\.image_column must be given, one of image, second, got null"):
        open_split(config(tmp_path / "two"), "train")
    chosen = config(tmp_path / "two", image_column="second", label_column="kind", val_fraction=0.01)
    split = open_split(chosen, "train")
    assert split.classes == ("a", "b")
    assert values_of(split) == [(200 + i, (1, 0, -1)[i % 3]) for i in range(12)]
    with pytest.raises(ConfigError, match=r"data\.label_column must be one of image, second, label, kind, got x"):
        open_split(config(tmp_path / "two", image_column="image", label_column="x"), "train")
    table(**more).select_columns(["grid"]).save_to_disk(tmp_path / "grid")
    split = open_split(config(tmp_path / "grid", val_fraction=0.01), "train")
    assert split.classes == () and (split.images[5][0] == 5).all() and split.images[5][0].dtype == np.uint8


def test_a_row_without_an_image_is_a_damaged_one(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [None, *(png(i) for i in range(1, 4))]}, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    loader = build_loader(config(tmp_path / "data"), open_split(config(tmp_path / "data"), "val"), 0, train=False)
    batch = next(iter(loader))
    assert batch["damaged"] == ["row 0: the row has no image"] and len(batch["images"]) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing", "there is no such folder; a data set on the hub is named by data.hub_name"), ("empty", "empty: ")],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"data.data_path .*{says}") as caught:
        open_split(config(tmp_path / name), "train")
    assert "\n" not in str(caught.value)


def test_the_hub_without_a_network_is_one_line_at_once(monkeypatch):
    def fail(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("hjepa_engine.data.huggingface.getproxies", dict)
    with pytest.raises(DataError, match=r"data\.hub_name some/set: huggingface\.co cannot be reached"):
        open_split(DataConfig(dataset="huggingface", hub_name="some/set"), "train")


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'needs the library datasets: pip install "hjepa-engine\[hf\]"'):
        open_split(config(tmp_path), "train")


def test_the_hub_is_only_for_data_sets_of_hugging_face():
    with pytest.raises(ConfigError, match=r"data\.hub_name must be null where data\.dataset is digits, got a/b"):
        Config(data=DataConfig(dataset="digits", hub_name="a/b"))


def test_other_rows_are_other_data_and_another_place_is_not(tmp_path):
    first = describe_data(config(write(tmp_path / "a", "saved")))
    again = describe_data(config((tmp_path / "a").rename(tmp_path / "b")))
    assert first == again
    table(13).save_to_disk(tmp_path / "c")
    assert describe_data(config(tmp_path / "c"))["train"]["fingerprint"] != first["train"]["fingerprint"]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_run_stopped_inside_an_epoch_goes_on_with_the_same_bits(tmp_path, kind):
    folder = write(tmp_path / "data", kind)
    values = {**RICH, "data.dataset": "huggingface", "data.data_path": str(folder), "training.epochs": 2}
    whole = outcome(train(tmp_path / "whole", values))
    train(tmp_path / "halves", values, stop=4)
    assert_same(outcome(train(tmp_path / "halves", {**values, "data.num_workers": 1})), whole)
