"""Judges: NumPy flips, SciPy's affine transform, Pillow-free arithmetic."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from covid_flax.augment import Augment, augment


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (64, 24, 20, 3)), (0, 2, 2, 0))
    return smooth.astype(np.float32)


def _apply(images, seed=0, **how):
    return np.asarray(augment(jax.random.key(seed), images, Augment(**how)))


def test_nothing_by_default(images):
    np.testing.assert_array_equal(_apply(images), images)
    assert not Augment().active


def test_flip_takes_about_half_and_mirrors_exactly(images):
    out = _apply(images, flip=True)
    same = np.array([np.array_equal(a, b) for a, b in zip(out, images, strict=True)])
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)])
    assert np.all(same ^ mirrored)
    assert 18 <= mirrored.sum() <= 46


def test_brightness_scales_within_bounds_and_clips(images):
    out = _apply(images, brightness=0.3)
    ratio = out.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert ratio.min() < 0.85 and ratio.max() > 1.1
    assert out.min() >= 0 and out.max() <= 255
    unclipped = np.minimum(images[:1] * ratio[0], 255)
    np.testing.assert_allclose(out[:1], unclipped, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "how", [{"shift": 0.2}, {"rotate": 30.0}, {"scale": 0.3}, {"shift": 0.1, "rotate": 20.0}]
)
def test_warps_are_affine_resamplings(images, how):
    """For each image some affine map within the bounds reproduces it (SciPy is the judge)."""
    out = _apply(images[:3], **how)
    height, width = images.shape[1:3]
    for before, after in zip(images[:3, ..., 0], out[..., 0], strict=True):
        error = _best_affine_error(before, after, how, height, width)
        assert error < 2.0, error
        assert np.abs(before - after).mean() > 3 * error or np.abs(before - after).max() < 2


def _best_affine_error(before, after, how, height, width):
    from scipy.optimize import minimize

    bounds = np.array(
        [
            how.get("shift", 0) * height,
            how.get("shift", 0) * width,
            np.deg2rad(how.get("rotate", 0)),
            how.get("scale", 0),
        ]
    )
    free = bounds > 0
    centre = np.array([(height - 1) / 2, (width - 1) / 2])

    def error(x):
        p = np.zeros(4)
        p[free] = np.clip(x, -1, 1) * bounds[free]
        cos, sin = (1 + p[3]) * np.cos(p[2]), (1 + p[3]) * np.sin(p[2])
        matrix = np.array([[cos, -sin], [sin, cos]])
        offset = centre + p[:2] - matrix @ centre
        warped = ndimage.affine_transform(before, matrix, offset, order=1, mode="nearest")
        return np.abs(warped - after).mean()

    grid = np.linspace(-0.9, 0.9, 5)
    starts = np.array(np.meshgrid(*[grid] * free.sum())).reshape(free.sum(), -1).T
    ranked = sorted(starts, key=error)[:6]
    return min(minimize(error, s, method="Nelder-Mead").fun for s in ranked)


def test_an_image_s_draw_depends_on_the_key(images):
    how = {"shift": 0.1, "flip": True}
    np.testing.assert_array_equal(_apply(images, 3, **how), _apply(images, 3, **how))
    assert not np.array_equal(_apply(images, 3, **how), _apply(images, 4, **how))


def test_a_grey_image_changes_as_its_three_equal_channels_do(images):
    how = {"shift": 0.1, "flip": True, "rotate": 10.0, "scale": 0.1, "brightness": 0.2}
    grey = images[..., :1]
    want = _apply(np.repeat(np.asarray(grey), 3, -1), 3, **how)
    np.testing.assert_allclose(np.repeat(_apply(grey, 3, **how), 3, -1), want, atol=1e-3)


def test_contrast_and_gamma_are_what_they_say(images):
    out = _apply(images, contrast=0.5)
    factors = []
    for before, after in zip(images, out, strict=True):
        inside = (after > 0) & (after < 255)
        factor = np.polyfit(before[inside] - before.mean(), after[inside] - before.mean(), 1)[0]
        want = np.clip(before.mean() + (before - before.mean()) * factor, 0, 255)
        np.testing.assert_allclose(after, want, atol=0.05)
        factors.append(np.log(factor))
    assert -0.5 <= min(factors) < -0.2 and 0.2 < max(factors) <= 0.5

    out = _apply(images, gamma=0.4)
    powers = [
        np.log(after / 255).sum() / np.log(before / 255).sum()
        for before, after in zip(images, out, strict=True)
    ]
    assert np.exp(-0.4) <= min(powers) < 0.85 and 1.15 < max(powers) <= np.exp(0.4)
    for before, after, power in zip(images, out, powers, strict=True):
        np.testing.assert_allclose(after, 255 * (before / 255) ** power, atol=0.05)


def test_half_are_blurred_as_scipy_blurs_and_half_sharpened(images):
    out = _apply(images, blur=0.8)
    blurred = sharpened = 0
    for before, after in zip(images, out, strict=True):
        before, after = before.astype(np.float64), after.astype(np.float64)
        best = {}
        for sigma in np.linspace(0.08, 0.8, 73):
            smooth = ndimage.gaussian_filter(
                before, (sigma, sigma, 0), mode="nearest", radius=(3, 3, 0)
            )
            best[np.abs(smooth - after).max()] = "blurred"
            best[np.abs(np.clip(2 * before - smooth, 0, 255) - after).max()] = "sharpened"
        error = min(best)
        assert error < 0.3, error
        blurred += best[error] == "blurred"
        sharpened += best[error] == "sharpened"
    assert blurred >= 16 and sharpened >= 16


def test_noise_keeps_grey_grey_and_has_its_strength(images):
    flat = np.full((64, 40, 40, 3), 128, np.float32)
    change = _apply(flat, noise=0.1) - flat
    assert np.ptp(change, axis=-1).max() == 0
    deviation = change[..., 0].std((1, 2))
    assert deviation.max() < 0.11 * 255 and deviation.max() > 0.07 * 255
    assert deviation.min() < 0.03 * 255


def test_borders_and_boxes_are_where_they_may_be(images):
    white = np.full((64, 40, 30, 1), 255, np.float32)
    out = _apply(white, border=0.2)[..., 0]
    touched = (out == 0).any((1, 2))
    assert 18 <= touched.sum() <= 46
    assert np.all(out[:, 8:32, 6:24] == 255) and set(np.unique(out)) == {0, 255}
    for image in out[touched]:  # whole rows and columns
        rows, columns = (image == 255).any(1), (image == 255).any(0)
        np.testing.assert_array_equal(image == 255, np.outer(rows, columns))

    out = _apply(white, erase=0.5)[..., 0]
    boxes = out != 255
    touched = boxes.any((1, 2))
    assert 18 <= touched.sum() <= 46
    for image, box in zip(out[touched], boxes[touched], strict=True):
        np.testing.assert_array_equal(box, np.outer(box.any(1), box.any(0)))
        assert box.any(1).sum() <= 21 and box.any(0).sum() <= 16
        assert len(np.unique(image[box])) == 1
