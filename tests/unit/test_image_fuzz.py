"""Mutated image files: read or damaged, never anything else, and soon."""

import random
import time
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hjepa_engine.data.decode import DamagedImageError, open_image
from hjepa_engine.data.pixels import image_size, to_pixels

#: Longest time for one file, and most pixels to decode.
SECONDS, MAX_PIXELS = 5.0, 2**22


@cache
def seeds():
    """Small valid files in every format and mode that Pillow writes, and arrays: name and contents."""
    Image.init()
    files = []
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "F", "CMYK", "LA"):
            stream = BytesIO()
            image = Image.fromarray(pixels).convert("F" if mode == "I;16" else mode)
            try:
                image.convert(mode).save(
                    stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {})
                )
            except Exception:
                continue  # the format does not have this mode, or Pillow cannot write it here
            files.append((f"{kind} {mode}", stream.getvalue()))
    for name, array in (("five bands", np.resize(pixels, (9, 9, 5))), ("float64", pixels[:, :, 0] / 255)):
        stream = BytesIO()
        tifffile.imwrite(
            stream, array, photometric="minisblack", **({"planarconfig": "contig"} if array.ndim == 3 else {})
        )
        files.append((f"TIFF {name}", stream.getvalue()))
    for array in (pixels, pixels[:, :, 0].astype(np.uint16), pixels / 255):
        stream = BytesIO()
        np.save(stream, array)
        files.append((f"{array.dtype}.npy", stream.getvalue()))
    return files


def mutate(content, rng):
    """Change, repeat, drop or cut a few bytes, most often near the start, where headers are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        at = rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), 200))
        how = rng.randrange(6)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif how == 3:
            data[at:at] = data[at : at + rng.randrange(1, 33)]
        elif how == 4:
            data[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00")
            )
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def survive(number, seed):
    """Read ``number`` mutated files; returns how many were read and how many were damaged."""
    rng, files = random.Random(seed), seeds()
    read, lines = 0, []
    for count in range(number):
        name, content = files[count % len(files)]
        content, channels, began = mutate(content, rng), rng.choice((1, 1, 3, 3, 3, 3, 4, 5)), time.monotonic()
        try:
            image = open_image(content, name)
            size = image_size(image, channels, MAX_PIXELS)
            box = (0, 0, size[0] // 2 + 1, size[1] // 2 + 1) if rng.random() < 0.5 else None
            pixels = to_pixels(image, channels, (8, 12), box, MAX_PIXELS)
            assert pixels.shape == (channels, 8, 12) and (pixels.dtype == torch.uint8 or torch.isfinite(pixels).all())
            read += 1
        except DamagedImageError as error:
            lines.append(str(error))
        except Exception as error:
            raise AssertionError(f"{name}, file {count} of seed {seed}") from error
        assert time.monotonic() - began < SECONDS, f"{name}, file {count} of seed {seed}"
    assert all(line and "\n" not in line for line in lines)
    return read, len(lines)


def test_the_files_to_mutate_are_of_many_kinds():
    names = [name for name, _ in seeds()]
    assert len(names) > 60 and len({name.split()[0] for name in names}) > 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_300_mutated_files_are_read_or_damaged():
    read, damaged = survive(300, seed=1)
    assert read > 50 and damaged > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_10_000_mutated_files_are_read_or_damaged():
    read, damaged = survive(10_000, seed=2)
    assert read > 2000 and damaged > 2000
