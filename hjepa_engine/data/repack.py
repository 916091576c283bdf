"""What becomes of an image file that is packed: its bytes, or those of a smaller image."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from hjepa_engine.data.decode import DamagedImageError, check_size, damage, open_image

#: Formats whose images have lost something already.
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
#: What a mode is converted to before an image is resized; modes that are not here are not resized.
_MODES = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB"} | {mode: mode for mode in ("L", "LA", "RGB", "RGBA", "I;16")}


class Packed(NamedTuple):
    """An image as it is packed."""

    content: bytes
    reason: str | None = None
    """Why it is not: it is damaged."""


def pack_image(path: str, size: int | None = None, quality: int = 90) -> Packed:
    """Read an image file, decoding it to see that it is whole.

    Args:
        path: the file.
        size: length of the shorter side that larger images are resized to; None: the bytes of the file.
        quality: of JPEG.
    """
    try:
        with damage():
            content = Path(path).read_bytes()
            image = open_image(content, path)
            if not isinstance(image, Image.Image):
                return Packed(content)
            smaller = None if size is None else _resize(image, size)
            if smaller is None:
                _decode(image)
                return Packed(content)
            is_jpeg = image.format in _LOSSY and smaller.mode in ("L", "RGB")
            buffer = BytesIO()
            if is_jpeg:
                smaller.save(buffer, "JPEG", quality=quality)
            else:
                smaller.save(buffer, "PNG")
            return Packed(buffer.getvalue())
    except DamagedImageError as error:
        return Packed(b"", str(error))


def _decode(image: Image.Image) -> None:
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (1, 1))  # at an eighth: every block is still read
    check_size(image.size)
    image.load()


def _resize(image: Image.Image, size: int) -> Image.Image | None:
    """The image with its shorter side ``size``, upright; None: it is as small already, or not resized in its mode."""
    width, height = image.size
    scale = size / min(width, height)
    mode = _MODES.get(image.mode)
    if image.mode in ("P", "PA"):
        mode = "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
    if scale >= 1 or mode is None:
        return None
    target = max(size, round(width * scale)), max(size, round(height * scale))
    image.draft(None, target)
    check_size(image.size)
    turned = ImageOps.exif_transpose(image.convert(mode).resize(target, Image.Resampling.BICUBIC))
    turned.info.clear()
    return turned
