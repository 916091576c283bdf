"""Measure how fast images are read and augmented, beside a plain torchvision pipeline of the same steps.

    OMP_NUM_THREADS=1 python recipes/benchmarks/data.py                     # 1 s per cell, a minute or two
    OMP_NUM_THREADS=1 python recipes/benchmarks/data.py --seconds 10        # for figures to keep

Random resized crops (area 0.2 to 1), flips and normalization. Plain is torchvision's ``ImageFolder`` (in memory: a list of
PIL images) with ``v2.RandomResizedCrop``, ``RandomHorizontalFlip``, ``ToImage``, ``ToDtype`` and ``Normalize`` of each image
in a ``DataLoader``. Both take turns in one process; workers are started, and files read once, before the clock runs.
The JPEG files are made here, of noise in four scales: 70 kB at 500 x 375. docs/benchmarks.md quotes the output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hjepa_engine import load_config
from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import DatasetSplit, build_loader, open_split
from hjepa_engine.data.loading import ImageLoader
from hjepa_engine.data.memory import MemoryImages
from hjepa_engine.recipes import pack
from hjepa_engine.recipes.benchmarks import machine
from hjepa_engine.recipes.benchmarks.monitoring import OFF, QUIET
from hjepa_engine.recipes.pretrain import DEFAULT_CONFIG, build

BATCH, SCALE, RATIO = 64, (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROUNDS = 4


class PlainImages(Dataset[tuple[torch.Tensor, int]]):
    """PIL images in memory, augmented one by one."""

    def __init__(self, images: list[Image.Image], transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), 0


def plain_transform(size: int) -> v2.Compose:
    """The same augmentation, image by image."""
    steps = [
        *(v2.RandomResizedCrop(size, SCALE, RATIO), v2.RandomHorizontalFlip()),
        *(v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)),
    ]
    return v2.Compose(steps)


def picture(number: int, width: int, height: int) -> Image.Image:
    """Noise of four scales: as many bytes and edges as a photo of the same size."""
    rng = np.random.default_rng(number)
    layers = []
    for columns, strength in ((8, 0.4), (32, 0.3), (128, 0.2), (500, 0.1)):
        noise = rng.integers(256, size=(max(1, columns * height // width), columns, 3), dtype=np.uint8)
        enlarged = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        layers.append(strength * np.asarray(enlarged, dtype=np.float32))
    return Image.fromarray(np.sum(layers, axis=0).clip(0, 255).astype(np.uint8))


def write_files(folder: Path, number: int, width: int, height: int) -> float:
    """Write JPEGs of two classes; their mean size in kB."""
    sizes = []
    for index in range(number):
        path = folder / "train" / f"class_{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index, width, height).save(path, quality=90)
        sizes.append(path.stat().st_size / 1e3)
    return statistics.mean(sizes)


def images_per_second(loaders: dict[str, Iterable[Any]], seconds: float) -> dict[str, list[float]]:
    """Speed of each loader in rounds that they take in turn, each ``seconds / ROUNDS`` long and at least one epoch."""
    for loader in loaders.values():
        for _ in loader:  # starts workers, and brings files into the page cache
            pass
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            seen, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds / ROUNDS:
                for batch in loader:
                    seen += len(batch["images"] if isinstance(batch, dict) else batch[0])
            speeds[name].append(seen / (time.perf_counter() - began))
    return speeds


def print_rows(what: str, workers: int, speeds: dict[str, list[float]]) -> None:
    """A line of the table for each of our loaders."""
    plain = speeds.pop("plain")
    for name, ours in speeds.items():
        ratios = [one / other for one, other in zip(ours, plain, strict=True)]
        low, middle, high = (pick(ratios) for pick in (min, statistics.median, max))
        figures = f"{statistics.median(plain):11.0f} {statistics.median(ours):11.0f}"
        print(f"{name}, {what:26} {workers:7} {figures}   {middle:5.2f} x ({low:.2f} to {high:.2f})", flush=True)


def data_config(size: int, workers: int, **changed: Any) -> DataConfig:
    """The data section of every case."""
    return DataConfig(
        **{"dataset": "imagefolder", "image_size": size, "batch_size": BATCH, "num_workers": workers, **changed},
        crop_scale=SCALE,
        crop_ratio=RATIO,
        horizontal_flip=0.5,
        val_fraction=0.01,
        pin_memory=False,
    )


def plain_loader(images: Dataset[Any], workers: int) -> DataLoader[Any]:
    """Torch's loader as most programs use it."""
    return DataLoader(
        images, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=bool(workers)
    )


def memory_rows(size: int, number: int, seconds: float) -> None:
    """Images that lie in memory."""
    images = [picture(index, size, size) for index in range(number)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    ours = MemoryImages(pixels, torch.zeros(number, dtype=torch.int64))
    split = DatasetSplit(ours, ("a",), (MEAN, STD))
    for workers in (0, 2):  # ours has none
        loaders: dict[str, Iterable[Any]] = {
            "plain": plain_loader(PlainImages(images, plain_transform(size)), workers),
            "memory": build_loader(data_config(size, workers), split, 0, train=True),
        }
        print_rows(f"{size} x {size}", workers, images_per_second(loaders, seconds))


def folder_rows(size: int, shape: tuple[int, int], number: int, seconds: float) -> None:
    """JPEG files."""
    with TemporaryDirectory() as folder:
        kilobytes = write_files(Path(folder) / "folder", number, *shape)
        pack.main([f"{folder}/folder", f"{folder}/packed"])
        for workers in (0, 1, 2):
            plain = ImageFolder(f"{folder}/folder/train", plain_transform(size))
            loaders: dict[str, Iterable[Any]] = {"plain": plain_loader(plain, workers)}
            ours = list[ImageLoader]()
            files = {"dataset": "imagefolder", "data_path": f"{folder}/folder"}
            packed = {"dataset": "packed", "data_path": f"{folder}/packed"}
            for name, changed in (("folder", files), ("packed", packed), ("memory", {**files, "in_memory": True})):
                config = data_config(size, workers, **changed)
                ours.append(build_loader(config, open_split(config, "train"), 0, train=True))
                loaders[name] = ours[-1]
            what = f"{shape[0]} x {shape[1]} ({kilobytes:.0f} kB) to {size}"
            print_rows(what, workers, images_per_second(loaders, seconds))
            for loader in ours:
                loader.close()


def packed_start(rows: int = 1000, shards: int = 1281) -> None:
    """Time to open both splits of many packed images: one file, linked under as many names as ImageNet's would have."""
    with TemporaryDirectory() as folder:
        write_files(Path(folder) / "folder", rows, 32, 32)
        pack.main([f"{folder}/folder", f"{folder}/packed"])
        packed = Path(folder) / "packed"
        description = json.loads((packed / "pack.json").read_text(encoding="utf-8"))
        (name, size), *_ = description["splits"]["train"]
        links = [(f"{number}_{Path(name).name}", size) for number in range(shards)]
        for link, _ in links:
            (packed / link).hardlink_to(packed / name)
        description["splits"]["train"] = links
        (packed / "pack.json").write_text(json.dumps(description), encoding="utf-8")
        config = data_config(32, 0, dataset="packed", data_path=str(packed))
        for attempt in ("first", "again"):
            began = time.perf_counter()
            train, val = open_split(config, "train"), open_split(config, "val")
            first = next(iter(build_loader(config, train, 0, train=True)))
            passed, number = time.perf_counter() - began, len(train.images) + len(val.images)
            print(
                f"packed, {number:,} images in {shards:,} files, {attempt}: {passed:.2f} s to {len(first['images'])} images"
            )


def data_wait(seconds: float) -> None:
    """Share of the default run that it waits for batches."""
    with TemporaryDirectory() as folder:
        off = [*QUIET, *OFF, f"--run_dir={folder}"]
        run = build(load_config(DEFAULT_CONFIG, off))
        marks: list[tuple[float, float]] = []
        started: list[float] = []
        add, clock = run.trainer.add_event_handler, time.perf_counter
        add(Events.GET_BATCH_STARTED, lambda: started.append(clock()))
        add(Events.GET_BATCH_COMPLETED, lambda: marks.append((started[-1], clock())))
        run.trainer.run(run.data, max_iters=max(40, round(20 * seconds)))
        run.preemption.close()
    each = 1e3 * statistics.median(end - begin for begin, end in marks[10:])
    step = 1e3 * statistics.median(later - earlier for (earlier, _), (later, _) in pairwise(marks[10:]))
    print(f"default run: {each:.2f} of {step:.1f} ms per step are data wait, {100 * each / step:.1f} %")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each loader of a row")
    seconds = parser.parse_args().seconds
    print(machine() + "\n")
    print(f"batches of {BATCH}                      workers    plain / s    ours / s   ours / plain ({ROUNDS} rounds)")
    memory_rows(32, 2048, seconds)
    folder_rows(32, (32, 32), 1024, seconds)
    folder_rows(224, (500, 375), 256, seconds)
    packed_start()
    data_wait(seconds)


if __name__ == "__main__":
    main()
