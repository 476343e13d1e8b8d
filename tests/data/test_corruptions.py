"""Judges: NumPy in float64, Pillow, scikit-image."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.exposure
import skimage.filters
from PIL import Image
from scipy import ndimage

from covid_flax.data.corruptions import CORRUPTIONS, STRENGTHS
from covid_flax.data.phantoms import CLASSES, draw

BY_NAME = {c.name: c for c in CORRUPTIONS}


@pytest.fixture(scope="module")
def image():
    return np.asarray(draw(CLASSES[0], seed=3, size=112)).reshape(112, 112, -1)[..., :1]


def change(name, image, strength, seed=0):
    return BY_NAME[name](image, strength, np.random.default_rng(seed))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_strength_changes_more_and_keeps_the_form(name, channels, image):
    image = np.repeat(image, channels, 2)
    before = image.copy()
    changes = []
    for strength in STRENGTHS:
        out = change(name, image, strength)
        assert out.dtype == np.uint8 and out.shape == image.shape
        assert (out == out[..., :1]).all()  # grey stays grey
        changes.append(np.abs(out.astype(int) - image).mean())
    np.testing.assert_array_equal(image, before)
    assert 0 < changes[0] < changes[-1] and changes == sorted(changes)


def test_what_one_grey_becomes(image):
    flat = np.full((40, 40, 1), 100, np.uint8)
    for name in ("blur", "sharpen", "contrast", "rescale", "crop", "equalize", "narrow"):
        np.testing.assert_array_equal(change(name, flat, 5), flat)
    assert (change("gamma_dark", flat, 5) == round(255 * (100 / 255) ** 2.4)).all()
    deviation = (change("noise", flat, 2).astype(float) - 100).std()
    assert abs(deviation - 8) < 0.6
    framed = change("black_border", flat, 4)[..., 0]
    assert (framed[4:-4, 4:-4] == 100).all()
    assert framed[:4].max() == framed[-4:].max() == framed[:, :4].max() == framed[:, -4:].max() == 0


def test_blur_sharpening_and_equalising_are_scikit_image_s(image):
    x = image.astype(np.float64)
    for strength, sigma in zip(STRENGTHS, BY_NAME["blur"].values, strict=True):
        want = skimage.filters.gaussian(x, (sigma, sigma, 0), mode="nearest", truncate=4)
        assert np.abs(change("blur", image, strength) - want).max() <= 0.51
    for strength, amount in zip(STRENGTHS, BY_NAME["sharpen"].values, strict=True):
        want = x + amount * (x - ndimage.gaussian_filter(x, (1, 1, 0), mode="nearest"))
        assert np.abs(change("sharpen", image, strength) - want.clip(0, 255)).max() <= 0.51
    flat = skimage.exposure.equalize_hist(image, nbins=256)
    got = change("equalize", image, 5)
    # Ours maps the darkest grey to black, theirs to its own share.
    first = flat.min()
    assert np.abs(got - 255 * (flat - first) / (1 - first)).max() <= 0.51


def test_a_crop_shows_the_middle(image):
    from PIL import Image

    for strength, share in zip(STRENGTHS, BY_NAME["crop"].values, strict=True):
        cut = round(112 * share)
        middle = Image.fromarray(image[cut : 112 - cut, cut : 112 - cut, 0])
        want = np.asarray(middle.resize((112, 112), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(change("crop", image, strength)[..., 0], want)


def test_a_narrow_picture_keeps_its_height_and_repeats_its_edges(image):
    from PIL import Image

    narrow = change("narrow", image, 4)[..., 0]
    want = np.asarray(Image.fromarray(image[..., 0]).resize((90, 112), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(narrow[:, 11:101], want)
    np.testing.assert_array_equal(narrow[:, :11], np.repeat(want[:, :1], 11, 1))
    np.testing.assert_array_equal(narrow[:, 101:], np.repeat(want[:, -1:], 11, 1))


def test_a_black_border_frames_the_whole_picture(image):
    want = Image.fromarray(image[..., 0]).resize((90, 90), Image.Resampling.BILINEAR)
    got = change("black_border", image, 4)
    np.testing.assert_array_equal(got[11:101, 11:101, 0], np.asarray(want))


def test_the_rest_is_numpy_s_and_pillow_s(image):
    x, how = image.astype(np.float64), Image.Resampling.BILINEAR
    picture = Image.fromarray(image[..., 0])
    exponents, factors = (0.85, 0.75, 0.65, 0.55, 0.45), (0.85, 0.7, 0.55, 0.4, 0.3)
    qualities, shares = (60, 40, 25, 15, 8), (0.8, 0.65, 0.5, 0.4, 0.3)
    table = zip(STRENGTHS, exponents, factors, qualities, shares, strict=True)
    for strength, exponent, factor, quality, share in table:
        want = 255 * (x / 255) ** exponent
        assert np.abs(change("gamma_bright", image, strength) - want).max() <= 0.5 + 1e-9
        want = (x.mean() + factor * (x - x.mean())).clip(0, 255)
        assert np.abs(change("contrast", image, strength) - want).max() <= 0.5 + 1e-9
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        got = change("jpeg", image, strength)[..., 0]
        np.testing.assert_array_equal(got, np.asarray(Image.open(file)))
        side = round(share * 112)
        want = picture.resize((side, side), how).resize((112, 112), how)
        np.testing.assert_array_equal(change("rescale", image, strength)[..., 0], np.asarray(want))
