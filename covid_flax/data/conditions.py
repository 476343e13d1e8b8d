"""Images with something taken away from them; what a network still answers shows what it reads.

Images are uint8 `[H, W, C]` and come back so, new, of the same shape. Nothing is random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

# Top, left, bottom and right, in shares of the picture's sides.
Box = tuple[float, float, float, float]
# What an image becomes, of its pixels and its lung mask (None where the condition needs none).
Change = Callable[[np.ndarray, np.ndarray | None], np.ndarray]

CENTRE: Box = (0.2, 0.2, 0.8, 0.8)
INSIDE_BORDER: Box = (0.15, 0.15, 0.85, 0.85)
# Holds the lungs of nearly every frontal radiograph that is cropped to the chest.
LUNG_BOX: Box = (0.08, 0.06, 0.90, 0.94)
COARSE_SIDE = 8


def box_mask(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """True inside the box, its sides rounded to whole pixels: bool `[H, W]`."""
    height, width = shape[:2]
    top, left, bottom, right = box
    mask = np.zeros((height, width), bool)
    rows = slice(round(top * height), round(bottom * height))
    mask[rows, round(left * width) : round(right * width)] = True
    return mask


def bounding_mask(mask: np.ndarray) -> np.ndarray:
    """True in the smallest upright rectangle around what is True in `mask`, bool `[H, W]`."""
    inside = np.zeros_like(mask)
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return inside


def hide(image: np.ndarray, where: np.ndarray, *, mean: bool = False) -> np.ndarray:
    """Fills the pixels `where` (bool `[H, W]`) with black, or with one grey.

    The grey is the mean of what stays visible, rounded: that of the whole image would tell
    something of what is hidden.
    """
    filled = image.copy()
    shown = image[~where]
    filled[where] = np.rint(shown.mean(0)) if mean and len(shown) else 0
    return filled


def histogram(images: Iterable[np.ndarray]) -> np.ndarray:
    """How many pixels of all images, channels together, have each grey: int64 `[256]`.

    Of images of one size its running sum is their mean cumulative histogram.
    """
    counts = np.zeros(256, np.int64)
    for image in images:
        counts += np.bincount(image.ravel(), minlength=256)
    return counts


def match_histogram(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Moves the greys of each channel so that their histogram follows `reference` (`[256]` counts).

    Histogram matching (Gonzalez & Woods), as scikit-image's `match_histograms`: a grey goes
    to where the reference's cumulative histogram, linear between its greys, reaches its own. Pixels
    of equal grey stay equal, so that a large black margin keeps its share.
    """
    greys = np.flatnonzero(reference)
    reached = np.cumsum(reference[greys]) / reference.sum()
    matched = np.empty_like(image)
    for channel in range(image.shape[2]):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        table = np.interp(np.cumsum(counts) / counts.sum(), reached, greys)
        matched[..., channel] = np.rint(table).astype(np.uint8)[image[..., channel]]
    return matched


def coarsen(image: np.ndarray, side: int = COARSE_SIDE) -> np.ndarray:
    """Shrinks to `side` x `side` pixels, each the mean of its box, and enlarges bilinearly."""
    height, width, channels = image.shape
    coarse = [
        Image.fromarray(image[..., channel])
        .resize((side, side), Image.Resampling.BOX)
        .resize((width, height), Image.Resampling.BILINEAR)
        for channel in range(channels)
    ]
    return np.stack([np.asarray(channel) for channel in coarse], 2)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to change every image.

    Attributes:
      name: its key in controls.json.
      title: what a reader is told it is.
      what: how it is done, a sentence.
      shows: `all`, `no lung`, `little lung` (its edges or outline), `lung`, `no tone` (all but
        brightness and contrast) or `coarse`.
      change: the pixels.
      masked: whether it needs the lung mask of each image.
    """

    name: str
    title: str
    what: str
    shows: str
    change: Change
    masked: bool = False


def conditions(reference: np.ndarray, reference_of: str, *, masks: bool) -> list[Condition]:
    """All of them, the whole image first.

    Args:
      reference: the histogram to match, `[256]`.
      reference_of: which images it is of, in words.
      masks: whether the lungs are known from masks; else a fixed box stands for them.
    """

    def outside(box: Box) -> Change:
        return lambda image, _: hide(image, ~box_mask(image.shape, box))

    def without(box: Box, *, mean: bool = False) -> Change:
        return lambda image, _: hide(image, box_mask(image.shape, box), mean=mean)

    centre, border = CENTRE[2] - CENTRE[0], INSIDE_BORDER[0]
    lungs: list[Condition]
    if masks:
        lungs = [
            Condition(
                "lungs_only",
                "lungs only",
                "All but the lung mask is black.",
                "lung",
                lambda image, mask: hide(image, ~_known(mask)),
                masked=True,
            ),
            Condition(
                "lungs_hidden",
                "lungs hidden",
                "The lung mask is black; its outline still shows the lungs' shape.",
                "little lung",
                lambda image, mask: hide(image, _known(mask)),
                masked=True,
            ),
            Condition(
                "lung_box_hidden",
                "lungs' rectangle hidden",
                "The upright rectangle around the lung mask is black.",
                "no lung",
                lambda image, mask: hide(image, bounding_mask(_known(mask))),
                masked=True,
            ),
            Condition(
                "lung_box_hidden_grey",
                "lungs' rectangle hidden (grey)",
                "The same, filled with the mean grey of what is left.",
                "no lung",
                lambda image, mask: hide(image, bounding_mask(_known(mask)), mean=True),
                masked=True,
            ),
        ]
    else:
        top, left, bottom, right = (f"{100 * x:g}" for x in LUNG_BOX)
        where = f"rows {top} to {bottom} %, columns {left} to {right} %"
        lungs = [
            Condition(
                "lungs_only",
                "lung box only",
                f"There are no masks: all is black but a box that holds most lungs ({where}).",
                "lung",
                outside(LUNG_BOX),
            ),
            Condition(
                "lungs_hidden",
                "lung box hidden",
                f"That box ({where}) is black.",
                "no lung",
                without(LUNG_BOX),
            ),
            Condition(
                "lungs_hidden_grey",
                "lung box hidden (grey)",
                "The same, filled with the mean grey of what is left.",
                "no lung",
                without(LUNG_BOX, mean=True),
            ),
        ]
    return [
        Condition("whole", "whole image", "As the run was trained.", "all", lambda image, _: image),
        Condition(
            "centre_hidden",
            "centre hidden",
            f"The middle {100 * centre:.0f} % of each side is black.",
            "little lung",
            without(CENTRE),
        ),
        Condition(
            "centre_hidden_grey",
            "centre hidden (grey)",
            "The same, filled with the mean grey of what is left.",
            "little lung",
            without(CENTRE, mean=True),
        ),
        Condition(
            "border_only",
            "border only",
            f"All is black but the outer {100 * border:.0f} % of each side.",
            "little lung",
            without(INSIDE_BORDER),
        ),
        *lungs,
        Condition(
            "histogram_matched",
            "greys matched",
            f"The grey histogram of every image is moved to that of {reference_of}.",
            "no tone",
            lambda image, _: match_histogram(image, reference),
        ),
        Condition(
            "coarse",
            f"{COARSE_SIDE} x {COARSE_SIDE} pixels",
            f"Shrunk to {COARSE_SIDE} x {COARSE_SIDE} pixels, each the mean of its box, and "
            "enlarged again.",
            "coarse",
            lambda image, _: coarsen(image),
        ),
    ]


def _known(mask: np.ndarray | None) -> np.ndarray:
    assert mask is not None
    return mask
