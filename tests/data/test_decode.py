"""Decoded and resized pixels, judged by Keras and NumPy."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from keras_judge import keras
from PIL import Image

from covid_flax.data.decode import INTERPOLATIONS, decode, resize
from covid_flax.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (37, 53, 3), np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def samples() -> dict[str, bytes]:
    """Files whose meaning Keras and we must agree on, by name."""
    image = Image.fromarray(RGB)
    return {
        "grey.png": encode(image.convert("L"), "PNG"),
        "rgb.png": encode(image, "PNG"),
        "palette.png": encode(image.quantize(64), "PNG"),
        "clear.png": encode(image.quantize(64), "PNG", transparency=bytes(range(64))),
        "one_bit.png": encode(image.convert("1"), "PNG"),
        "alpha.png": encode(Image.fromarray(np.dstack([RGB, RGB[:, :, 0]])), "PNG"),
        "grey_alpha.png": encode(image.convert("LA"), "PNG"),
        "rgb.jpg": encode(image, "JPEG"),
        "grey.JPEG": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "rgb.bmp": encode(image, "BMP"),
        "rgb.gif": encode(image, "GIF"),
        "rgb.tif": encode(image, "TIFF"),
        "rgb.tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "rgb.webp": encode(image, "WEBP", lossless=True),
    }


@pytest.mark.filterwarnings("ignore:Palette images")  # Pillow's, about Keras's conversion
@pytest.mark.parametrize("name", samples())
def test_pixels_equal_keras(name):
    data = samples()[name]
    expected = np.asarray(keras.utils.load_img(io.BytesIO(data)))
    image = decode(data, f"COVID/{name}")
    assert image.dtype == np.uint8 and image.shape == (37, 53, 3)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", ["grey.png", "rgb.png", "palette.png"])
@pytest.mark.parametrize("size", [16, 48, 128])
def test_resizing_equals_keras(name, interpolation, size):
    data = samples()[name]
    expected = keras.utils.load_img(
        io.BytesIO(data), target_size=(size, size), interpolation=interpolation
    )
    image = resize(decode(data, name), size, interpolation)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_intermediate_size_is_a_resize_of_its_own(tmp_path):
    keras.utils.load_img(
        io.BytesIO(encode(Image.fromarray(RGB), "PNG")), target_size=(20, 20),
        interpolation="nearest",
    ).save(tmp_path / "half.png")  # fmt: skip
    expected = keras.utils.load_img(tmp_path / "half.png", target_size=(64, 64))
    twice = resize(RGB, 64, "nearest", intermediate_size=20)
    np.testing.assert_array_equal(twice, np.asarray(expected))
    assert (twice != resize(RGB, 64, "nearest")).any()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    values[0, :5] = [0, 128, 129, 255, 65535]
    data = encode(Image.fromarray(values), kind)
    expected = np.round(values.astype(np.float64) / 257)
    image = decode(data, "x.png" if kind == "PNG" else "x.tif")
    np.testing.assert_array_equal(image, np.repeat(expected[:, :, None], 3, 2))


def test_a_tiff_whose_0_is_white_is_turned_about():
    values = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
    # Pillow writes 8 bits the other way round then, 16 as they are.
    small = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(small, "x.tif")[..., 0], values)
    deep = Image.fromarray(values.astype(np.uint16) * 257)
    for white, expected in ((1, values), (0, 255 - values)):
        data = encode(deep, "TIFF", tiffinfo={262: white})
        np.testing.assert_array_equal(decode(data, "x.tif")[..., 0], expected)


def _tiff(values, bits, sample_format=1):
    """One uncompressed strip, little-endian, an even number of pixels a row (TIFF 6.0)."""
    strip = np.asarray(values).astype("<i2").tobytes()
    if bits == 12:  # packed, the high bits first
        rows = ["".join(f"{v:012b}" for v in row) for row in values]
        strip = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    height, width = np.shape(values)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(strip)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(strip))
    return head + strip + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_12_bit_grey_is_scaled():
    values = np.array([[0, 585, 1170, 2048], [4094, 4095, 16, 8]])
    want = np.round(values * 255 / 4095)
    np.testing.assert_array_equal(decode(_tiff(values, 12), "x.tif")[..., 0], want)
    np.testing.assert_array_equal(
        decode(_tiff(values, 16), "x.tif")[..., 0], np.round(values / 257)
    )


def test_signed_pixels_are_refused():
    for values in ([[0, 32767]], [[-5, 9]]):
        with pytest.raises(UserError, match=r"x\.tif has signed pixels: .* unsigned"):
            decode(_tiff(values, 16, sample_format=2), "x.tif")


def test_32_bit_pixels():
    values = np.array([[0, 257, 65535]], np.int32)
    image = decode(encode(Image.fromarray(values), "TIFF"), "x.tif")
    np.testing.assert_array_equal(image[0, :, 0], [0, 1, 255])
    with pytest.raises(UserError, match="x.tif has 32-bit pixels"):
        decode(encode(Image.fromarray(values * 2), "TIFF"), "x.tif")
    with pytest.raises(UserError, match="x.tif has floating-point pixels"):
        decode(encode(Image.fromarray(values.astype(np.float32)), "TIFF"), "x.tif")


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, 3)),
     (8, np.rot90)],
)  # fmt: skip
def test_orientation_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(RGB), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, "x.png"), upright(RGB))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF tags
@pytest.mark.parametrize(
    "name", ["grey.png", "rgb.png", "rgb.jpg", "rgb.bmp", "rgb.tif", "rgb.webp"]
)
def test_truncated_at_any_byte(name):
    data = samples()[name]
    lengths = {*range(1, 64), *range(64, len(data), 97), *range(len(data) - 24, len(data))}
    if name == "rgb.bmp":
        lengths.remove(len(data) - 1)  # the byte that pads the last row
    for length in sorted(lengths):
        with pytest.raises(UserError, match=f"COVID/{name} is") as e:
            decode(data[:length], f"COVID/{name}")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\0" * 1000, b"<svg/>"])
def test_no_image(data):
    with pytest.raises(UserError, match="x.png is (an empty file|not a readable image)"):
        decode(data, "x.png")


def test_content_must_be_what_the_suffix_says():
    with pytest.raises(UserError, match="x.png is mislabelled: its content is JPEG"):
        decode(samples()["rgb.jpg"], "x.png")
    with pytest.raises(UserError, match="X.JPG is mislabelled: its content is PNG"):
        decode(samples()["rgb.png"], "X.JPG")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_001, 1), (1, 20_001), (10_001, 10_000), (200_000, 200_000)])
def test_decompression_bombs_are_refused_unread(size):
    with pytest.raises(UserError, match="x.png has .* above the limit of 20,000 a side"):
        decode(png_header(*size), "x.png")


def test_more_pixels_than_the_bytes_can_hold():
    with pytest.raises(UserError, match="fewer than an image takes"):
        decode(png_header(10_000, 9_999), "x.png")


def test_unknown_interpolation():
    with pytest.raises(UserError, match="interpolation=cubic is unknown: take one of nearest, box"):
        resize(RGB, 8, "cubic")


def test_threads_decode_alike():
    jobs = list(samples().items()) * 20
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda job: decode(job[1], job[0]), jobs))
    for (name, data), image in zip(jobs, parallel, strict=True):
        np.testing.assert_array_equal(image, decode(data, name))


def test_16_bit_grey_of_the_other_byte_order_is_scaled():
    """ImageJ's."""
    values = np.array([[0, 128, 129, 255], [256, 1000, 40_000, 65_535]], ">u2")
    data = encode(Image.frombytes("I;16B", (4, 2), values.tobytes()), "TIFF")
    assert data[:2] == b"MM"
    want = np.round(values.astype(np.float64) / 257)
    np.testing.assert_array_equal(decode(data, "x.tif")[..., 0], want)
