"""Features for probes, gathered by one process and by several."""

import pytest
import torch
from helpers import NOISE, options
from PIL import Image
from processes import in_processes

from hjepa_engine import load_config
from hjepa_engine.data import open_split
from hjepa_engine.errors import DataError
from hjepa_engine.models import build_modules
from hjepa_engine.recipes.common import gathering
from hjepa_engine.recipes.common.gathering import gather_splits
from hjepa_engine.recipes.common.probe import feature_step

#: Of each class; in batches of 4, the last one has one image.
NUMBER = {"train": 7, "val": 2}


def folder_of(root, broken=()):
    for split, number in NUMBER.items():
        for label, name in enumerate(("cat", "dog", "eel")):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (24, 24), (80 * label, 30 * index, 7)).save(root / split / name / f"{index}.png")
    for name in broken:
        (root / name).write_bytes(b"broken")
    return root


def gathered(root, **more):
    """Features and labels of both splits, and how many images this process computed."""
    values = {**NOISE, "data.dataset": "imagefolder", "data.data_path": root, "data.batch_size": 4, **more}
    config = load_config(None, options({key: str(value) for key, value in values.items()}))
    torch.manual_seed(0)
    encoder = build_modules(config)["target_encoder"].eval()
    seen = []

    def step(modules, batch):
        seen.append(0 if batch.get("is_filler") else len(batch["images"]))
        return feature_step(modules, batch, features="mean")

    data = {"probe": open_split(config.data, "train"), "val": open_split(config.data, "val")}
    found = gather_splits(config, step, encoder, torch.device("cpu"), data)
    limit = config.probe.features_in_memory_gb
    assert all((part["features"].untyped_storage().filename is not None) == (limit == 0) for part in found)
    return found, sum(seen)


BROKEN = ("train/cat/1.png", "train/cat/0.png", "train/dog/3.png", "val/eel/1.png")


@pytest.mark.parametrize(("broken", "limit"), [((), 4), (BROKEN, 4), (BROKEN, 0)])
def test_two_processes_share_the_images_and_both_have_all_features_in_order(tmp_path, monkeypatch, broken, limit):
    monkeypatch.setattr(gathering, "_ROWS", 5)
    more = {"data.max_damaged": 1, "probe.features_in_memory_gb": limit}
    root = folder_of(tmp_path / "images", broken)
    (train, val), number = gathered(root, **more)
    assert len(train["labels"]) + len(val["labels"]) == number == 27 - len(broken)
    shared = in_processes(2, tmp_path, lambda: gathered(root, **more))
    assert sum(count for _, count in shared) == number and min(count for _, count in shared) >= number // 3
    for splits, _ in shared:
        for found, alone in zip(splits, (train, val), strict=True):
            assert found.keys() == alone.keys() and found["labels"].equal(alone["labels"])
            torch.testing.assert_close(found["features"], alone["features"])


def test_images_without_labels_are_left_out_by_all(tmp_path):
    root = folder_of(tmp_path / "images")
    with pytest.raises(DataError, match="none of the 21 probe images has one"):
        gathered(root, **{"data.labels": "none"})
    said = in_processes(2, tmp_path, lambda: message(root))
    assert said == [message(root)] * 2


def message(root):
    with pytest.raises(DataError) as error:
        gathered(root, **{"data.labels": "none"})
    return str(error.value)
