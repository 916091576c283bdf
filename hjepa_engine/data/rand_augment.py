"""RandAugment of a whole batch, by torchvision's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torchvision.transforms.v2 import functional as tv

#: The largest magnitude.
STRONGEST = 30

Operation = Callable[[Tensor], Tensor]


def rand_augment(images: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """Apply random operations of RandAugment (arXiv:1909.13719) to each image, one after the other.

    They are those of torchvision's ``v2.RandAugment``, as strong as there. That draws once for a whole batch; here, each
    image has its own operations, and images with the same one are computed together.

    Args:
        images: (B, C, H, W), uint8; C is 1 or 3.
        draws: uniform numbers, (B, 2 N): of each of N operations which one it is, and its sign.
        magnitude: how strong all are, from 0 to :data:`STRONGEST`.

    Returns:
        (B, C, H, W), uint8.
    """
    known = operations(magnitude, (images.shape[2], images.shape[3]))
    for which, sign in (pair.unbind(dim=1) for pair in draws.split(2, dim=1)):
        chosen = 2 * (which * len(known)).long() + (sign < 0.5)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            images = images.index_copy(0, rows, known[number // 2][number % 2](images[rows]))
    return images


def operations(magnitude: int, size: tuple[int, int]) -> list[tuple[Operation, Operation]]:
    """Each operation on images (B, C, H, W) of ``size``, and the one of the other sign (the same, where it has none)."""
    share = magnitude / STRONGEST

    def shear(x: float, y: float) -> Operation:
        degrees = [math.degrees(math.atan(0.3 * share * factor)) for factor in (x, y)]
        return partial(tv.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0.0, 0.0])

    def shift(x: float, y: float) -> Operation:
        pixels = [int(150 / 331 * share * side * factor) for side, factor in zip(size[::-1], (x, y), strict=True)]
        return partial(tv.affine, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])

    def factors(adjust: Operation, name: str) -> tuple[Operation, Operation]:
        more, less = (partial(adjust, **{name: 1 + sign * 0.9 * share}) for sign in (1, -1))
        return more, less

    unsigned = [
        lambda images: images,
        partial(tv.posterize, bits=8 - round(4 * share)),
        partial(tv.solarize, threshold=255 * (1 - share)),
        tv.autocontrast,
        tv.equalize,
    ]
    return [
        (shear(1, 0), shear(-1, 0)),
        (shear(0, 1), shear(0, -1)),
        (shift(1, 0), shift(-1, 0)),
        (shift(0, 1), shift(0, -1)),
        (partial(tv.rotate, angle=30 * share), partial(tv.rotate, angle=-30 * share)),
        factors(tv.adjust_brightness, "brightness_factor"),
        factors(tv.adjust_saturation, "saturation_factor"),
        factors(tv.adjust_contrast, "contrast_factor"),
        factors(tv.adjust_sharpness, "sharpness_factor"),
        *((operation, operation) for operation in unsigned),
    ]
