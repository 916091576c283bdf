"""Image files that are decoded once and kept in memory."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hjepa_engine import load_config
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import FixedImageSubset, ImageLoader, build_loader, open_split
from hjepa_engine.errors import DataError
from hjepa_engine.recipes.common.run import with_passed_data


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


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("read", [list, ImageLoader.prepare])
def test_files_are_read_once_and_for_a_device_when_the_loader_is_made(tmp_path, read, on_device):
    root = folder_of(tmp_path)
    damaged = root / "train" / "cat" / "0.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"")
    split = open_split(config := config_of(root, on_device=on_device), "train")
    if on_device:
        with pytest.raises(DataError, match=r"train/cat/0\.png"):
            build_loader(config, split, 0, train=True)
        damaged.write_bytes(whole)
    loader = build_loader(config, split, 0, train=True)
    damaged.write_bytes(whole)
    read(loader)
    for path in root.glob("train/*/*.png"):
        path.unlink()
    loader.sampler.set_position(0, 0)
    first = list(loader)
    loader.sampler.set_position(0, 0)
    again = list(loader)
    assert len(first) == len(again) == 3
    assert all(one["images"].equal(other["images"]) for one, other in zip(first, again, strict=True))


def test_pixels_and_labels_are_kept_as_they_are(tmp_path):
    images = open_split(config_of(folder_of(tmp_path)), "train").images
    pixels, labels = images.gather(np.array([[0, index] for index in range(12)]), 0)
    assert pixels.dtype == torch.uint8 and pixels.shape == (12, 3, 16, 16) and labels.tolist() == [0] * 6 + [1] * 6
    assert pixels[7].equal(torch.from_numpy(np.array(Image.open(tmp_path / "train/dog/1.png"))).permute(2, 0, 1))
    pixel, label = images[7]
    assert pixel.equal(pixels[7]) and label == 1


@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "turned"])
def test_images_of_every_kind_are_those_of_the_files(tmp_path, kind):
    root = folder_of(tmp_path, size=(16, 12))
    for path in root.glob("*/*/*.png"):
        image, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6 if kind == "turned" else 1
        (image if kind == "turned" else image.convert(kind)).save(path, exif=exif)
    size = [12, 16] if kind == "turned" else [16, 12]
    (_, read), (_, decoded) = (
        batches_of(config_of(root, kept, image_size=size), "val", False) for kept in (False, True)
    )
    for one, other in zip(read, decoded, strict=True):
        assert one["images"].equal(other["images"])


def test_monitors_read_the_same_images(tmp_path):
    root = folder_of(tmp_path)
    files, memory = (
        FixedImageSubset(config := config_of(root, kept), open_split(config, "val"), 5) for kept in (False, True)
    )
    assert files.pixels.equal(memory.pixels) and files.labels.equal(memory.labels)


def test_data_sets_that_are_passed_take_their_place():
    given = ["--data.dataset=imagefolder", "--data.data_path=x", "--data.in_memory=true"]
    assert with_passed_data(load_config(None, given)).data.in_memory is False


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
    [
        (other_size, "20 x 16 pixels, the first image has 16 x 16"),
        (truncated, "truncated"),
        (sixteen_bits, "not of 8 bits"),
    ],
)
def test_an_image_that_does_not_fit_in_is_named(tmp_path, spoil, says):
    root = folder_of(tmp_path)
    spoil(root / "train" / "dog" / "2.png")
    with pytest.raises(DataError) as told:
        batches_of(config_of(root))
    start = "data.in_memory needs images of one size and 8 bits that can all be read, else --data.in_memory false; "
    message = str(told.value)
    assert (
        message.startswith(f"{start}{root / 'train' / 'dog' / '2.png'}: ") and says in message and "\n" not in message
    )


def test_more_pixels_than_free_memory_are_refused(tmp_path, monkeypatch):
    root = folder_of(tmp_path, size=(400, 400), number=20)
    needed = 40 * 3 * 400 * 400
    says = "40 images of 400 x 400 take 19 MB, 21 MB of memory are free; use files with --data.in_memory false"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(needed / 0.9) - 2))
    with pytest.raises(DataError, match=f"^data.in_memory: {says}$"):
        batches_of(config_of(root))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(needed / 0.9) + 2))
    assert len(batches_of(config_of(root))[1]) == 10


def test_data_sets_that_lie_in_memory_stay_as_they_are():
    config = DataConfig(dataset="digits", image_size=8, in_chans=1, in_memory=True)
    plain = DataConfig(dataset="digits", image_size=8, in_chans=1)
    assert type(open_split(config, "train").images) is type(open_split(plain, "train").images)
