"""Files of every kind, opened and turned into pixels: exact values, or the line that refuses them."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from hjepa_engine.data.decode import IMAGE_EXTENSIONS, DamagedImageError, open_image
from hjepa_engine.data.pixels import image_size, to_pixels

RAMP = np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12)
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)
FOUR = np.concatenate([COLORS, RAMP[:, :, None]], axis=2)
DEEP = np.array([[0, 65535, 257], [32768, 256, 1]], np.uint16)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
UNIT = np.array([[0, 0.25, 1], [0.5, 0.125, 0.75]], np.float32)
LUMA = np.asarray(Image.fromarray(COLORS).convert("L"))


def encode(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels, **options):
    stream = BytesIO()
    planes = {"planarconfig": "contig"} if pixels.ndim == 3 else {}  # else they would be pages
    tifffile.imwrite(stream, pixels, **{"photometric": "minisblack", **planes, **options})
    return stream.getvalue()


def npy(pixels):
    stream = BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def read(content, channels, size=None, box=None, name="a.png", **options):
    image = open_image(content, name)
    return to_pixels(image, channels, size or image_size(image, channels), box, **options)


def pgm(pixels, most):
    return b"P5 %d %d %d\n" % (*pixels.shape[::-1], most) + pixels.astype(">u2").tobytes()


def palette(**options):
    """Four colors, of which the first is transparent or has an alpha."""
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    image.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0, 7, 7, 7])
    return encode(image, **options)


PALETTE = np.array([[[10, 20, 30], [255, 0, 0]], [[0, 255, 0], [7, 7, 7]]], np.uint8)
ICON = Image.new("RGBA", (16, 16), (9, 8, 7, 255))
CMYK = Image.fromarray(FOUR, "CMYK")
BITS = np.array([[True, False, True]])
GRAYS = np.array([[True, False, True]]).astype(np.uint8) * 255
FIRST, SECOND = Image.fromarray(COLORS), Image.new("RGB", (12, 10), "red")


def signed(pixels, dtype):
    return tiff(pixels.astype(dtype))


#: What is read: content, channels, and the pixels (H, W) or (H, W, C) or the line.
TABLE = {
    "png gray as gray": (encode(RAMP), 1, RAMP),
    "png gray as color": (encode(RAMP), 3, np.stack([RAMP] * 3, 2)),
    "png color": (encode(COLORS), 3, COLORS),
    "png color as gray": (encode(COLORS), 1, LUMA),
    "png color as four": (encode(COLORS), 4, r"3 bands (RGB), but data.in_chans is 4"),
    "png alpha dropped": (encode(FOUR), 3, COLORS),
    "png alpha dropped for gray": (encode(FOUR), 1, LUMA),
    "png alpha kept": (encode(FOUR), 4, FOUR),
    "png alpha as two": (encode(FOUR), 2, "4 bands (RGBA), but data.in_chans is 2"),
    "png gray and alpha as gray": (encode(FOUR[:, :, 2:], "PNG"), 1, FOUR[:, :, 2]),
    "png gray and alpha as color": (encode(FOUR[:, :, 2:], "PNG"), 3, np.stack([FOUR[:, :, 2]] * 3, 2)),
    "png gray and alpha as two": (encode(FOUR[:, :, 2:], "PNG"), 2, FOUR[:, :, 2:]),
    "png 1 bit": (encode(Image.fromarray(BITS)), 1, GRAYS),
    "png palette": (palette(), 3, PALETTE),
    "png palette with a transparent color": (palette(transparency=0), 3, PALETTE),
    "png palette with alphas": (palette(transparency=b"\x40\xff\x80\x00"), 3, PALETTE),
    "png palette with alphas as four": (
        palette(transparency=b"\x40\xff\x80\x00"),
        4,
        np.concatenate([PALETTE, np.array([[[64], [255]], [[128], [0]]], np.uint8)], 2),
    ),
    "gif palette": (palette(kind="GIF"), 3, PALETTE),
    "gif animation: its first frame": (
        encode(Image.new("P", (2, 2), 0), "GIF", save_all=True, append_images=[Image.new("P", (2, 2), 255)]),
        1,
        np.zeros((2, 2), np.uint8),
    ),
    "apng animation: its first frame": (encode(FIRST, "PNG", save_all=True, append_images=[SECOND]), 3, COLORS),
    "tiff pages: the first": (encode(FIRST, "TIFF", save_all=True, append_images=[SECOND]), 3, COLORS),
    "webp animation: its first frame": (
        encode(FIRST, "WEBP", save_all=True, append_images=[SECOND], lossless=True),
        3,
        COLORS,
    ),
    "bmp": (encode(COLORS, "BMP"), 3, COLORS),
    "ppm": (encode(COLORS, "PPM"), 3, COLORS),
    "tga": (encode(COLORS, "TGA"), 3, COLORS),
    "sgi": (encode(COLORS, "SGI"), 3, COLORS),
    "qoi": (encode(FOUR, "QOI"), 3, COLORS),
    "pcx": (encode(COLORS, "PCX"), 3, COLORS),
    "dds": (encode(COLORS, "DDS"), 3, COLORS),
    "jpeg 2000": (encode(COLORS, "JPEG2000"), 3, COLORS),
    "jpeg 2000 of 16 bits": (encode(DEEP, "JPEG2000", irreversible=False, num_resolutions=1), 1, DEEP / 65535),
    "webp": (encode(COLORS, "WEBP", lossless=True), 3, COLORS),
    "ico": (
        encode(Image.new("RGBA", (16, 16), (9, 8, 7, 255)), "ICO", sizes=[(16, 16)]),
        3,
        np.full((16, 16, 3), (9, 8, 7)),
    ),
    "png 16 bits": (encode(DEEP), 1, DEEP / 65535),
    "png 16 bits as color": (encode(DEEP), 3, np.stack([DEEP / 65535] * 3, 2)),
    "png 16 bits as two": (encode(DEEP), 2, "1 band, but data.in_chans is 2"),
    "pgm 16 bits": (pgm(DEEP, 65535), 1, DEEP / 65535),
    "pgm of its own range": (pgm(np.array([[0, 500, 1000]]), 1000), 1, np.array([[0, 32768, 65535]]) / 65535),
    "tiff 16 bits": (encode(DEEP, "TIFF"), 1, DEEP / 65535),
    "tiff 16 bits, big endian": (tiff(DEEP, byteorder=">"), 1, DEEP / 65535),
    "tiff 16 bits, white is 0": (tiff(DEEP, photometric="miniswhite"), 1, 1 - DEEP / 65535),
    "tiff 16 bits signed": (signed(DEEP // 2, np.int16), 1, (DEEP // 2) / 32767),
    "tiff 16 bits below 0": (signed(np.array([[-5, 2]]), np.int16), 1, "pixels must be at least 0, got -5"),
    "tiff 8 bits signed": (signed(np.array([[127, 0]]), np.int8), 1, np.array([[1.0, 0]])),
    "tiff 8 bits below 0": (signed(np.array([[-2, 0]]), np.int8), 1, "pixels must be at least 0, got -2"),
    "tiff 32 bits": (tiff(np.array([[0, 2**32 - 1, 2**31]], np.uint32)), 1, np.array([[0, 1, 2**31 / (2**32 - 1)]])),
    "tiff 32 bits signed": (signed(np.array([[0, 2**31 - 1]]), np.int32), 1, np.array([[0.0, 1]])),
    "tiff 32 bits below 0": (signed(np.array([[0, -1]]), np.int32), 1, "pixels must be at least 0, got -1"),
    "tiff floats": (encode(UNIT, "TIFF"), 1, UNIT),
    "tiff floats as color": (encode(UNIT, "TIFF"), 3, np.stack([UNIT] * 3, 2)),
    "tiff floats above 1": (encode(UNIT * 4, "TIFF"), 1, "floating-point pixels must be from 0 to 1, got 0 to 4"),
    "tiff floats below 0": (encode(-UNIT, "TIFF"), 1, "floating-point pixels must be from 0 to 1, got -1 to 0"),
    "tiff not a number": (
        encode(UNIT * np.nan, "TIFF"),
        1,
        "floating-point pixels must be from 0 to 1, got nan to nan",
    ),
    "tiff floats of 64 bits": (tiff(UNIT.astype(np.float64)), 1, UNIT),
    "tiff floats of 16 bits": (tiff(UNIT.astype(np.float16)), 1, UNIT),
    "tiff floats of three bands": (tiff(np.stack([UNIT] * 3, 2), photometric="rgb"), 3, np.stack([UNIT] * 3, 2)),
    "tiff five bands": (tiff(np.concatenate([FOUR, FOUR[:, :, :1]], 2)), 5, np.concatenate([FOUR, FOUR[:, :, :1]], 2)),
    "tiff five bands, planes": (
        tiff(np.moveaxis(np.concatenate([FOUR, FOUR[:, :, :1]], 2), 2, 0), planarconfig="separate"),
        5,
        np.concatenate([FOUR, FOUR[:, :, :1]], 2),
    ),
    "tiff five bands as color": (tiff(np.concatenate([FOUR, FOUR[:, :, :1]], 2)), 3, "5 bands, but data.in_chans is 3"),
    "tiff color and one more as color": (tiff(FOUR, photometric="rgb", extrasamples=[0]), 3, COLORS),
    "tiff color and one more as four": (tiff(FOUR, photometric="rgb", extrasamples=[0]), 4, FOUR),
    "tiff color and two more as five": (
        tiff(np.concatenate([FOUR, FOUR[:, :, :1]], 2), photometric="rgb", extrasamples=[0, 0]),
        5,
        np.concatenate([FOUR, FOUR[:, :, :1]], 2),
    ),
    "tiff color and two more as color": (
        tiff(np.concatenate([FOUR, FOUR[:, :, :1]], 2), photometric="rgb", extrasamples=[0, 0]),
        3,
        "5 bands, but data.in_chans is 3",
    ),
    "tiff four bands of 16 bits": (tiff(np.stack([DEEP] * 4, 2)), 4, np.stack([DEEP / 65535] * 4, 2)),
    "tiff cmyk": (encode(CMYK, "TIFF"), 3, np.asarray(CMYK.convert("RGB"))),
    "npy gray": (npy(RAMP), 1, RAMP),
    "npy gray as color": (npy(RAMP), 3, np.stack([RAMP] * 3, 2)),
    "npy bands last": (npy(COLORS), 3, COLORS),
    "npy bands first": (npy(np.moveaxis(COLORS, 2, 0)), 3, COLORS),
    "npy color as gray": (npy(COLORS), 1, LUMA),
    "npy columns first": (npy(np.asfortranarray(COLORS)), 3, COLORS),
    "npy seven bands": (npy(np.stack([RAMP] * 7, 0)), 7, np.stack([RAMP] * 7, 2)),
    "npy seven bands as color": (npy(np.stack([RAMP] * 7, 0)), 3, "7 bands, but data.in_chans is 3"),
    "npy four bands as color": (npy(FOUR), 3, "4 bands, but data.in_chans is 3"),
    "npy 16 bits": (npy(DEEP), 1, DEEP / 65535),
    "npy 16 bits, big endian": (npy(DEEP.astype(">u2")), 1, DEEP / 65535),
    "npy bool": (npy(BITS), 1, GRAYS),
    "npy floats": (npy(UNIT), 1, UNIT),
    "npy floats of 16 bits": (npy(UNIT.astype(np.float16)), 1, UNIT),
    "npy floats above 1": (npy(UNIT * 255), 1, "floating-point pixels must be from 0 to 1, got 0 to 255"),
    "npy integers of 64 bits": (
        npy(RAMP.astype(int)),
        1,
        "pixels must be uint8, uint16, uint32, bool or floats from 0 to 1, got int64",
    ),
    "npy complex": (
        npy(RAMP.astype(complex)),
        1,
        "pixels must be uint8, uint16, uint32, bool or floats from 0 to 1, got complex128",
    ),
    "npy objects": (npy(np.array([[{}]])), 1, "an array of Python objects is not read"),
    "npy of one axis": (npy(RAMP[0]), 1, "an array must be (H, W), (H, W, C) or (C, H, W), got shape (12,)"),
    "npy of four axes": (
        npy(RAMP[None, None]),
        1,
        "an array must be (H, W), (H, W, C) or (C, H, W), got shape (1, 1, 10, 12)",
    ),
    "npy without pixels": (npy(RAMP[:0]), 1, "an image without pixels"),
    "npy cut short": (npy(RAMP)[:-1], 1, "buffer is smaller than requested size"),
    "nothing": (b"", 1, "the file is empty"),
    "text": (b"no image" * 9, 1, "not an image of a known format"),
    "pdf": (encode(COLORS, "PDF"), 3, "not an image of a known format"),
    "png cut short": (encode(NOISE)[:-2000], 3, "truncated"),
    "jpeg cut short": (
        encode(NOISE, "JPEG")[:-900],
        3,
        "truncated",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_pixels_are_exactly_these_or_refused_by_this_line(case):
    content, channels, expected = TABLE[case]
    name = "a.NPY" if case.startswith("npy") else "a.png"
    if isinstance(expected, str):
        with pytest.raises(DamagedImageError) as error:
            read(content, channels, name=name)
        assert expected in str(error.value) and "\n" not in str(error.value)
        return
    found = read(content, channels, name=name)
    assert found.dtype == (torch.uint8 if expected.dtype.kind in "ui" else torch.float32)
    expected = expected if expected.ndim == 3 else expected[:, :, None]
    wanted = torch.from_numpy(np.moveaxis(expected, 2, 0).copy())
    assert found.shape == wanted.shape and found.is_contiguous()
    assert torch.equal(found, wanted.to(found.dtype))


@pytest.mark.parametrize(
    ("lab", "rgb"), [((255, 0, 0), (255, 255, 255)), ((0, 0, 0), (0, 0, 0)), ((138, 81, 70), (255, 0, 0))]
)
def test_lab_becomes_srgb(lab, rgb):
    """CIE L from 0 to 255; a and b as they are."""
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (lab[0], lab[1] + 128, lab[2] + 128)])
    found = read(encode(lab, "TIFF"), 3)
    assert (found.int() - torch.tensor(rgb)[:, None, None]).abs().max() <= 6


def test_extensions_are_those_of_formats_that_pillow_decodes():
    read_too = {
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
        ".avif",
    }
    assert read_too <= IMAGE_EXTENSIONS
    assert (
        not {".pdf", ".mpg", ".h5", ".grib", ".bufr", ".eps", ".ps", ".wmf", ".emf", ".iim", ".txt"} & IMAGE_EXTENSIONS
    )


@pytest.mark.parametrize("box", [None, (2, 3, 5, 4), (0, 0, 10, 1)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_obeyed_and_boxes_are_those_of_the_upright_image(turn, box):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encode(COLORS, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert image_size(open_image(content, "a.png")) == upright.size[::-1]
    top, left, height, width = box or (0, 0, *upright.size[::-1])
    expected = upright.crop((left, top, left + width, top + height)).resize((6, 7), Image.Resampling.BILINEAR)
    assert torch.equal(read(content, 3, (7, 6), box), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


SMOOTH = np.stack(np.broadcast_arrays(np.arange(203)[:, None], np.arange(301) * 0.8, 128), axis=2).astype(np.uint8)


@pytest.mark.parametrize("box", [None, (16, 40, 160, 144), (3, 5, 190, 250), (100, 30, 16, 17)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_jpeg_decoded_at_a_reduced_size_shows_the_same(turn, box):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encode(SMOOTH, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    if box is not None and turn >= 5:
        box = (box[1], box[0], box[3], box[2])
    top, left, height, width = box or (0, 0, *upright.size[::-1])
    expected = upright.crop((left, top, left + width, top + height)).resize((15, 14), Image.Resampling.BILINEAR)
    found = read(content, 3, (14, 15), box).permute(1, 2, 0).int()
    # A ramp of one or 0.8 per pixel: four levels are a shift of four pixels, in an image reduced by up to eight.
    assert (found - torch.from_numpy(np.array(expected)).int()).abs().max() <= 4


def test_a_jpeg_is_decoded_no_larger_than_needed_and_never_smaller():
    content = encode(SMOOTH, "JPEG")
    for size, decoded in (
        ((25, 37), (26, 38)),
        ((26, 37), (51, 76)),
        ((102, 100), (203, 301)),
        ((101, 150), (102, 151)),
    ):
        image = open_image(content, "a.jpg")
        to_pixels(image, 3, size)
        assert image.size[::-1] == decoded


def test_too_large_images_are_decoded_at_a_reduced_size_or_refused_with_both_numbers():
    for kind, largest in (("JPEG", 61103), ("JPEG2000", 61103)):
        content = encode(SMOOTH, kind)
        assert read(content, 3, (203, 301), max_pixels=largest).shape == (3, 203, 301)
        assert read(content, 3, (203, 301), max_pixels=20_000).shape == (3, 203, 301)
    for content, limit in ((encode(SMOOTH, "PNG"), 61102), (encode(SMOOTH, "JPEG"), 100), (npy(SMOOTH), 61102)):
        image = open_image(content, "a.npy" if content.startswith(b"\x93NUMPY") else "a")
        with pytest.raises(DamagedImageError, match=rf"\d+ pixels are more than data.max_pixels {limit}"):
            to_pixels(image, 3, (8, 8), max_pixels=limit)


def test_a_header_of_a_billion_pixels_is_refused_without_a_warning(recwarn):
    bomb = bytearray(encode(RAMP))
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    image = open_image(bytes(bomb), "a.png")
    assert image_size(image) == (50_000, 50_000)
    with pytest.raises(DamagedImageError, match=r"2500000000 pixels are more than data\.max_pixels 178956970"):
        to_pixels(image, 1, (8, 8))
    assert not recwarn.list


def test_floats_are_resized_as_pixels_of_8_bits_are():
    gray = read(encode(RAMP), 1, (5, 4), (1, 2, 8, 9)).float() / 255
    deep = read(npy(RAMP.astype(np.uint16) * 257), 1, (5, 4), (1, 2, 8, 9), name="a.npy")
    assert (gray - deep).abs().max() <= 0.51 / 255 * 2


def test_tensors_are_taken_with_bands_first():
    tensor = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    assert image_size(tensor) == (3, 3)
    assert torch.equal(to_pixels(tensor, 3, (3, 3)), tensor)
    assert torch.equal(to_pixels(tensor[0], 1, (3, 3)), tensor[:1])


def test_files_are_read_as_their_contents_are(tmp_path):
    for name, content in (("a.png", encode(COLORS)), ("b.npy", npy(COLORS)), ("c.tif", tiff(np.stack([UNIT] * 3, 2)))):
        (tmp_path / name).write_bytes(content)
        opened = open_image(tmp_path / name, name)
        assert torch.equal(to_pixels(opened, 3, (5, 5)), read(content, 3, (5, 5), name=name))
    for name in ("missing.png", "missing.npy"):
        with pytest.raises(DamagedImageError, match="No such file or directory"):
            open_image(tmp_path / name, name)


def test_without_tifffile_the_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DamagedImageError, match="Pillow cannot read this TIFF, tifffile can: pip install tifffile"):
        read(TABLE["tiff floats of three bands"][0], 3)
