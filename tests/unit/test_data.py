"""Order, augmentation, damaged images, loaders and data sets, with real files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import (
    DatasetSplit,
    EpochBatchSampler,
    FeatureBatches,
    KeyedDataset,
    build_loader,
    collate,
    eval_transform,
    open_split,
    sample_per_class,
    train_transform,
)
from hjepa_engine.errors import DataError


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
    assert ranks == [[[0, 1, 2], [6, 7]], [[3, 4, 5], [8, 9]]]
    assert len(EpochBatchSampler(11, 6, drop_last=False, world_size=2)) == 2


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


def test_augmentation_depends_on_seed_epoch_and_index_and_on_nothing_else():
    config = DataConfig(dataset="fake", image_size=8, color_jitter=0.5, horizontal_flip=0.5, random_affine=0.5)
    dataset = KeyedDataset(source(), train_transform(config, source()), seed=0)
    first = dataset[3, 5]["image"]
    torch.manual_seed(123)
    dataset[0, 0], dataset[3, 4]
    assert torch.equal(dataset[3, 5]["image"], first)
    again = KeyedDataset(source(), train_transform(config, source()), seed=0)
    assert torch.equal(again[3, 5]["image"], first)
    assert not torch.equal(dataset[4, 5]["image"], first)
    other = KeyedDataset(source(), train_transform(config, source()), seed=1)
    assert not torch.equal(other[3, 5]["image"], first)
    # Two equal images at two places are augmented differently.
    same = DatasetSplit(Pictures(2), ("a", "b", "c"), source().stats)
    same.images.__class__ = type("Same", (Pictures,), {"__getitem__": lambda self, index: (picture(0), 0)})
    twins = KeyedDataset(same, train_transform(config, same), seed=0)
    assert not torch.equal(twins[0, 0]["image"], twins[0, 1]["image"])


def center(config):
    """The evaluation's view of picture 5, and the training views of 20 epochs."""
    steps = train_transform(config, source())
    dataset = KeyedDataset(source(), steps, seed=0)
    return torch.stack([dataset[epoch, 5]["image"] for epoch in range(20)])


PLAIN = {"dataset": "fake", "image_size": 8, "crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2)}


def test_without_augmentation_every_epoch_sees_the_whole_image():
    views = center(DataConfig(**PLAIN))
    assert (views == views[0]).all()
    by_hand = v2.functional.resize(v2.functional.pil_to_tensor(picture(5)), [8, 8], antialias=True)
    assert torch.allclose(views[0], (by_hand / 255 - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize("name", ["crop_scale", "color_jitter", "random_affine"])
def test_each_random_step_makes_the_epochs_differ(name):
    value = (0.3, 1.0) if name == "crop_scale" else 0.5
    views = center(DataConfig(**{**PLAIN, name: value}))
    assert len({tuple(view.flatten().tolist()) for view in views}) > 15
    assert views.shape == (20, 3, 8, 8)


def test_a_flip_is_the_mirror_image_and_happens_as_often_as_asked():
    plain = center(DataConfig(**PLAIN))[0]
    always = center(DataConfig(**PLAIN, horizontal_flip=1.0))
    assert (always == plain.flip(-1)).all()
    sometimes = center(DataConfig(**PLAIN, horizontal_flip=0.5))
    flipped = [torch.equal(view, plain.flip(-1)) for view in sometimes]
    assert all(
        torch.equal(view, plain.flip(-1) if flip else plain) for view, flip in zip(sometimes, flipped, strict=True)
    )
    assert 4 <= sum(flipped) <= 16


def test_small_crops_show_small_parts():
    """Of a picture with a single bright half, a crop of a tenth shows one half alone more often than a crop of all."""
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 20, 40))

    def uniform_views(scale):
        config = DataConfig(dataset="digits", image_size=8, crop_scale=scale)
        transform = train_transform(config, DatasetSplit(Pictures(1), ("a",), ((0.0,), (1.0,))))
        torch.manual_seed(0)
        views = [transform(half) for _ in range(60)]
        assert all(view.shape == (1, 8, 8) and view.min() >= 0 and view.max() <= 1 for view in views)
        return sum(bool((view.max() - view.min()) < 0.5) for view in views)

    assert uniform_views((0.05, 0.1)) > 20 and uniform_views((0.9, 1.0)) == 0


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_crops_have_the_asked_width_over_height(ratio):
    """Red is the column, green the row: the range of each in a crop tells its width and height."""
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    pixels = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64).byte()], dim=2)
    config = DataConfig(dataset="fake", image_size=32, crop_scale=(0.3, 0.3), crop_ratio=(ratio, ratio))
    transform = train_transform(config, DatasetSplit(Pictures(1), ("a",), ((0.0,) * 3, (1.0,) * 3)))
    torch.manual_seed(0)
    for _ in range(10):
        width, height, _ = (channel.max() - channel.min() for channel in transform(Image.fromarray(pixels.numpy())))
        assert (width / height).item() == pytest.approx(ratio, rel=0.1)
        assert (width * height).item() == pytest.approx(0.3 * (252 / 255) ** 2, rel=0.15)


def test_evaluation_resizes_the_shorter_side_and_cuts_the_middle_out():
    config = DataConfig(dataset="fake", image_size=10)
    # 20 x 10: already 10 high; columns 5 to 14 are the middle.
    wide = picture(1, size=(20, 10))
    view = eval_transform(config, source())(wide)
    pixels = v2.functional.pil_to_tensor(wide)[:, :, 5:15]
    assert torch.allclose(view, (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    assert eval_transform(config, source())(picture(1, size=(30, 60))).shape == (3, 10, 10)


@pytest.mark.parametrize(("dataset", "channels"), [("digits", 1), ("fake", 3)])
def test_real_data_is_normalized(dataset, channels):
    config = DataConfig(dataset=dataset, image_size=8, fake_size=64, batch_size=64)
    images = next(iter(build_loader(config, open_split(config, "train"), 0, train=False)[0]))["images"]
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
    loader, sampler = build_loader(config, open_split(config, "train"), 0, train=True)
    found = []
    for epoch in range(epochs):
        sampler.set_position(epoch)
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
    dataset = KeyedDataset(opened, eval_transform(config, opened), seed=0)
    readable = {}
    for index in range(len(dataset)):
        if opened.name_of(index) not in bad:
            readable[tuple(dataset[0, index]["image"].flatten().tolist())] = dataset[0, index]["label"]
    met = 0
    for index in range(len(dataset)):
        if opened.name_of(index) in bad:
            sample = dataset[0, index]
            met += 1
            assert sample["damaged"][0].startswith(opened.name_of(index))
            assert readable[tuple(sample["image"].flatten().tolist())] == sample["label"]
    assert met >= 4


def test_substitutes_are_the_same_in_every_process_and_others_in_other_epochs():
    def images(epoch, damaged):
        dataset = KeyedDataset(source(damaged=damaged), v2.functional.pil_to_tensor, seed=0)
        return dataset[epoch, 2]["image"]

    assert torch.equal(images(0, {2, 3}), images(0, {2, 3}))
    found = {tuple(images(epoch, {2, 3}).flatten().tolist()) for epoch in range(12)}
    assert len(found) > 3
    originals = {tuple(v2.functional.pil_to_tensor(picture(index)).flatten().tolist()) for index in range(20)}
    assert found <= originals


def test_nothing_readable_is_a_data_error_that_names_a_file():
    dataset = KeyedDataset(source(4, damaged=range(4)), v2.functional.pil_to_tensor, seed=0)
    with pytest.raises(
        DataError, match=r"images in a row could not be read, the last one: pictures/\d\.png: image file"
    ):
        dataset[0, 1]


def test_an_error_of_the_transform_is_no_damage():
    def broken(image):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        KeyedDataset(source(), broken, seed=0)[0, 1]


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
    loader, sampler = build_loader(config, open_split(config, "train"), 0, train=True)
    sampler.set_position(1)
    whole = [batch["images"] for batch in loader]
    sampler.set_position(1, 2)
    for ours, theirs in zip([batch["images"] for batch in loader], whole[2:], strict=True):
        assert torch.equal(ours, theirs)


def test_evaluation_loads_everything_in_order():
    config = DataConfig(dataset="fake", fake_size=10, image_size=8, batch_size=4)
    opened = open_split(config, "val")
    loader, _ = build_loader(config, opened, 0, train=False)
    labels = [label for batch in loader for label in batch["labels"].tolist()]
    assert labels == [opened.images[index][1] for index in range(10)]
    first, second = (torch.cat([batch["images"] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)


def test_a_loader_passes_the_global_generator_by():
    config = DataConfig(dataset="digits", image_size=8, batch_size=64)
    opened = open_split(config, "train")
    loader, _ = build_loader(config, opened, 0, train=True)
    assert isinstance(loader, DataLoader)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    iter(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_images_are_one_line():
    config = DataConfig(dataset="fake", fake_size=3, image_size=8, batch_size=4)
    with pytest.raises(DataError, match=r"data\.batch_size must be at most the number of images \(3\), got 4"):
        build_loader(config, open_split(config, "train"), 0, train=True)


def test_collate_stacks_images_and_joins_names():
    samples = [
        {"image": torch.full((1, 2, 2), float(number)), "label": number, "damaged": [f"{number}.png"] * number}
        for number in range(3)
    ]
    batch = collate(samples)
    assert batch["images"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["damaged"] == ["1.png", "2.png", "2.png"]


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
    assert [len(part) for part in names] == [15, 5] and not names[0] & names[1]
    # Names and images belong together.
    for opened in (train, val):
        for index in range(len(opened.images)):
            with Image.open(opened.name_of(index)) as image:
                assert image.convert("RGB").tobytes() == opened.images[index][0].tobytes()


def test_a_held_out_part_with_other_classes_is_refused(tmp_path):
    image_folder(tmp_path / "train", classes=("ant", "cat", "dog"))
    image_folder(tmp_path / "val", classes=("ant", "dog"))
    with pytest.raises(DataError, match=r"must have the 3 class folders of .*train, got ant, dog"):
        open_split(DataConfig(dataset="imagefolder", data_path=str(tmp_path)), "val")


def test_a_folder_may_mix_gray_transparent_and_color_images(tmp_path):
    (tmp_path / "all").mkdir()
    for number, mode in enumerate(["L", "RGB", "RGBA", "L", "RGBA"]):
        picture(number, mode, size=(9 + number, 12)).save(tmp_path / "all" / f"{number}.png")
    picture(7).convert("P").save(tmp_path / "all" / "palette.png")
    picture(8).convert("CMYK").save(tmp_path / "all" / "cmyk.jpg")
    picture(9, "L").convert("LA").save(tmp_path / "all" / "la.png")
    batches = folder_batches(tmp_path, epochs=1, batch_size=7)
    assert [tuple(batch["images"].shape) for batch in batches] == [(7, 3, 8, 8)]
    assert batches[0]["damaged"] == []


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 3), ("RGBA", 3), ("L", 1)])
def test_transforms_bring_any_image_to_the_data_sets_channels(mode, channels):
    config = DataConfig(dataset="digits" if channels == 1 else "fake", image_size=8, color_jitter=0.3)
    opened = DatasetSplit(Pictures(1), ("a", "b", "c"), ((0.5,) * channels, (0.25,) * channels))
    for transform in (train_transform(config, opened), eval_transform(config, opened)):
        assert transform(picture(0, mode)).shape == (channels, 8, 8)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_a_missing_download_is_one_line_with_the_way_to_get_it(tmp_path, dataset):
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(dataset=dataset, data_path=str(tmp_path)), "train")
    message = str(caught.value)
    assert message.startswith(f"data.dataset {dataset} in {tmp_path}: ") and "\n" not in message
    assert message.endswith("download it with --data.download true")


@pytest.mark.parametrize("what", ["missing", "file", "empty", "no images"])
@pytest.mark.parametrize("dataset", ["imagefolder", "imagenet"])
def test_a_folder_without_images_is_one_line(tmp_path, dataset, what):
    path = tmp_path / "images"
    if what == "file":
        path.write_text("x")
    elif what != "missing":
        path.mkdir()
    if what == "no images":
        (path / "cat").mkdir()
    for split in ("train", "probe", "val"):
        with pytest.raises(DataError, match=f"data.dataset {dataset} in ") as caught:
            open_split(DataConfig(dataset=dataset, data_path=str(path)), split)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


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
