"""Pixels of any image: upright, in the channels and the size that are asked for."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from hjepa_engine.data.arrays import Box, bands_last, cut_array, in_unit_range, wrong_bands
from hjepa_engine.data.decode import MAX_PIXELS, DamagedImageError, check_size, damage, read_bands

#: Left, top, right, bottom, as Pillow has it.
_Edges = tuple[float, float, float, float]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAMPLES, _BITS, _SAMPLE_FORMAT, _PHOTOMETRIC = 277, 258, 339, 262  # tags of a TIFF


def image_size(image: Any, channels: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an image that is turned as its EXIF orientation says.

    Args:
        image: a PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W).
        channels: bands wanted, which helps to tell (H, W, C) from (C, H, W).
        max_pixels: an image with more is not decoded for its orientation.

    Raises:
        DamagedImageError: the image cannot be read.
    """
    with damage():
        if isinstance(image, Image.Image):
            width, height = image.size
            return (width, height) if _orientation(image, max_pixels) >= 5 else (height, width)
        height, width, _ = bands_last(image, channels).shape
        return height, width


def to_pixels(
    image: Any, channels: int, size: tuple[int, int], box: Box | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """The pixels (C, H, W) of a part of an image, resized to ``size``: bilinear, antialiased.

    An image of 8 bits (or 1) gives uint8; all others give float32 from 0 to 1, as shares of their type's range. The alpha
    channel is dropped. Gray is repeated for three channels, color becomes its luma for one; other numbers of channels must
    be the image's own.

    Args:
        image: a PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W).
        channels: C.
        size: H and W.
        box: top, left, height and width of the part, in the upright image; None: all of it.
        max_pixels: largest number of pixels to decode; JPEG and JPEG 2000 are decoded at a reduced size then.

    Raises:
        DamagedImageError: the image cannot be read, is too large, or has other channels or values.
    """
    with damage():
        if isinstance(image, Image.Image) and not _has_more_bands(image, channels):
            part, edges = _cut(image, size, box, max_pixels)
            parts = _split(_in_channels(part, channels))
        else:
            array = _own_bands(image) if isinstance(image, Image.Image) else image
            parts, edges = cut_array(array, channels, box, max_pixels), None
        height, width = size
        resized = [part.resize((width, height), Image.Resampling.BILINEAR, edges) for part in parts]
        if len(resized) == 1 and resized[0].mode == "RGB":
            return torch.from_numpy(np.array(resized[0])).permute(2, 0, 1).contiguous()
        bands = torch.from_numpy(np.stack([np.asarray(band) for band in resized]))
        bands = bands.expand(channels, -1, -1).contiguous()
        return bands if bands.dtype == torch.uint8 else bands.clamp_(0, 1)


# PIL images


def _orientation(image: Image.Image, max_pixels: int) -> int:
    """The EXIF orientation, 1 to 8; a PNG may have it behind its pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        if image.width * image.height > max_pixels:
            return 1
        image.load()
    found = image.getexif().get(0x0112, 1)
    return found if found in _TURNS else 1


def _cut(
    image: Image.Image, size: tuple[int, int], box: Box | None, max_pixels: int
) -> tuple[Image.Image, _Edges | None]:
    """The part of an image, upright, decoded as small as ``size`` allows, and the exact edges in it."""
    turn = _orientation(image, max_pixels)
    full = image.size
    upright = full[::-1] if turn >= 5 else full
    top, left, height, width = box or (0, 0, upright[1], upright[0])
    edges = _turn_back((left, top, left + width, top + height), turn, full)
    across, down = size[::-1] if turn < 5 else size
    shrunk = min((edges[2] - edges[0]) / across, (edges[3] - edges[1]) / down)
    scale = _decode_smaller(image, shrunk, max_pixels)
    if image.mode.startswith(("I", "F")):
        image = _in_range(image)
    edges = tuple(edge / scale for edge in edges)  # type: ignore[assignment]
    first = [math.floor(edge) for edge in edges[:2]]
    last = [min(math.ceil(edge), most) for edge, most in zip(edges[2:], image.size, strict=True)]
    if first != [0, 0] or last != list(image.size):
        image = image.crop((first[0], first[1], last[0], last[1]))
    exact = tuple(edge - first[at % 2] for at, edge in enumerate(edges))
    inside: _Edges | None = None
    if scale > 1:
        inside = _turn(tuple(map(min, exact, (*image.size, *image.size))), turn, image.size)  # type: ignore[arg-type]
    return (image.transpose(_TURNS[turn]) if turn in _TURNS else image), inside


def _turn(edges: _Edges, turn: int, size: tuple[int, int]) -> _Edges:
    """A box of an image of ``size`` (W, H) after a turn."""
    left, top, right, bottom = _mirror(edges, turn, size)
    return (top, left, bottom, right) if turn >= 5 else (left, top, right, bottom)


def _turn_back(edges: _Edges, turn: int, size: tuple[int, int]) -> _Edges:
    """A box of a turned image in the image before, of ``size`` (W, H)."""
    left, top, right, bottom = edges
    return _mirror((top, left, bottom, right) if turn >= 5 else edges, turn, size)


def _mirror(edges: _Edges, turn: int, size: tuple[int, int]) -> _Edges:
    left, top, right, bottom = edges
    if turn in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if turn in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _decode_smaller(image: Image.Image, shrunk: float, max_pixels: int) -> int:
    """Decode an image, at a reduced size where its format can and needs it; returns the factor.

    Args:
        image: not decoded yet, else its factor is 1.
        shrunk: how many of its pixels become one, at least.
        max_pixels: see :func:`to_pixels`.
    """
    width, height = image.size

    def pixels(scale: int) -> int:
        return -(-width // scale) * -(-height // scale)

    scale = 1
    if image.format in ("JPEG", "MPO") and getattr(image, "tile", None):
        scale = max(each for each in (1, 2, 4, 8) if each == 1 or shrunk >= each)
        while pixels(scale) > max_pixels and scale < 8:
            scale *= 2
        if scale > 1:
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
    elif image.format == "JPEG2000" and getattr(image, "tile", None) and pixels(1) > max_pixels:
        power = next((power for power in range(1, 6) if pixels(2**power) <= max_pixels), 0)
        scale = 2**power
        if power:
            image.reduce = power  # type: ignore[assignment, method-assign]
    check_size((-(-height // scale), -(-width // scale)), max_pixels)
    image.load()
    return scale


def _in_range(image: Image.Image) -> Image.Image:
    """Integers of 16 or 32 bits, or floats, as floats from 0 to 1."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    pixels: NDArray[Any] = np.asarray(image)
    if image.mode == "F":
        pixels = in_unit_range(pixels)
    else:
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        bits = tags.get(_BITS, (16,))[0] if tags else 16
        if image.mode == "I" and image.format not in ("TIFF", "PNG", "PPM"):
            bits, signed = 32, True  # Pillow's own integers
        if image.mode == "I" and bits == 32 and not signed:
            pixels = pixels.astype(np.int32).view(np.uint32)
        if pixels.min() < 0:
            raise DamagedImageError(f"pixels must be at least 0, got {pixels.min()}")
        pixels = pixels / float(2 ** (bits - signed) - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0
        pixels = 1 - pixels
    return Image.fromarray(pixels.astype(np.float32))


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of 8 bits or of floats from 0 to 1 in ``channels``; what is gray may stay so for three."""
    mode = image.mode
    if mode == "F":
        if channels not in (1, 3):
            raise wrong_bands(1, channels)
        return image
    if mode == "1":
        image = image.convert("L")
    elif mode in ("P", "PA"):
        # Through RGBA, as Pillow's documentation says: a transparent color may be several bytes.
        image = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB")
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    elif mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_rgb())  # type: ignore[assignment]
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    bands = len(image.getbands())
    if bands == channels or (bands == 1 and channels == 3):
        return image
    if channels not in (1, 3):
        raise wrong_bands(bands, channels, mode)
    if channels == 1 and bands == 2:
        return image.getchannel(0)
    return image.convert("L" if channels == 1 or bands == 2 else "RGB")


@cache
def _lab_to_rgb() -> Any:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _split(image: Image.Image) -> list[Image.Image]:
    """Bands apart where Pillow would multiply them by alpha when it resizes."""
    return list(image.split()) if image.mode in ("LA", "RGBA") else [image]


# TIFF with more bands than Pillow reads


def _has_more_bands(image: Image.Image, channels: int) -> bool:
    """Whether a TIFF has bands that Pillow leaves out; one that is too many is left out as an alpha channel is.

    Raises:
        DamagedImageError: it has more, and another number than ``channels``.
    """
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    samples, bands = tags.get(_SAMPLES, 1), len(image.getbands())
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        return True  # Pillow takes signed bytes for unsigned ones
    if samples > bands + 1 and samples != channels:
        raise wrong_bands(samples, channels)
    return samples > bands and samples == channels


def _own_bands(image: Image.Image) -> NDArray[Any]:
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    return read_bands(file.read())
