"""Order, augmentation, damaged images, loaders and data sets, with real files."""

import dataclasses
import pickle
from itertools import product

import datasets
import ignite.distributed as idist
import numpy as np
import pytest
import torch
from helpers import mostly_slow
from PIL import Image
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import (
    DatasetSplit,
    EpochBatchSampler,
    FeatureBatches,
    build_loader,
    open_split,
    sample_per_class,
)
from hjepa_engine.data.augment import TrainTransform
from hjepa_engine.data.memory import MemoryImages
from hjepa_engine.data.reading import ImageReader
from hjepa_engine.errors import DataError
from hjepa_engine.recipes.pack import main as pack


def picture(number, mode="RGB", size=(12, 10)):
    """An image whose pixels depend on its number."""
    generator = torch.Generator().manual_seed(number)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = torch.randint(0, 256, (size[1], size[0], channels), dtype=torch.uint8, generator=generator).numpy()
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def image_folder(root, per_class=4, classes=("cat", "dog"), suffix="png"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            picture(10 * label + number).save(root / name / f"{number}.{suffix}")
    return root


class Pictures:
    """Images in memory, out of which some cannot be read."""

    def __init__(self, count=20, damaged=()):
        self.count, self.damaged = count, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError("image file is truncated")
        return picture(index), index % 3


def source(count=20, damaged=()):
    return DatasetSplit(Pictures(count, damaged), ("a", "b", "c"), ((0.5,) * 3, (0.25,) * 3), "pictures/{}.png".format)


# Order


def keys(sampler, epoch, batch=0):
    sampler.set_position(epoch, batch)
    return [[index for _, index in batch] for batch in sampler]


def flatten(lists):
    return [item for part in lists for item in part]


def test_an_epoch_holds_every_sample_at_most_once():
    for drop_last, expected in ((True, 20), (False, 23)):
        batches = keys(EpochBatchSampler(23, 5, drop_last=drop_last), 0)
        flat = flatten(batches)
        assert len(flat) == len(set(flat)) == expected
        assert [len(batch) for batch in batches] == [5, 5, 5, 5] + [3] * (not drop_last)
        assert set(flat) <= set(range(23))


def test_other_samples_are_left_out_in_other_epochs():
    sampler = EpochBatchSampler(23, 5)
    assert set(flatten(flatten(keys(sampler, epoch)) for epoch in range(20))) == set(range(23))


def test_order_is_keyed_by_seed_and_epoch():
    first = keys(EpochBatchSampler(50, 5, seed=0), 0)
    torch.manual_seed(99)
    assert keys(EpochBatchSampler(50, 5, seed=0), 0) == first
    assert keys(EpochBatchSampler(50, 5, seed=0), 1) != first
    assert keys(EpochBatchSampler(50, 5, seed=1), 0) != first


def test_slices_of_the_ranks_make_up_the_batches_of_one_process():
    alone = keys(EpochBatchSampler(26, 6, seed=3), 2)
    for world in (2, 3):
        ranks = [keys(EpochBatchSampler(26, 6, seed=3, rank=rank, world_size=world), 2) for rank in range(world)]
        assert [flatten(parts) for parts in zip(*ranks, strict=True)] == alone


def test_a_short_last_batch_is_shared_out_evenly():
    ranks = [
        keys(EpochBatchSampler(11, 6, shuffle=False, drop_last=False, rank=rank, world_size=2), 0) for rank in (0, 1)
    ]
    assert ranks == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10]]]
    assert len(EpochBatchSampler(11, 6, drop_last=False, world_size=2)) == 2
    few = [keys(EpochBatchSampler(2, 3, shuffle=False, drop_last=False, rank=r, world_size=3), 0) for r in range(3)]
    assert few == [[[0]], [[1]], [[]]]


@pytest.mark.parametrize("batch", [0, 1, 3, 4])
def test_a_position_skips_batches_without_changing_the_rest(batch):
    sampler = EpochBatchSampler(23, 5, seed=1)
    whole = keys(sampler, 7)
    assert keys(sampler, 7, batch) == whole[batch:]
    # The next pass starts at the front again.
    assert [[index for _, index in found] for found in sampler] == whole


def test_keys_carry_their_epoch():
    sampler = EpochBatchSampler(4, 2)
    sampler.set_position(6)
    assert {epoch for batch in sampler for epoch, _ in batch} == {6}


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"batch_size": 5, "world_size": 2}, {"batch_size": 30}, {"size": 0, "batch_size": 1}],
)
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="batch"):
        EpochBatchSampler(**{"size": 23, **arguments})


# Augmentation


def view(config, key, seed=0, split=None):
    """The training's view of one sample."""
    opened = split or source()
    augment = TrainTransform(config, opened.stats, seed)
    batch = ImageReader(config, opened, seed, augment).__getitems__([key])
    return augment(batch.pixels, batch.keys, is_cropped=True)[0]


def test_augmentation_depends_on_seed_epoch_and_index_and_on_nothing_else():
    config = DataConfig(dataset="fake", image_size=8, color_jitter=0.5, horizontal_flip=0.5, random_affine=0.5)
    first = view(config, (3, 5))
    torch.manual_seed(123)
    assert torch.equal(view(config, (3, 5)), first)
    assert not torch.equal(view(config, (4, 5)), first)
    assert not torch.equal(view(config, (3, 5), seed=1), first)
    # Two equal images at two places are augmented differently.
    same = DatasetSplit(Pictures(2), ("a", "b", "c"), source().stats)
    same.images.__class__ = type("Same", (Pictures,), {"__getitem__": lambda self, index: (picture(0), 0)})
    assert not torch.equal(view(config, (0, 0), split=same), view(config, (0, 1), split=same))


PLAIN = {"dataset": "fake", "image_size": 8, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def test_without_augmentation_every_epoch_sees_the_whole_image():
    views = [view(DataConfig(**PLAIN), (epoch, 5)) for epoch in range(3)]
    by_hand = v2.functional.resize(v2.functional.pil_to_tensor(picture(5)), [8, 8], antialias=True)
    for found in views:
        assert torch.allclose(found, (by_hand / 255 - 0.5) / 0.25, atol=2 / 255 / 0.25)


@pytest.mark.parametrize("name", ["crop_scale", "color_jitter", "random_affine"])
def test_each_random_step_makes_the_epochs_differ(name):
    config = DataConfig(**{**PLAIN, name: (0.3, 1.0) if name == "crop_scale" else 0.5})
    views = [view(config, (epoch, 5)) for epoch in range(20)]
    assert len({tuple(found.flatten().tolist()) for found in views}) > 10
    assert {found.shape for found in views} == {(3, 8, 8)}


def test_evaluation_resizes_the_shorter_side_and_cuts_the_middle_out():
    config = DataConfig(dataset="fake", image_size=10)
    # 20 x 10: already 10 high; columns 5 to 14 are the middle.
    wide = picture(1, size=(20, 10))
    opened = DatasetSplit([(wide, 0), (picture(1, size=(30, 60)), 1)], ("a", "b"), source().stats)
    (batch,) = build_loader(config, opened, 0, train=False)
    pixels = v2.functional.pil_to_tensor(wide)[:, :, 5:15]
    assert torch.allclose(batch["images"][0], (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    assert batch["images"].shape == (2, 3, 10, 10)


@pytest.mark.parametrize(("dataset", "channels"), [("digits", 1), ("fake", 3)])
def test_real_data_is_normalized(dataset, channels):
    config = DataConfig(dataset=dataset, image_size=8, fake_size=64, batch_size=64)
    images = next(iter(build_loader(config, open_split(config, "train"), 0, train=False)))["images"]
    assert images.shape == (64, channels, 8, 8) and images.dtype == torch.float32
    if dataset == "digits":
        assert abs(images.mean().item()) < 0.1 and abs(images.std().item() - 1) < 0.1


# CorruptCheckpoint images


def truncate(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def damaged_folder(root):
    image_folder(root, per_class=6)
    picture(1, size=(64, 64)).save(root / "cat" / "0.png")
    truncate(root / "cat" / "0.png")
    picture(2, size=(64, 64)).save(root / "cat" / "jpg.jpg")
    truncate(root / "cat" / "jpg.jpg")
    (root / "dog" / "0.png").write_bytes(b"this is no image" * 10)
    (root / "dog" / "1.png").write_bytes(b"")
    # A header that asks for 50,000 x 50,000 pixels.
    bomb = bytearray((root / "dog" / "2.png").read_bytes())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (root / "dog" / "2.png").write_bytes(bytes(bomb))
    return {str(root / name) for name in ("cat/0.png", "cat/jpg.jpg", "dog/0.png", "dog/1.png", "dog/2.png")}


def folder_batches(root, epochs=2, **changes):
    config = DataConfig(dataset="imagefolder", data_path=str(root), image_size=8, batch_size=3, val_fraction=0.1)
    config = DataConfig(**{**vars(config), **changes})
    loader = build_loader(config, open_split(config, "train"), 0, train=True)
    found = []
    for epoch in range(epochs):
        loader.sampler.set_position(epoch)
        found += list(loader)
    return found


def test_damaged_images_are_replaced_by_others_and_named(tmp_path):
    bad = damaged_folder(tmp_path / "images")
    batches = folder_batches(tmp_path / "images")
    assert {len(batch["images"]) for batch in batches} == {3}
    assert all(torch.isfinite(batch["images"]).all() for batch in batches)
    named = {line.split(": ")[0] for batch in batches for line in batch["damaged"]}
    assert named <= bad and len(named) >= 3
    assert all(": " in line and "\n" not in line for batch in batches for line in batch["damaged"])


def test_every_kind_of_damage_is_survived_and_the_substitute_has_its_own_label(tmp_path):
    bad = damaged_folder(tmp_path / "images")
    config = DataConfig(dataset="imagefolder", data_path=str(tmp_path / "images"), image_size=8, val_fraction=0.01)
    opened = open_split(config, "train")
    reader = ImageReader(config, opened, 0, TrainTransform(config, opened.stats, 0))
    readable, met = {}, 0
    for index in sorted(range(len(reader)), key=lambda index: opened.name_of(index) in bad):
        pixels, labels, _, damaged = reader.__getitems__([(0, index)])
        if opened.name_of(index) in bad:
            met += 1
            assert damaged[0].startswith(opened.name_of(index))
            assert readable[tuple(pixels.flatten().tolist())] == labels.item()
        else:
            readable[tuple(pixels.flatten().tolist())] = labels.item()
    assert met >= 4


def training_reader(damaged, count=20):
    config = DataConfig(**PLAIN)
    opened = source(count, damaged=damaged)
    return ImageReader(config, opened, 0, TrainTransform(config, opened.stats, 0))


def test_substitutes_are_the_same_in_every_process_and_others_in_other_epochs():
    def image(epoch):
        return training_reader({2, 3}).__getitems__([(epoch, 2)]).pixels

    assert torch.equal(image(0), image(0))
    assert len({tuple(image(epoch).flatten().tolist()) for epoch in range(12)}) > 3


def test_nothing_readable_is_a_data_error_that_names_a_file():
    with pytest.raises(
        DataError, match=r"images in a row could not be read, the last one: pictures/\d\.png: image file"
    ):
        training_reader(range(4), 4).__getitems__([(0, 1)])


@pytest.mark.parametrize("bad", [{0, 7}, {4, 5, 6, 7}, {0, 1, 2, 3}, {8, 9}, set(range(8))])
def test_an_evaluation_leaves_damaged_images_out_and_keeps_the_number_of_batches(bad):
    config = DataConfig(**PLAIN, batch_size=4)
    loader = build_loader(config, source(12, bad), 0, train=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 and all(len(batch["images"]) for batch in batches)
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert labels == [index % 3 for index in range(12) if index not in bad]
    lines = [line for batch in batches for line in batch["damaged"]]
    assert lines == [f"pictures/{index}.png: image file is truncated" for index in sorted(bad)]


def test_an_evaluation_with_fewer_images_left_than_it_needs_is_filled_up_to_its_number_of_batches():
    bad = {1, 2, 3, 4, 5, 7, 8, 9}
    loader = build_loader(DataConfig(**PLAIN, batch_size=2), source(10, bad), 0, train=False)
    batches = list(loader)
    assert [batch.get("is_filler", False) for batch in batches] == [False, False, True, True, True]
    assert [batch["labels"].tolist() for batch in batches] == [[0]] * 5
    assert torch.equal(batches[1]["images"], batches[2]["images"])
    assert sorted(line for batch in batches for line in batch["damaged"]) == [
        f"pictures/{index}.png: image file is truncated" for index in sorted(bad)
    ]


def test_an_evaluation_without_a_readable_image_is_one_line():
    with pytest.raises(DataError, match=r"no image could be read, the last one: pictures/3\.png"):
        list(build_loader(DataConfig(**PLAIN, batch_size=2), source(4, range(4)), 0, train=False))


def test_an_image_needs_no_label_and_may_be_a_tensor_or_an_array():
    images = [torch.full((3, 8, 8), 7, dtype=torch.uint8), np.full((8, 8, 3), 0.5, np.float32), (picture(0), 2)]
    batch = ImageReader(DataConfig(**PLAIN), DatasetSplit(images, (), source().stats), 0).__getitems__(
        [(0, index) for index in range(3)]
    )
    assert batch.labels.tolist() == [-1, -1, 2]
    assert batch.pixels.dtype == torch.float32 and batch.pixels[:2, 0, 0, 0].tolist() == pytest.approx([7 / 255, 0.5])


# Loaders


def test_workers_do_not_change_a_bit(tmp_path):
    damaged_folder(tmp_path / "images")
    settings = {"color_jitter": 0.4, "horizontal_flip": 0.5, "random_affine": 0.3}
    alone, shared = (folder_batches(tmp_path / "images", num_workers=number, **settings) for number in (0, 2))
    assert len(alone) == len(shared) >= 6
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["labels"], theirs["labels"])
        assert ours["damaged"] == theirs["damaged"]
    epoch = len(alone) // 2
    assert not torch.equal(alone[0]["images"], alone[epoch]["images"])


def test_a_loader_entered_in_the_middle_gives_the_rest_of_the_epoch():
    config = DataConfig(dataset="fake", fake_size=60, image_size=8, batch_size=10)
    loader = build_loader(config, open_split(config, "train"), 0, train=True)
    loader.sampler.set_position(1)
    whole = [batch["images"] for batch in loader]
    loader.sampler.set_position(1, 2)
    for ours, theirs in zip([batch["images"] for batch in loader], whole[2:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dataset", ["digits", "digit_pages"])
def test_images_may_lie_on_the_device(dataset):
    config = DataConfig(dataset=dataset, image_size=8 if dataset == "digits" else 32, batch_size=16)
    plain, moved = (
        next(
            iter(
                build_loader(
                    dataclasses.replace(config, on_device=on_device), open_split(config, "train"), 0, train=True
                )
            )
        )
        for on_device in (False, True)
    )
    assert torch.equal(plain["images"], moved["images"]) and torch.equal(plain["labels"], moved["labels"])


def test_evaluation_loads_everything_in_order():
    config = DataConfig(dataset="fake", fake_size=10, image_size=8, batch_size=4)
    opened = open_split(config, "val")
    loader = build_loader(config, opened, 0, train=False)
    labels = [label for batch in loader for label in batch["labels"].tolist()]
    assert labels == [opened.images[index][1] for index in range(10)]
    first, second = (torch.cat([batch["images"] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)


def test_a_loader_passes_the_global_generator_by():
    config = DataConfig(dataset="digits", image_size=8, batch_size=64)
    opened = open_split(config, "train")
    loader = build_loader(config, opened, 0, train=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    iter(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_images_are_one_line():
    config = DataConfig(dataset="fake", fake_size=3, image_size=8, batch_size=4)
    with pytest.raises(DataError, match=r"the train split has 3 images, data\.batch_size must be at most that, got 4"):
        build_loader(config, open_split(config, "train"), 0, train=True)


def test_fewer_images_than_processes_are_one_line(monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 4)
    config = DataConfig(dataset="fake", fake_size=3, image_size=8, batch_size=4)
    with pytest.raises(
        DataError, match=r"^the train split has 3 images, there are 4 processes: each needs one in every"
    ):
        build_loader(config, open_split(config, "train"), 0, train=True)
    build_loader(config, open_split(config, "val"), 0, train=False)


@pytest.mark.parametrize("dataset", ["fake", "digits", "digit_pages"])
def test_a_process_without_a_share_of_the_last_batch_has_a_filler(dataset, monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    config = DataConfig(dataset=dataset, image_size=32, batch_size=4, in_chans=3)
    opened = open_split(config, "val")
    loaders = []
    for rank in (0, 1):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        loaders.append(build_loader(config, opened, 0, train=False))
        loaders[-1].sampler.size = 5  # of which the last one is a batch of its own
    first, second = (list(loader) for loader in loaders)
    assert [len(batch["images"]) for batch in first] == [2, 1] and [len(batch["images"]) for batch in second] == [2, 1]
    assert [batch.get("is_filler", False) for batch in (*first, *second)] == [False, False, False, True]
    assert [batch.get("offset") for batch in (*first, *second)] == [0, 0, 2, None]
    assert second[1]["images"].shape == (1, 3, 32, 32) and not second[1]["images"].any()


def packed_folder(root):
    image_folder(root / "files")
    pack([str(root / "files"), str(root / "packed")])
    return {"dataset": "packed", "data_path": str(root / "packed")}


def saved_table(root):
    image_folder(root / "files")
    files = sorted(map(str, (root / "files").rglob("*.png")))
    columns = {"image": files, "label": [index % 2 for index in range(len(files))]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(columns, features).save_to_disk(root / "saved")
    return {"dataset": "huggingface", "data_path": str(root / "saved")}


def plain_folder(root):
    image_folder(root)
    return {"dataset": "imagefolder", "data_path": str(root)}


def own_noise(root):
    return {"class_path": "test_own_data.noise", "init_args": {"size": 30}}


STORES = [plain_folder, packed_folder, saved_table, own_noise]
# A process that is not forked imports everything: seconds.
QUICK = [(store, "fork") for store in STORES]


@pytest.mark.parametrize(("store", "method"), mostly_slow([*product(STORES, ("fork", "forkserver", "spawn"))], QUICK))
def test_loader_processes_of_every_start_method_read_the_same_bits(tmp_path, store, method):
    config = DataConfig(**store(tmp_path), image_size=8, batch_size=3, val_fraction=0.1, num_workers=2)
    opened = open_split(config, "train")
    alone, shared = (
        build_loader(DataConfig(**{**vars(config), "num_workers": number}), opened, 0, train=True) for number in (0, 2)
    )
    shared.processes.multiprocessing_context = method
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours["images"], theirs["images"]) and torch.equal(ours["labels"], theirs["labels"])
    shared.close()


@pytest.mark.parametrize("dataset", ["digit_pages", "digits", "fake"])
def test_datasets_can_be_handed_to_other_processes(dataset):
    config = DataConfig(dataset=dataset, image_size=8, fake_size=20, batch_size=4)
    reader = build_loader(config, open_split(config, "train"), 0, train=True).reader
    keys = [(1, 3), (1, 9)]
    again = pickle.loads(pickle.dumps(reader)).__getitems__(keys)
    assert torch.equal(again.pixels, reader.__getitems__(keys).pixels)


# Data sets


def test_digits_are_split_into_disjoint_parts_by_seed():
    config = DataConfig(dataset="digits")

    def members(split, seed=0):
        return {image.numpy().tobytes() for image in open_split(config, split, seed).images.pixels}

    train, val = members("train"), members("val")
    assert len(train) == 1438 and len(val) == 359  # no digit is there twice
    assert not train & val and members("probe") == train
    assert members("val", seed=1) != val
    assert len(open_split(DataConfig(dataset="digits", val_fraction=0.5), "val").images) == 898
    opened = open_split(config, "train")
    image, label = opened.images[0]
    assert (image.shape, image.dtype, opened.num_classes) == ((1, 8, 8), torch.uint8, 10) and 0 <= label <= 9


def epoch_keys(epoch, number):
    return np.stack([np.full(number, epoch), np.arange(number)], axis=1)


def test_digit_pages_hold_digits_of_their_class_from_their_own_split():
    config = DataConfig(dataset="digit_pages")
    opened = {split: open_split(config, split) for split in ("train", "probe", "val")}
    assert [len(split.images) for split in opened.values()] == [6400, 2000, 1000]
    for name, split in opened.items():
        single = open_split(DataConfig(dataset="digits"), name).images
        known = {digit.numpy().tobytes(): label for digit, label in (single[i] for i in range(len(single)))}
        pages, labels = split.images.gather(epoch_keys(2, 50), seed=0)
        assert pages.shape == (50, 1, 32, 32) and pages.dtype == torch.uint8 and labels.tolist() == [*range(10)] * 5
        digits = pages.unfold(2, 8, 8).unfold(3, 8, 8).reshape(50, 16, 64)
        dark = 0
        for page, label in zip(digits, labels.tolist(), strict=True):
            for digit in page:
                as_drawn, inverse = known.get(digit.numpy().tobytes()), known.get((255 - digit).numpy().tobytes())
                assert label in (as_drawn, inverse)
                dark += as_drawn is not None
        assert 330 < dark < 470  # of 800, half


def test_digit_pages_are_other_ones_in_every_epoch_and_split_and_whatever_the_batch():
    train, val = (open_split(DataConfig(dataset="digit_pages"), split).images for split in ("train", "val"))
    together = train.gather(epoch_keys(0, 20), seed=0)[0]
    assert torch.equal(train.gather(epoch_keys(0, 20)[3:4], seed=0)[0][0], together[3])
    assert not torch.equal(together[3], together[13])
    assert not torch.equal(train.gather(epoch_keys(1, 20), seed=0)[0][3], together[3])
    assert not torch.equal(train.gather(epoch_keys(0, 20), seed=1)[0][3], together[3])

    def polarities(pages):
        """Whether the corner of each digit, which no stroke reaches, is light."""
        return pages[:, 0, ::8, ::8] > 127

    # Labels go by index in both splits: equal signs would tell a probe the label of a validation page.
    same = polarities(together) == polarities(val.gather(epoch_keys(0, 20), seed=0)[0])
    assert 0.35 < same.float().mean() < 0.65


@pytest.mark.parametrize(("dataset", "channels"), [("digits", 3), ("digit_pages", 3), ("cifar10", 1), ("cifar10", 3)])
def test_images_in_memory_come_in_the_channels_that_are_asked_for(dataset, channels, monkeypatch):
    config = DataConfig(dataset=dataset, in_chans=channels, batch_size=4)
    if dataset == "cifar10":
        colors = torch.tensor([[200, 100, 50], [0, 255, 0]], dtype=torch.uint8).repeat(4, 1)
        images = MemoryImages(colors[:, :, None, None].expand(-1, -1, 32, 32), torch.zeros(8).long())
        opened = DatasetSplit(images, ("a",), ((0.0,) * channels, (1.0,) * channels))
    else:
        opened = open_split(config, "train")
    loaded = next(iter(build_loader(config, opened, 0, train=False)))["images"]
    assert loaded.shape == (4, channels, 32, 32)
    if dataset == "cifar10" and channels == 1:
        # Pillow's luma of both colors
        wanted = [Image.new("RGB", (1, 1), tuple(color)).convert("L").getpixel((0, 0)) for color in colors[:2].tolist()]
        assert (loaded[:2, 0, 0, 0] * 255).round().tolist() == wanted
    elif channels == 3 and dataset != "cifar10":
        shown = loaded * torch.tensor(opened.stats[1])[:, None, None] + torch.tensor(opened.stats[0])[:, None, None]
        assert torch.allclose(shown[:, 0], shown[:, 2], atol=1e-5)


def test_fake_images_of_training_and_validation_differ():
    config = DataConfig(dataset="fake", fake_size=5, image_size=8)
    train, val = open_split(config, "train"), open_split(config, "val")
    assert len(train.images) == len(val.images) == 5
    assert train.images[0][0].size == (8, 8)
    assert train.images[0][0].tobytes() != val.images[0][0].tobytes()
    assert train.images[0][0].tobytes() == open_split(config, "probe").images[0][0].tobytes()


def test_fake_images_are_those_of_torchvision_and_draw_from_no_global_generator():
    ours = open_split(DataConfig(dataset="fake", fake_size=5, image_size=8), "val").images
    theirs = FakeData(5, (3, 8, 8), 10, random_offset=5)
    before = torch.get_rng_state()
    found = [ours[index] for index in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    wanted = [theirs[index] for index in range(5)]
    assert [(image.mode, image.tobytes(), label) for image, label in found] == [
        (image.mode, image.tobytes(), label) for image, label in wanted
    ]


@pytest.mark.parametrize("dataset", ["imagefolder", "imagenet"])
@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_with_train_and_a_held_out_part(tmp_path, dataset, held_out):
    image_folder(tmp_path / "train", per_class=4)
    image_folder(tmp_path / held_out, per_class=2)
    config = DataConfig(dataset=dataset, data_path=str(tmp_path))
    train, val = open_split(config, "train"), open_split(config, "val")
    assert (len(train.images), len(val.images), train.num_classes) == (8, 4, 2)
    assert train.name_of(0) == str(tmp_path / "train" / "cat" / "0.png")
    assert val.name_of(3) == str(tmp_path / held_out / "dog" / "1.png")
    assert [train.images[index][1] for index in (0, 4)] == [0, 1]


@pytest.mark.parametrize("inside", ["train", "."])
def test_a_folder_without_a_held_out_part_is_split(tmp_path, inside):
    image_folder(tmp_path / inside, per_class=10)
    config = DataConfig(dataset="imagefolder", data_path=str(tmp_path), val_fraction=0.25)
    train, val = open_split(config, "train"), open_split(config, "val")
    names = [{opened.name_of(index) for index in range(len(opened.images))} for opened in (train, val)]
    assert len(names[0]) + len(names[1]) == 20 and len(names[1]) in range(2, 9) and not names[0] & names[1]
    # Names and images belong together.
    for opened in (train, val):
        for index in range(len(opened.images)):
            with Image.open(opened.name_of(index)) as image:
                assert image.convert("RGB").tobytes() == opened.images[index][0].tobytes()


def test_a_folder_may_mix_gray_transparent_and_color_images(tmp_path):
    (tmp_path / "all").mkdir()
    for number, mode in enumerate(["L", "RGB", "RGBA", "L", "RGBA"]):
        picture(number, mode, size=(9 + number, 12)).save(tmp_path / "all" / f"{number}.png")
    picture(7).convert("P").save(tmp_path / "all" / "palette.png")
    picture(8).convert("CMYK").save(tmp_path / "all" / "cmyk.jpg")
    picture(9, "L").convert("LA").save(tmp_path / "all" / "la.png")
    (tmp_path / "held").mkdir()
    picture(0).save(tmp_path / "held" / "0.png")
    batches = folder_batches(tmp_path, epochs=1, batch_size=7, val_dir="held")
    assert [tuple(batch["images"].shape) for batch in batches] == [(7, 3, 8, 8)]
    assert batches[0]["damaged"] == []


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 3), ("RGBA", 3), ("L", 1)])
def test_transforms_bring_any_image_to_the_data_sets_channels(mode, channels):
    config = DataConfig(dataset="digits" if channels == 1 else "fake", image_size=8, color_jitter=0.3)
    opened = DatasetSplit(Pictures(1), ("a", "b", "c"), ((0.5,) * channels, (0.25,) * channels))
    opened = DatasetSplit([(picture(0, mode), 0)], opened.classes, opened.stats)
    for augment in (TrainTransform(config, opened.stats, 0), None):
        assert ImageReader(config, opened, 0, augment).__getitems__([(0, 0)]).pixels.shape == (1, channels, 8, 8)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_a_missing_download_is_one_line_with_the_way_to_get_it(tmp_path, dataset):
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(dataset=dataset, data_path=str(tmp_path)), "train")
    message = str(caught.value)
    assert message.startswith(f"data.dataset {dataset} in {tmp_path}: ") and "\n" not in message
    assert message.endswith("download it with --data.download true")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=r"data\.dataset cifar10 in .*no route to host"):
        open_split(DataConfig(dataset="cifar10", data_path=str(tmp_path), download=True), "train")


# Features


def test_feature_batches_hold_each_sample_once_with_its_label_in_another_order_every_pass():
    features = torch.arange(10.0)[:, None] * torch.ones(3)
    batches = FeatureBatches(features, torch.arange(10) * 2, batch_size=4)
    passes = []
    for epoch in (0, 1):
        batches.sampler.set_position(epoch)
        found = list(batches)
        assert [len(batch["features"]) for batch in found] == [4, 4, 2] and len(batches) == 3
        assert all(torch.equal(batch["features"][:, 0] * 2, batch["labels"].float()) for batch in found)
        passes.append(torch.cat([batch["labels"] for batch in found]).tolist())
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(0, 20, 2))
    assert passes[0] != passes[1]
    ordered = FeatureBatches(features, torch.arange(10), 4, shuffle=False)
    assert torch.cat([batch["labels"] for batch in ordered]).tolist() == list(range(10))


def test_samples_per_class_are_drawn_by_the_seed():
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 2)
    chosen = sample_per_class(labels, 5, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [5, 5, 2]
    assert len(chosen.unique()) == 12 and (chosen.diff() > 0).all()
    assert torch.equal(chosen, sample_per_class(labels, 5, seed=0))
    assert not torch.equal(chosen, sample_per_class(labels, 5, seed=1))
