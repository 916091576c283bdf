"""Image files that are decoded once and kept in memory."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import build_loader, open_split
from hjepa_engine.errors import DataError


def folder_of(root, size=(16, 16), number=6):
    """Smooth images of two classes."""
    x, y = np.meshgrid(*(np.linspace(0, 1, side) for side in size[::-1]))
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                bands = np.stack([x, y, (x + y + label + index / number) % 3 / 3], axis=-1)
                Image.fromarray((255 * bands).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def config_of(root, in_memory=True, **more):
    values = {"image_size": 16, "batch_size": 4, **more}
    return DataConfig(dataset="imagefolder", data_path=str(root), in_memory=in_memory, **values)


def batches_of(config, split="train", train=True):
    loader = build_loader(config, open_split(config, split), seed=0, train=train)
    return loader, list(loader)


def test_without_augmentation_batches_are_those_of_the_files(tmp_path):
    root = folder_of(tmp_path)
    (files, read), (memory, decoded) = (batches_of(config_of(root, kept), "val", False) for kept in (False, True))
    assert files.processes is not None and memory.processes is None
    for one, other in zip(read, decoded, strict=True):
        assert one["images"].equal(other["images"]) and one["labels"].equal(other["labels"])


def test_crops_and_flips_are_those_of_the_files_up_to_rounding(tmp_path):
    root = folder_of(tmp_path)
    drawn = {"crop_scale": (0.3, 0.8), "crop_ratio": (0.75, 1.33), "horizontal_flip": 0.5, "std": [1.0] * 3}
    (_, read), (_, decoded) = (batches_of(config_of(root, kept, **drawn)) for kept in (False, True))
    for one, other in zip(read, decoded, strict=True):
        assert one["labels"].equal(other["labels"])
        # Pillow rounds to a gray level after each of its two passes.
        assert (one["images"] - other["images"]).abs().max() <= 1.5 / 255


def test_files_are_read_when_the_loader_is_made_and_never_again(tmp_path):
    root = folder_of(tmp_path)
    config = config_of(root)
    split = open_split(config, "train")
    for path in root.glob("train/*/0.png"):
        path.write_bytes(path.with_name("1.png").read_bytes())  # not read yet
    loader = build_loader(config, split, seed=0, train=True)
    for path in root.glob("train/*/*.png"):
        path.unlink()
    first, again = list(loader), list(loader)
    assert len(first) == len(again) == 3 and all(batch["damaged"] == [] for batch in again)
    images, labels = loader.split.images.pixels, loader.split.images.labels
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 16, 16) and labels.tolist() == [0] * 6 + [1] * 6
    assert images[0].equal(images[1])


def test_channels_are_those_asked_for(tmp_path):
    root = folder_of(tmp_path)
    _, read = batches_of(config_of(root, False, in_chans=1), "val", False)
    _, decoded = batches_of(config_of(root, in_chans=1), "val", False)
    assert decoded[0]["images"].shape == (4, 1, 16, 16) and decoded[0]["images"].equal(read[0]["images"])


def other_size(path):
    Image.new("RGB", (16, 20)).save(path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:60])


def sixteen_bits(path):
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(other_size, "20 x 16 pixels, the first image has 16 x 16"), (truncated, ""), (sixteen_bits, "more than 8 bits")],
)
def test_an_image_that_does_not_fit_in_is_named(tmp_path, spoil, says):
    root = folder_of(tmp_path)
    spoil(root / "train" / "dog" / "2.png")
    with pytest.raises(
        DataError, match=rf"data\.in_memory needs images of 8 bits and one size.*dog/2\.png: .*{says}"
    ) as told:
        batches_of(config_of(root))
    assert "\n" not in str(told.value)


def test_more_pixels_than_free_memory_are_refused(tmp_path, monkeypatch):
    root = folder_of(tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    with pytest.raises(
        DataError, match=r"data\.in_memory: 12 images of 16 x 16 take 0\.0 GB, 0\.0 GB of memory are free"
    ):
        batches_of(config_of(root))


def test_data_sets_that_lie_in_memory_stay_as_they_are():
    config = DataConfig(dataset="digits", image_size=8, in_chans=1, in_memory=True)
    plain = DataConfig(dataset="digits", image_size=8, in_chans=1)
    assert type(open_split(config, "train").images) is type(open_split(plain, "train").images)
