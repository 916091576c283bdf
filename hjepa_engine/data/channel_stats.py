"""Mean and standard deviation of the channels: given, the data set's own, or measured on a sample of its images."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.crops import center_box
from hjepa_engine.data.decode import DamagedImageError, damage
from hjepa_engine.data.pixels import image_size, to_pixels
from hjepa_engine.data.split import DatasetSplit, Stats
from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import derive_seed

#: Images that are measured.
SAMPLE = 1024
#: A channel that varies less is constant: it is not scaled.
_CONSTANT = 1e-4


def with_stats(config: DataConfig, split: DatasetSplit, train: DatasetSplit, seed: int) -> DatasetSplit:
    """A split with the mean and the standard deviation that the configuration asks for.

    Args:
        config: the data section.
        split: the split, with the data set's own numbers; it has none for another number of channels.
        train: the training images, which are measured if need be.
        seed: seed of the sample.
    """
    has_own = len(split.stats[0]) == config.channels
    measured = any(given == "auto" or (given is None and not has_own) for given in (config.mean, config.std))
    sample: Stats = measure_stats(config, train, seed) if measured else ((), ())
    stats = tuple(
        tuple(given) if isinstance(given, list) else own if given is None and has_own else found
        for given, own, found in zip((config.mean, config.std), split.stats, sample, strict=True)
    )
    contents = split.contents
    if measured:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in stats)
        images = min(SAMPLE, len(train.images))
        note = f"mean {mean} and standard deviation {std} of the channels were measured on {images:,} images"
        contents = replace(contents, notes=(*contents.notes, note))
    return replace(split, stats=(stats[0], stats[1]), contents=contents)


def measure_stats(config: DataConfig, split: DatasetSplit, seed: int) -> Stats:
    """Mean and standard deviation of each channel, to six digits, over the centers of up to 1,024 images of a split.

    The same images, and so the same numbers, for the same split and seed; a channel that is constant gets 1.

    Raises:
        DataError: none of them can be read.
    """
    total, count = len(split.images), min(SAMPLE, len(split.images))
    starts = [number * total // count for number in range(count + 1)]
    chosen = [first + derive_seed(seed, "channel stats", first) % (last - first) for first, last in pairwise(starts)]
    sums = torch.zeros(2, config.channels, dtype=torch.float64)
    read, reason = 0, ""
    for index in chosen:
        try:
            with damage():
                image = split.images[index][0]
            box = center_box(image_size(image, config.channels, config.max_pixels), config.size)
            pixels = to_pixels(image, config.channels, config.size, box, config.max_pixels)
        except DamagedImageError as error:
            reason = f"{split.name_of(index)}: {error}"
            continue
        values = pixels.double().flatten(1) / (255 if pixels.dtype == torch.uint8 else 1)
        sums += torch.stack([values.mean(dim=1), values.square().mean(dim=1)])
        read += 1
    if not read:
        raise DataError(f"no image could be read to measure data.mean and data.std, the last one: {reason}")
    mean = sums[0] / read
    std = (sums[1] / read - mean.square()).clamp(min=0).sqrt()
    std[std < _CONSTANT] = 1
    return tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist())
