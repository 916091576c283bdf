"""Files of every kind, opened and turned into pixels."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa_engine.data.decode import IMAGE_EXTENSIONS, DamagedImageError, open_image
from hjepa_engine.data.pixels import image_size, to_pixels


def encode(image, kind, **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


RAMP = np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12)
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)


def read(content, channels, size=None, box=None, name="a.png"):
    image = open_image(content, name)
    return to_pixels(image, channels, size or image_size(image), box)


def test_extensions_are_those_of_formats_that_pillow_decodes():
    assert {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".gif",
        ".jp2",
        ".webp",
        ".tif",
        ".pgm",
        ".ico",
        ".npy",
        ".mpo",
    } <= IMAGE_EXTENSIONS
    assert (
        not {".pdf", ".mpg", ".h5", ".grib", ".bufr", ".eps", ".ps", ".wmf", ".emf", ".iim", ".txt"} & IMAGE_EXTENSIONS
    )


def test_color_keeps_its_pixels_and_gray_is_repeated_or_made_of_luma():
    color = encode(Image.fromarray(COLORS), "PNG")
    assert torch.equal(read(color, 3), torch.from_numpy(COLORS).permute(2, 0, 1))
    luma = np.asarray(Image.fromarray(COLORS).convert("L"))
    assert torch.equal(read(color, 1), torch.from_numpy(luma.copy())[None])
    gray = encode(Image.fromarray(RAMP), "PNG")
    assert torch.equal(read(gray, 1), torch.from_numpy(RAMP)[None])
    assert torch.equal(read(gray, 3), torch.from_numpy(RAMP).expand(3, -1, -1))


@pytest.mark.parametrize("box", [None, (2, 3, 5, 4), (0, 0, 10, 1)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_obeyed_and_boxes_are_those_of_the_upright_image(turn, box):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encode(Image.fromarray(COLORS), "PNG", exif=exif)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert image_size(open_image(content, "a.png")) == upright.size[::-1]
    top, left, height, width = box or (0, 0, *upright.size[::-1])
    expected = upright.crop((left, top, left + width, top + height)).resize((6, 7), Image.Resampling.BILINEAR)
    assert torch.equal(read(content, 3, (7, 6), box), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_16_bits_are_shares_of_65535():
    deep = np.array([[0, 65535], [32768, 256]], np.uint16)
    expected = torch.from_numpy((deep / 65535).astype(np.float32))[None]
    assert torch.equal(read(encode(Image.fromarray(deep), "PNG"), 1), expected)
    stream = BytesIO()
    np.save(stream, deep)
    assert torch.equal(read(stream.getvalue(), 1, name="a.NPY"), expected)


def test_what_is_no_image_is_damaged():
    for content, reason in ((b"", "the file is empty"), (b"no image" * 9, "not an image of a known format")):
        with pytest.raises(DamagedImageError, match=reason):
            open_image(content, "a.png")
