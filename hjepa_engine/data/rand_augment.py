"""RandAugment of a whole batch, by torchvision's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
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
        images: (B, C, H, W), uint8, on any device; C is 1 or 3.
        draws: uniform numbers in [0, 1), (B, 2 N), on the CPU: of each of N operations which one it is, and its sign.
        magnitude: how strong all are, from 0 to :data:`STRONGEST`.

    Returns:
        (B, C, H, W), uint8.
    """
    known = operations(magnitude, (images.shape[2], images.shape[3]))
    images = images.clone()
    for which, sign in (pair.unbind(dim=1) for pair in draws.split(2, dim=1)):
        chosen = (which * len(known)).long()
        for number, signed in enumerate(known):
            for half, operation in enumerate(signed):
                is_asked = (chosen == number) & ((sign < 0.5) == bool(half) if len(signed) == 2 else True)
                # Found on the CPU: the host would wait for the device with each operation.
                rows = is_asked.nonzero()[:, 0].to(images.device, non_blocking=True)
                if len(rows):
                    images[rows] = operation(images[rows])
    return images


@cache  # else made anew for every batch
def operations(magnitude: int, size: tuple[int, int]) -> list[tuple[Operation, ...]]:
    """Each operation on images (B, C, H, W) of ``size``: with both signs where it has one; none at all for the identity."""

    def strength(first: float, last: float) -> float:
        # As torchvision rounds it: nearest pixels and gray values on an edge depend on the last bit.
        return float(torch.linspace(first, last, STRONGEST + 1)[magnitude])

    def shear(x: float, y: float) -> Operation:
        degrees = [math.degrees(math.atan(strength(0, 0.3) * factor)) for factor in (x, y)]
        return partial(tv.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])

    def shift(x: float, y: float) -> Operation:
        pixels = [int(strength(0, 150 / 331 * side) * factor) for side, factor in zip(size[::-1], (x, y), strict=True)]
        return partial(tv.affine, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])

    def factors(adjust: Operation, name: str) -> tuple[Operation, Operation]:
        more, less = (partial(adjust, **{name: 1 + sign * strength(0, 0.9)}) for sign in (1, -1))
        return more, less

    bits, degrees = round(strength(8, 4)), strength(0, 30)
    unsigned: list[Operation] = [
        partial(tv.posterize, bits=bits),
        partial(tv.solarize, threshold=255 * strength(1, 0)),
        tv.autocontrast,
        tv.equalize,
    ]
    return [
        (shear(1, 0), shear(-1, 0)),
        (shear(0, 1), shear(0, -1)),
        (shift(1, 0), shift(-1, 0)),
        (shift(0, 1), shift(0, -1)),
        (partial(tv.rotate, angle=degrees), partial(tv.rotate, angle=-degrees)),
        factors(tv.adjust_brightness, "brightness_factor"),
        factors(tv.adjust_saturation, "saturation_factor"),
        factors(tv.adjust_contrast, "contrast_factor"),
        factors(tv.adjust_sharpness, "sharpness_factor"),
        *((operation,) for operation in unsigned),
        (),
    ]
