"""Image files: which ones are read, and how they are opened."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hjepa_engine.errors import RunError

#: Pillow's formats that hold pixels which it decodes by itself, the frequent ones first. Without those that it only
#: identifies (BUFR, GRIB, HDF5, MPEG, WMF) or hands on to other programs (EPS), and without containers of files (IPTC).
# fmt: off
_FORMATS = (
    "JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "BLP", "CUR", "DCX", "DDS", "DIB",
    "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "IMT", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI",
    "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB",
)
# fmt: on
Image.init()
#: Names of image files end in one of these, in any case of letters.
IMAGE_EXTENSIONS = frozenset(
    {".npy", *(end for end, kind in Image.registered_extensions().items() if kind in {*_FORMATS, "MPO"})}
)
#: Most pixels of an image by default: where Pillow refuses one.
MAX_PIXELS = 178_956_970
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Pillow and tifffile warn of what they then read or refuse, without the name of the file; sizes are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class DamagedImageError(ValueError):
    """An image that cannot be read, or whose pixels have no known meaning; the message is one line without its name."""


@contextmanager
def damage() -> Iterator[None]:
    """Turn whatever a decoder raises on a file's contents into a :class:`DamagedImageError`."""
    try:
        yield
    except (DamagedImageError, MemoryError, RunError):
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DamagedImageError(reason or " ".join(str(error).split()) or type(error).__name__) from error


def open_image(source: Path | bytes, name: str) -> Image.Image | NDArray[Any]:
    """Open an image: what Pillow reads, not decoded yet; an array from ``.npy`` and from a TIFF that Pillow cannot read.

    Args:
        source: the file, or its contents.
        name: its name, whose ending tells an array.

    Raises:
        DamagedImageError: the file is missing, empty, damaged or of another kind.
    """
    with damage():
        if name.lower().endswith(".npy"):
            return _open_array(source)
        return _open_with_pillow(source)


def read_bands(source: Path | bytes) -> NDArray[Any]:
    """All bands (H, W) or (H, W, C) of a TIFF's first page, read by tifffile.

    Raises:
        DamagedImageError: tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise DamagedImageError("Pillow cannot read this TIFF, tifffile can: pip install tifffile") from error
    with tifffile.TiffFile(BytesIO(source) if isinstance(source, bytes) else source) as file:
        page = file.pages.first
        check_size(page.shape[-2:] if page.axes.startswith("S") else page.shape[:2])
        if page.dtype is None or page.dtype.itemsize * np.prod(page.shape, dtype=float) > 32 * MAX_PIXELS:
            raise DamagedImageError(f"a TIFF of shape {page.shape} is too large")
        bands = page.asarray()
    if page.axes.startswith("S"):
        bands = np.moveaxis(bands, 0, -1)
    if bands.dtype.kind == "i":  # the sign bit is no part of the range
        if bands.min() < 0:
            raise DamagedImageError(f"pixels must be at least 0, got {bands.min()}")
        bands = (bands / np.iinfo(bands.dtype).max).astype(np.float32)
    return bands


def check_size(size: tuple[int, ...], max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image without pixels, or with more than ``max_pixels``."""
    first, second = size
    if first * second > max_pixels:
        raise DamagedImageError(f"{first * second} pixels are more than data.max_pixels {max_pixels}")
    if first * second < 1:
        raise DamagedImageError("an image without pixels")


def _open_with_pillow(source: Path | bytes) -> Image.Image | NDArray[Any]:
    """``Image.open`` without its limit of pixels: some formats can be decoded at a reduced size."""
    if isinstance(source, bytes):
        start = source[:16]
    else:
        with source.open("rb") as file:
            start = file.read(16)
    if not start:
        raise DamagedImageError("the file is empty")
    for kind in _FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))
        accepted = factory is not None and (accept is None or accept(start))
        if (
            factory is None or not accepted or isinstance(accepted, str)
        ):  # a string: Pillow was built without the format
            continue
        try:
            content: Any = BytesIO(source) if isinstance(source, bytes) else str(source)
            return factory(content, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # another format
    if start.startswith(_TIFF):
        return read_bands(source)
    raise DamagedImageError("not an image of a known format")


def _open_array(source: Path | bytes) -> NDArray[Any]:
    data: Any = source
    if not isinstance(source, bytes):
        if not source.stat().st_size:
            raise DamagedImageError("the file is empty")
        data = np.memmap(source, np.uint8, "r")
    header = BytesIO(bytes(data[: 2**16 + 16]))
    version = np.lib.format.read_magic(header)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(header)
    if dtype.hasobject:
        raise DamagedImageError("an array of Python objects is not read")
    count = int(np.prod(shape, dtype=object))
    flat = np.frombuffer(data, dtype, count, header.tell())
    return flat.reshape(shape, order="F" if columns_first else "C")
