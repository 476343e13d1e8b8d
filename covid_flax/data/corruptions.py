"""Changes that other scanners, exports and crops make to an X-ray, at five strengths each.

After Hendrycks and Dietterich (2019), for grey radiographs: none of them changes what is seen of
the lungs. Images are uint8 `[H, W, C]` and come back so, new, of the same shape. Lengths are in
pixels of the image given, greys in 0..255.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

STRENGTHS = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One way to change an image.

    Attributes:
      name: its key in robustness.json.
      unit: what `values` are, for people.
      values: of the five strengths, weakest first.
      change: `(image, value, rng) -> image`; only noise draws.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

    def __call__(self, image: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
        """The image at a strength from 1 to 5."""
        return self.change(image, self.values[strength - 1], rng)


def _rounded(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode="nearest")


def blur(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, of that deviation in pixels."""
    return _rounded(_smooth(image, sigma))


def sharpen(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Unsharp mask: so many times the difference from a blur of one pixel is added."""
    return _rounded(image + amount * (image - _smooth(image, 1.0)))


def noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Normal, of that deviation in greys, the same in all channels."""
    return _rounded(image + sigma * rng.normal(size=(*image.shape[:2], 1)))


def gamma(image: np.ndarray, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Greys, as shares of white, to that power: brighter below 1, darker above."""
    return _rounded(255 * (image / 255) ** exponent)


def contrast(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Distances from the mean grey multiplied by that factor."""
    mean = image.mean()
    return _rounded(mean + factor * (image - mean))


def equalize(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """So much of the image replaced by itself with its histogram equalised."""
    counts = np.bincount(image.ravel(), minlength=256)
    reached = np.cumsum(counts) / image.size
    first = counts[np.flatnonzero(counts)[0]] / image.size
    flat = 255 * (reached - first) / (1 - first) if first < 1 else np.arange(256)
    return _rounded((1 - share) * image + share * np.asarray(flat)[image])


def jpeg(image: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Through a grey JPEG of that quality, channel by channel."""

    def through(channel: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(channel).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    return np.stack([through(image[..., c]) for c in range(image.shape[2])], 2)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    def one(channel: np.ndarray) -> np.ndarray:
        return np.asarray(
            Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR)
        )

    return np.stack([one(image[..., c]) for c in range(image.shape[2])], 2)


def rescale(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to that share of its sides, and enlarged again, bilinearly."""
    height, width = image.shape[:2]
    small = _resized(image, max(1, round(share * height)), max(1, round(share * width)))
    return _resized(small, height, width)


def crop(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """That share of the side cut from every border, the rest enlarged."""
    height, width = image.shape[:2]
    y, x = round(share * height), round(share * width)
    return _resized(image[y : height - y, x : width - x], height, width)


def black_border(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The image shrunk into a black frame that takes that share of the side on every border."""
    height, width = image.shape[:2]
    y, x = round(share * height), round(share * width)
    framed = np.zeros_like(image)
    framed[y : height - y, x : width - x] = _resized(image, height - 2 * y, width - 2 * x)
    return framed


def narrow(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to that share of the width, the edge columns repeated into the rest.

    What squaring does to pictures of other proportions.
    """
    height, width = image.shape[:2]
    narrower = _resized(image, height, max(1, round(share * width)))
    left = (width - narrower.shape[1]) // 2
    right = width - narrower.shape[1] - left
    return np.pad(narrower, ((0, 0), (left, right), (0, 0)), mode="edge")


CORRUPTIONS = (
    Corruption("blur", "deviation, pixels", (0.5, 0.8, 1.1, 1.5, 2.0), blur),
    Corruption("sharpen", "times the detail added", (0.5, 1.0, 2.0, 3.0, 5.0), sharpen),
    Corruption("noise", "deviation, greys", (4, 8, 13, 19, 26), noise),
    Corruption("gamma_bright", "exponent", (0.85, 0.75, 0.65, 0.55, 0.45), gamma),
    Corruption("gamma_dark", "exponent", (1.2, 1.4, 1.7, 2.0, 2.4), gamma),
    Corruption("contrast", "factor", (0.85, 0.7, 0.55, 0.4, 0.3), contrast),
    Corruption("equalize", "share", (0.2, 0.4, 0.6, 0.8, 1.0), equalize),
    Corruption("jpeg", "quality", (60, 40, 25, 15, 8), jpeg),
    Corruption("rescale", "share of the side", (0.8, 0.65, 0.5, 0.4, 0.3), rescale),
    Corruption("crop", "share of the side", (0.02, 0.04, 0.07, 0.10, 0.14), crop),
    Corruption("black_border", "share of the side", (0.02, 0.04, 0.07, 0.10, 0.14), black_border),
    Corruption("narrow", "share of the width", (0.95, 0.9, 0.85, 0.8, 0.7), narrow),
)
