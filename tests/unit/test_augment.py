"""Batched augmentation against torchvision's, image by image with the same parameters."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as reference

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.augment import (
    EvalTransform,
    TrainTransform,
    affine,
    affine_matrices,
    brightness,
    contrast,
    hue,
    inverse_affine,
    jitter,
    saturation,
)
from hjepa_engine.data.crops import center_box, random_boxes, resample
from hjepa_engine.data.rand_augment import operations, rand_augment

#: Float32 rounding of a few operations on numbers up to 1.
TOLERANCE = 5e-6
IMAGES = torch.rand(6, 3, 40, 52, generator=torch.Generator().manual_seed(0))
PLAIN = (0.0,) * 3, (1.0,) * 3


def keys(epoch, number):
    return np.stack([np.full(number, epoch), np.arange(number)], axis=1)


def distance(ours, theirs):
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (64, 64), (8, 50), (40, 52)])
def test_resampling_is_torchvisions_crop_antialiased_resize_and_flip(size):
    boxes = [[0, 0, 40, 52], [3, 5, 20, 20], [10, 0, 7, 9], [0, 12, 33, 40], [5, 5, 1, 1], [2, 2, 36, 50]]
    mirrored = torch.tensor([False, True, False, True, True, False])
    expected = [
        reference.resized_crop(image, *box, list(size), antialias=True)
        for image, box in zip(IMAGES, boxes, strict=True)
    ]
    expected = [image.flip(-1) if flip else image for image, flip in zip(expected, mirrored, strict=True)]
    assert distance(resample(IMAGES, torch.tensor(boxes), size, mirrored), expected) < TOLERANCE


def test_boxes_have_the_drawn_area_and_ratio_and_lie_anywhere():
    sizes = np.tile([[100, 150]], (4000, 1))
    boxes = random_boxes(sizes, keys(0, 4000), 0, "crop", scale=(0.2, 0.8), ratio=(0.75, 4 / 3))
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 150).all()
    area, ratio = height * width / 15_000, width / height
    assert area.min() > 0.19 and area.max() < 0.81 and ratio.min() > 0.73 and ratio.max() < 1.37
    room = np.stack([top, left]) / np.maximum(np.stack([100 - height, 150 - width]), 1)
    assert np.abs(room.mean(axis=1) - 0.5).max() < 0.02 and room.min() == 0 and room.max() == 1
    # Every box of up to half a square fits at the first attempt, so that areas are uniform.
    boxes = random_boxes(sizes[:, :1].repeat(2, 1), keys(0, 4000), scale=(0.2, 0.5), ratio=(0.75, 4 / 3))
    assert np.quantile(boxes[:, 2] * boxes[:, 3] / 10_000, [0.25, 0.5, 0.75]) == pytest.approx(
        [0.275, 0.35, 0.425], abs=0.01
    )


def test_boxes_that_cannot_fit_are_the_largest_centered_ones():
    boxes = random_boxes(np.array([[10, 1000], [1000, 10]]), keys(0, 2), scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_a_box_depends_on_its_own_image_alone():
    sizes = np.array([[40, 52], [300, 20], [64, 64]])
    together = random_boxes(sizes, keys(2, 3), 7, "crop", scale=(0.3, 1.0), ratio=(0.5, 2.0))
    alone = [
        random_boxes(sizes[i : i + 1], keys(2, 3)[i : i + 1], 7, "crop", scale=(0.3, 1.0), ratio=(0.5, 2.0))[0]
        for i in range(3)
    ]
    assert (np.stack(alone) == together).all()


@pytest.mark.parametrize(
    ("size", "target", "box"),
    [
        ((10, 20), (8, 8), (0, 5, 10, 10)),
        ((20, 10), (8, 8), (5, 0, 10, 10)),
        ((32, 32), (32, 64), (8, 0, 16, 32)),
        ((1, 1), (8, 4), (0, 0, 1, 1)),
    ],
)
def test_the_center_box_is_the_largest_of_its_shape(size, target, box):
    assert center_box(size, target) == box


def test_affine_maps_are_torchvisions():
    values = [[0.3, 0, 1, 1, 0], [-0.2, 3, 0, 1.1, 0.1], [0, -2, 2, 0.9, 0.2], [0.5, 5, -3, 1.2, 0.1]]
    angle, right, down, scale, shear = torch.tensor(values).T
    expected = [
        reference.affine(
            IMAGES[number],
            math.degrees(row[0]),
            [int(row[1]), int(row[2])],
            row[3],
            [math.degrees(row[4]), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        for number, row in enumerate(values)
    ]
    # Positions are rounded differently: 1e-5 of a pixel, between neighbors that differ by up to 1.
    assert distance(affine(IMAGES[:4], inverse_affine(angle, right, down, scale, shear)), expected) < 2e-5


def test_affine_draws_reach_their_limits_and_none_changes_nothing():
    ends = affine_matrices(
        torch.tensor([[0.5] * 5, [1.0, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0, 0.0]]), 0.5, (40, 20)
    )
    assert torch.allclose(ends[0], torch.tensor([[1.0, 0, 0], [0, 1, 0]]), atol=1e-6)
    assert ends[1, 0, 0].item() == pytest.approx(math.cos(math.radians(15)))
    assert ends[2, :, 2].tolist() == pytest.approx([-2.0, 4.0])  # 10 % of 20 columns and of 40 rows


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (brightness, reference.adjust_brightness),
        (contrast, reference.adjust_contrast),
        (saturation, reference.adjust_saturation),
        (hue, reference.adjust_hue),
    ],
)
def test_color_steps_are_torchvisions(ours, theirs):
    values = [0.5, 1.5, 1.0, 0.8, 1.2, 0.0] if ours is not hue else [-0.5, 0.1, 0.25, 0.0, 0.49, -0.2]
    expected = [theirs(image, value) for image, value in zip(IMAGES, values, strict=True)]
    assert distance(ours(IMAGES, torch.tensor(values)[:, None, None, None]), expected) < TOLERANCE
    gray = IMAGES[:, :1].expand(-1, 3, -1, -1)
    assert torch.isfinite(ours(gray, torch.tensor(values)[:, None, None, None])).all()


def test_jitter_applies_every_step_once_in_an_order_of_each_images_own():
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    steps = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue]
    orders = [(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
    orders = [order for order in orders if len(set(order)) == 4]
    expected = []
    for image, row in zip(IMAGES, draws.tolist(), strict=True):
        values = [*(1 + (2 * value - 1) * 0.4 for value in row[:3]), (2 * row[3] - 1) * 0.1]
        for step in orders[int(row[4] * 24)]:
            image = steps[step](image, values[step])
        expected.append(image)
    assert distance(jitter(IMAGES, draws, 0.4), expected) < TOLERANCE
    assert jitter(IMAGES[:, :1], draws, 0.4).shape == (6, 1, 40, 52)


#: In the order of ``operations``: those with a sign, those without, the identity.
RAND_AUGMENT = [
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
]
RAND_AUGMENT += ["Posterize", "Solarize", "AutoContrast", "Equalize", "Identity"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", range(31))
def test_rand_augments_operations_are_torchvisions(magnitude, channels):
    pixels = (IMAGES[:2, :channels] * 255).byte()
    theirs, space = v2.RandAugment(), v2.RandAugment._AUGMENTATION_SPACE
    assert sorted(space) == sorted(RAND_AUGMENT)
    for name, ours in zip(RAND_AUGMENT, operations(magnitude, (40, 52)), strict=True):
        magnitudes, is_signed = space[name]
        strengths = magnitudes(31, 40, 52)
        strength = 0.0 if strengths is None else float(strengths[magnitude])
        assert len(ours) == {True: 2, False: 1}[is_signed] - (name == "Identity")
        for operation, sign in zip(ours, (1, -1), strict=False):
            expected = theirs._apply_image_or_video_transform(pixels, name, sign * strength, "nearest", {})
            assert torch.equal(operation(pixels), expected), name


def test_rand_augment_applies_operations_of_each_images_own_one_after_the_other():
    pixels, number = (IMAGES * 255).byte(), len(RAND_AUGMENT)
    draws = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    draws[0], draws[1] = 0.0, 1 - 2.0**-24  # the smallest and the largest that there are
    known, expected = operations(9, (40, 52)), []
    for image, row in zip(pixels, draws.tolist(), strict=True):
        for which, sign in (row[:2], row[2:]):
            choices = known[int(which * number)]
            image = choices[len(choices) == 2 and sign < 0.5](image[None])[0] if choices else image
        expected.append(image)
    given = pixels.clone()
    assert torch.equal(rand_augment(given, draws, 9), torch.stack(expected)) and torch.equal(given, pixels)
    assert not torch.equal(rand_augment(pixels, draws, 20), torch.stack(expected))


def test_rand_augment_draws_every_operation_equally_often():
    many, known = (IMAGES[:1] * 255).byte().expand(2800, -1, -1, -1), operations(9, (40, 52))
    draws = torch.rand(2800, 2, generator=torch.Generator().manual_seed(3))
    found = rand_augment(many, draws, 9)
    for choices in known:
        for operation in choices or (lambda images: images,):
            count = (found == operation(many[:1])).flatten(1).all(dim=1).sum().item()
            assert 60 < count < 140 if len(choices) == 2 else 150 < count < 420, count  # two of these may do the same


def test_rand_augment_reads_crops_that_are_rounded_to_bytes():
    """Cut off instead of rounded, images would be darker than in evaluation."""
    pixels, own = (IMAGES * 255).byte(), {"crop_scale": (0.3, 1.0), "horizontal_flip": 0.5}
    transform = TrainTransform(config(rand_augment=1, **own), PLAIN, seed=0)
    cropped = cropped_one_by_one(transform, pixels.float()).round().byte()
    plain = TrainTransform(config(rand_augment=1), PLAIN, seed=0)(cropped, keys(1, 6))
    assert torch.allclose(transform(pixels, keys(1, 6)), plain, atol=1e-6)


def cropped_one_by_one(transform, images):
    """Torchvision's crops of images (6, C, 40, 52), mirrored, with the draws of epoch 1."""
    draws, cropped = transform.draw_crops(keys(1, 6)), []
    assert 0 < draws.mirrored.sum() < 6
    for place, image in enumerate(images):
        (box,) = transform.boxes(np.array([[40, 52]]), draws.sample(place)).tolist()
        part = reference.resized_crop(image, *box, [16, 16], antialias=True)
        cropped.append(part.flip(2) if draws.mirrored[place] else part)
    return torch.stack(cropped)


def config(**changes):
    return DataConfig(dataset="fake", **{"image_size": 16, **changes})


EVERYTHING = {"crop_scale": (0.3, 1.0), "crop_ratio": (0.75, 1.33), "horizontal_flip": 0.5, "color_jitter": 0.4}
EVERYTHING |= {"random_affine": 0.5, "rand_augment": 2}


def test_a_samples_augmentation_depends_on_seed_epoch_and_index_alone():
    pixels = (IMAGES * 255).byte()
    transform = TrainTransform(config(**EVERYTHING), PLAIN, seed=0)
    together = transform(pixels, keys(1, 6))
    assert together.shape == (6, 3, 16, 16) and together.dtype == torch.float32
    # Products of other sizes are summed in another order: equal up to rounding, not to the bit.
    assert torch.allclose(transform(pixels[2:4], keys(1, 6)[2:4]), together[2:4], atol=1e-5)
    assert torch.equal(transform(pixels, keys(1, 6)), together)
    assert not torch.allclose(transform(pixels, keys(2, 6)), together, atol=0.1)
    assert not torch.allclose(
        TrainTransform(config(**EVERYTHING), PLAIN, seed=1)(pixels, keys(1, 6)), together, atol=0.1
    )


def test_without_augmentation_pixels_are_only_normalized():
    pixels = (IMAGES[:, :, :16, :16] * 255).byte()
    stats = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    expected = (pixels / 255 - torch.tensor(stats[0])[:, None, None]) / torch.tensor(stats[1])[:, None, None]
    assert torch.allclose(TrainTransform(config(), stats, 0)(pixels, keys(0, 6)), expected, atol=1e-6)
    assert torch.allclose(EvalTransform(config(), stats)(pixels), expected, atol=1e-6)


def test_flips_happen_as_often_as_asked_and_are_mirror_images():
    pixels = (torch.rand(1, 3, 16, 16) * 255).byte().expand(400, -1, -1, -1)
    plain = TrainTransform(config(), PLAIN, 0)(pixels, keys(0, 400))
    flipped = TrainTransform(config(horizontal_flip=0.25), PLAIN, 0)(pixels, keys(0, 400))
    is_mirrored = (flipped == plain.flip(3)).flatten(1).all(dim=1)
    assert ((flipped == plain).flatten(1).all(dim=1) ^ is_mirrored).all()
    assert 70 < is_mirrored.sum() < 130


def test_crops_of_files_and_of_memory_are_the_same():
    """A file's crop is cut and mirrored before the batch is made; the rest of the augmentation is the same."""
    transform = TrainTransform(config(**EVERYTHING), PLAIN, seed=0)
    cropped = cropped_one_by_one(transform, IMAGES)
    assert distance(transform(cropped, keys(1, 6), is_cropped=True), transform(IMAGES, keys(1, 6))) < 1e-4


def test_evaluation_takes_the_largest_centered_box():
    seen = EvalTransform(config(image_size=20), PLAIN)(IMAGES)
    expected = reference.resize(IMAGES[:, :, :, 6:46], [20, 20], antialias=True)
    assert distance(seen, expected) < TOLERANCE
