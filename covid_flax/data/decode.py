"""From an image file's bytes to the pixels that a network sees."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from covid_flax.errors import UserError

# Suffix -> the formats (Pillow's names) that may stand behind it.
FORMATS_BY_SUFFIX = {
    ".png": ("PNG",),
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".webp": ("WEBP",),
}
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_SIDE = 20_000
MAX_PIXELS = 100_000_000
MAX_PIXELS_PER_BYTE = 10_000  # above what a blank image comes to: deflate packs 1032 to 1

_OPENED_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP")
# Threads that decode: of images above so many pixels, one at a time.
_LARGE = 16_000_000
_one_large = threading.Lock()
_PNG_END = b"IEND\xaeB`\x82"


def is_image(name: str) -> bool:
    """Whether a file of that name is one of `decode`'s, and is not hidden."""
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in FORMATS_BY_SUFFIX


def decode(data: bytes, name: str) -> np.ndarray:
    """The pixels of an image file: uint8 `[height, width, 3]`, RGB, 0..255.

    Grey images get three equal channels. 16-bit grey is scaled by 1/257, so that 65535
    becomes 255. Transparency is dropped, the colours under it kept. The EXIF orientation
    is applied. Of several frames or pages the first is taken. Thread safe.

    Args:
      data: the file's content.
      name: its name, for messages and for its suffix.

    Raises:
      UserError: `data` is empty, truncated, no image, of another format than the suffix
        of `name` says, of a pixel type with no plain 8-bit meaning, or larger than
        `MAX_SIDE` pixels a side, `MAX_PIXELS` in all or `MAX_PIXELS_PER_BYTE`.
    """
    if not data:
        raise UserError(f"{name} is an empty file (0 bytes): replace or remove it")
    try:
        # The content is the only thing that varies here, and Pillow's decoders raise many
        # types (OSError, SyntaxError, ValueError, struct.error, ...) on bad content.
        image = Image.open(io.BytesIO(data), formats=_OPENED_FORMATS)
    except Image.DecompressionBombError as e:
        raise _too_large(name) from e
    except Exception as e:
        raise UserError(f"{name} is not a readable image: replace or remove it") from e
    with image:
        suffix = PurePosixPath(name).suffix.lower()
        allowed = FORMATS_BY_SUFFIX.get(suffix)
        if allowed and image.format not in allowed:
            raise UserError(
                f"{name} is mislabelled: its content is {image.format}, not what {suffix} says: "
                "rename or replace it"
            )
        if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
            raise _too_large(name, image.size)
        pixels_here = image.width * image.height
        if pixels_here > MAX_PIXELS_PER_BYTE * len(data):
            raise UserError(
                f"{name} has {len(data):,} bytes for {image.width:,} x {image.height:,} pixels, "
                "fewer than an image takes: replace or remove it"
            )
        # Pillow does not miss a PNG's end chunk once it has all rows.
        if image.format == "PNG" and _PNG_END not in data:
            raise UserError(f"{name} is truncated: replace or remove it")
        try:
            with _one_large if pixels_here > _LARGE else contextlib.nullcontext():
                image.load()
                oriented = ImageOps.exif_transpose(image)
                # Pillow turns a TIFF whose 0 is white about at 8 bits only.
                inverted = image.mode.startswith("I;16") and _white_is_zero(image)
                pixels = _to_rgb(oriented, name, _largest_value(image, name), inverted)
        except UserError:
            raise
        except Exception as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(
                f"{name} is truncated or damaged ({reason}): replace or remove it"
            ) from e
    return pixels


def resize(
    image: np.ndarray, size: int, interpolation: str, intermediate_size: int = 0
) -> np.ndarray:
    """Resizes to a square as `keras.utils.load_img(target_size=...)` does, with Pillow.

    Args:
      image: uint8 `[height, width, 3]`.
      size: side of the result in pixels.
      interpolation: one of `INTERPOLATIONS`; all but `nearest` average when shrinking.
      intermediate_size: > 0 resizes to this side first, with the same interpolation.

    Returns:
      uint8 `[size, size, 3]`. The aspect ratio is not kept.

    Raises:
      UserError: unknown interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"data.interpolation={interpolation} is unknown: take one of "
            + ", ".join(INTERPOLATIONS)
        )
    sides = [intermediate_size, size] if intermediate_size > 0 else [size]
    for side in sides:
        if image.shape[:2] != (side, side):
            resized = Image.fromarray(image).resize((side, side), INTERPOLATIONS[interpolation])
            image = np.asarray(resized)
    return image


def is_dark(pixels: np.ndarray) -> bool:
    """Whether an image, uint8, shows something, but nothing above a quarter of white.

    So look the values of 10 or 12 bits in a file of 16.
    """
    return int(pixels.min()) + 2 < int(pixels.max()) <= 64


def _white_is_zero(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _largest_value(image: Image.Image, name: str) -> int:
    """Of a grey image of more than 8 bits: Pillow gives those of 12 as they are. UserError."""
    if not isinstance(image, TiffImageFile):
        return 65535
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
    if bits <= 16 and image.tag_v2.get(SAMPLEFORMAT, (1,))[0] == 2:
        raise UserError(f"{name} has signed pixels: save it with 8 or 16 bits a pixel, unsigned")
    return 2 ** min(16, bits) - 1


def _to_rgb(image: Image.Image, name: str, largest: int, inverted: bool) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{name} has 32-bit pixels beyond 0..65535: save it with 8 or 16 bits a pixel"
            )
        if inverted:
            values = largest - values
        # Pillow's own conversion clips at 255 instead of scaling.
        grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(
            f"{name} has floating-point pixels of unknown range: save it with 8 or 16 bits a pixel"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # what Pillow asks for; the colours are the same
    return np.asarray(image.convert("RGB"))


def _too_large(name: str, size: tuple[int, int] | None = None) -> UserError:
    what = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return UserError(
        f"{name} has {what}, above the limit of {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all: "
        "shrink or remove it"
    )
