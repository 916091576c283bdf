"""From keys to the pixels of a batch: what loader processes do, or the main process itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.augment import TrainTransform
from hjepa_engine.data.crops import CropDraws, center_box
from hjepa_engine.data.decode import DamagedImageError, damage
from hjepa_engine.data.memory import BatchedImages, in_channels
from hjepa_engine.data.pixels import image_size, to_pixels
from hjepa_engine.data.sampler import SampleKey
from hjepa_engine.data.split import UNLABELED, DatasetSplit
from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import derive_seed, seed_everything

_MAX_ATTEMPTS = 8


class PixelBatch(NamedTuple):
    """Images that are read, but not normalized; of augmentation, crops and flips are done unless they come out of memory."""

    pixels: Tensor
    """(B, C, H, W), uint8, or float32 from 0 to 1."""
    labels: Tensor
    """(B,); -1: none."""
    keys: NDArray[np.int64]
    """Epoch and index that each image was asked for by, (B, 2)."""
    damaged: list[str]
    """``name: reason`` of each image that could not be read."""


class ImageReader(Dataset[PixelBatch]):
    """The pixels of samples by (epoch, index).

    An image that cannot be read is replaced in training by another one, chosen by the same key; elsewhere it is left out.

    Args:
        config: the data section.
        split: images and labels.
        seed: seed of the run.
        augment: the training's augmentation, which chooses the crops; None: the largest centered box is cut out.
    """

    def __init__(
        self, config: DataConfig, split: DatasetSplit, seed: int, augment: TrainTransform | None = None
    ) -> None:
        self.config, self.split, self.seed, self.augment = config, split, seed, augment

    def __len__(self) -> int:
        return len(self.split.images)

    @property
    def is_batched(self) -> bool:
        """Whether whole batches come out of memory, in their own size."""
        return isinstance(self.split.images, BatchedImages)

    def __getitems__(self, keys: list[SampleKey]) -> PixelBatch:
        """Read a batch.

        Raises:
            DataError: images in a row cannot be read.
        """
        asked = np.array(keys, dtype=np.int64).reshape(-1, 2)
        images = self.split.images
        if isinstance(images, BatchedImages):
            pixels, classes = images.gather(asked, self.seed)
            return PixelBatch(in_channels(pixels, self.config.channels), classes, asked, [])
        found: list[tuple[Tensor, int]] = []
        kept: list[bool] = []
        damaged: list[str] = []
        draws = None if self.augment is None else self.augment.draw_crops(asked)
        for place, key in enumerate(keys):
            sample = self._read(key, draws and draws.sample(place), damaged)
            kept.append(sample is not None)
            if sample is not None:
                found.append(sample)
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        return PixelBatch(self._stack([pixels for pixels, _ in found]), labels, asked[kept], damaged)

    def _stack(self, images: list[Tensor]) -> Tensor:
        if not images:
            return torch.zeros(0, self.config.channels, *self.config.size, dtype=torch.uint8)
        if len({image.dtype for image in images}) > 1:
            images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
        return torch.stack(images)

    def _read(self, key: SampleKey, draws: CropDraws | None, damaged: list[str]) -> tuple[Tensor, int] | None:
        epoch, wanted = key
        for attempt in range(_MAX_ATTEMPTS if self.augment else 1):
            index = wanted if attempt == 0 else derive_seed(self.seed, "substitute", epoch, wanted, attempt) % len(self)
            if self.split.draws:
                seed_everything(self.seed, "sample", epoch, wanted)
            try:
                with damage():
                    sample = self.split.images[index]
                image, label = sample if isinstance(sample, tuple) else (sample, UNLABELED)
                return self._pixels(image, draws), UNLABELED if label is None else int(label)
            except DamagedImageError as error:
                damaged.append(f"{self.split.name_of(index)}: {error}")
        if self.augment is None:
            return None
        raise DataError(f"{_MAX_ATTEMPTS} images in a row could not be read, the last one: {damaged[-1]}")

    def _pixels(self, image: Any, draws: CropDraws | None) -> Tensor:
        config = self.config
        size = image_size(image, config.channels, config.max_pixels)
        box: Any = center_box(size, config.size)
        if self.augment is not None and draws is not None:
            boxes = self.augment.boxes(np.array([size]), draws)
            box = None if boxes is None else tuple(boxes[0].tolist())
        pixels = to_pixels(image, config.channels, config.size, box, config.max_pixels)
        return pixels.flip(2) if draws is not None and draws.mirrored is not None and draws.mirrored[0] else pixels


def as_is(batch: Any) -> Any:
    """The ``collate_fn`` of batches that are collated already."""
    return batch
