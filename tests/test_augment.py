"""Judges: NumPy flips, SciPy's affine transform, scikit-image, Pillow-free arithmetic."""

import jax
import jax.numpy as jnp
import keys_cubic
import numpy as np
import pytest
from scipy import ndimage, special, stats
from skimage import data, exposure, transform

from covid_flax.augment import (
    Augment,
    _appearance,
    _geometry,
    _looked_up,
    _match_detail,
    _match_greys,
    _rings,
    augment,
    mix,
    restyle,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (64, 24, 20, 3)), (0, 2, 2, 0))
    return smooth.astype(np.float32)


_augment = jax.jit(augment, static_argnums=2)
_restyle = jax.jit(restyle, static_argnums=3)
_mixed = jax.jit(mix, static_argnums=2)


def _apply(images, seed=0, **how):
    return np.asarray(_augment(jax.random.key(seed), images, Augment(**how)))


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
    grey = np.full((64, 4, 4, 1), 100, np.float32)  # which no factor takes beyond white
    drawn = np.quantile(_apply(grey, brightness=0.3)[:, 0, 0, 0] / 100, [0, 0.25, 0.5, 0.75, 1])
    assert np.abs(drawn - np.linspace(0.7, 1.3, 5)).max() < 0.1  # evenly
    bright = _apply(np.full((64, 4, 4, 1), 250, np.float32), brightness=0.3)
    assert bright.max() == 255 and bright.min() < 200
    unclipped = np.minimum(images[:1] * ratio[0], 255)
    np.testing.assert_allclose(out[:1], unclipped, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "how",
    [
        {"shift": 0.2},
        {"rotate": 30.0},
        {"scale": 0.3},
        {"aspect": 0.3},
        {"shift": 0.1, "rotate": 20.0},
    ],
)
def test_warps_are_affine_resamplings(images, how):
    """For each image some affine map within the bounds reproduces it (SciPy is the judge)."""
    out = _apply(images[:3], **how)
    height, width = images.shape[1:3]
    for before, after in zip(images[:3, ..., 0], out[..., 0], strict=True):
        error = _best_affine_error(before, after, how, height, width)
        assert error < 0.15, error  # a centre off by half a pixel costs 0.26 and more
        assert np.abs(before - after).mean() > 3 * error or np.abs(before - after).max() < 2


@pytest.mark.parametrize("how", [{"shift": 0.2}, {"rotate": 30.0}, {"scale": 0.3}, {"aspect": 0.3}])
def test_warps_reach_as_far_as_they_are_told(how):
    """A blob off the centre moves, turns about it, or goes in and out, by up to the bound."""
    size, (y0, x0) = 61, (18.0, 18.0)
    y, x = np.mgrid[:size, :size]
    blob = 255 * np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / 18)
    out = _apply(np.repeat(np.float32(blob)[None, :, :, None], 400, 0), **how)[..., 0]
    mass = out.sum((1, 2))
    at = np.stack([(out * y).sum((1, 2)), (out * x).sum((1, 2))], -1) / mass[:, None] - 30
    start = np.array([y0, x0]) - 30
    if "shift" in how:
        drawn = (at - start) / size / how["shift"]
    elif "rotate" in how:
        turn = np.arctan2(at[:, 0], at[:, 1]) - np.arctan2(*start)
        drawn = np.rad2deg((turn + np.pi) % (2 * np.pi) - np.pi) / how["rotate"]
    elif "scale" in how:  # the output shows the input `zoom` times as far out
        drawn = (np.linalg.norm(start) / np.linalg.norm(at, axis=1) - 1) / how["scale"]
    else:
        drawn = np.log(at[:, 0] / at[:, 1] / (start[0] / start[1])) / 2 / how["aspect"]
    assert drawn.min() < -0.9 and drawn.max() > 0.9
    assert np.abs(drawn).max() < 1.1
    assert np.abs(np.percentile(drawn, [25, 50, 75]) - [-0.5, 0, 0.5]).max() < 0.2  # evenly


def _best_affine_error(before, after, how, height, width):
    from scipy.optimize import minimize

    bounds = np.array(
        [
            how.get("shift", 0) * height,
            how.get("shift", 0) * width,
            np.deg2rad(how.get("rotate", 0)),
            how.get("scale", 0),
            how.get("aspect", 0),
        ]
    )
    free = bounds > 0
    centre = np.array([(height - 1) / 2, (width - 1) / 2])

    def error(x):
        p = np.zeros(5)
        p[free] = np.clip(x, -1, 1) * bounds[free]
        cos, sin = (1 + p[3]) * np.cos(p[2]), (1 + p[3]) * np.sin(p[2])
        # Taller by exp(p[4]), so looked up at a height smaller by as much.
        matrix = np.diag([np.exp(-p[4]), np.exp(p[4])]) @ np.array([[cos, -sin], [sin, cos]])
        offset = centre + p[:2] - matrix @ centre
        warped = ndimage.affine_transform(before, matrix, offset, order=3, mode="nearest")
        return np.abs(warped - after).mean()

    grid = np.linspace(-0.9, 0.9, 5)
    starts = np.array(np.meshgrid(*[grid] * free.sum())).reshape(free.sum(), -1).T
    ranked = sorted(starts, key=error)[:6]
    return min(minimize(error, s, method="Nelder-Mead").fun for s in ranked)


def test_between_pixels_an_image_is_what_keys_cubic_makes_of_it():
    """His kernel (1981) in float64, over all pixels of the image continued beyond its edge."""
    rng = np.random.default_rng(1)
    image = rng.uniform(0, 255, (12, 9, 2)).astype(np.float32)
    rows, columns = rng.uniform(-4, 15, (20, 30)), rng.uniform(-4, 12, (20, 30))
    padded = np.pad(image.astype(np.float64), ((6, 6), (6, 6), (0, 0)), mode="edge")

    of_rows, of_columns = keys_cubic.kernel(rows, -6, 17), keys_cubic.kernel(columns, -6, 14)
    want = np.einsum("xyi,xyj,ijc->xyc", of_rows, of_columns, padded)
    got = _looked_up(jnp.asarray(image), np.float32(rows), np.float32(columns))
    np.testing.assert_allclose(got, np.clip(want, 0, 255), atol=2e-3)
    assert np.ptp(want) > 260  # some of it is clipped


def test_warped_images_keep_most_of_their_finest_detail():
    """A network trained on softened images would meet sharper ones where none is augmented."""
    noise = np.random.default_rng(0).normal(128, 20, (64, 64, 64, 1)).astype(np.float32)
    out = _apply(noise, shift=0.1, rotate=7.0)[:, 8:-8, 8:-8]
    assert 0.6 < out.var() / noise.var() < 1


def test_on_cpus_the_geometry_is_compiled_apart(images):
    """It takes ten times as long otherwise."""
    how = Augment(rotate=7.0, contrast=0.1)
    step = jax.jit(lambda key, x: augment(key, x, how))
    compiled = step.lower(jax.random.key(0), images[:2]).compile().as_text()
    assert " conditional(" in compiled


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


@pytest.mark.parametrize("most", [0.3, 0.8, 1.6])
def test_half_are_blurred_and_half_sharpened_by_what_they_are_told(images, most):
    """SciPy's Bessel functions make Lindeberg's kernel; every variance up to the bound is drawn."""
    out = _apply(images, blur=most)
    reach = np.arange(-8, 9)
    changes = []
    for before, after in zip(images.astype(np.float64), out.astype(np.float64), strict=True):
        errors = {}
        for variance in most**2 * np.linspace(0, 1, 201):
            taps = special.ive(reach, variance)
            smooth = ndimage.correlate1d(before, taps, 0, mode="reflect")
            smooth = ndimage.correlate1d(smooth, taps, 1, mode="reflect")
            errors[np.abs(smooth - after).max()] = -variance
            errors[np.abs(np.clip(2 * before - smooth, 0, 255) - after).max()] = variance
        strongest = np.abs(smooth - before).max()
        assert min(errors) < 0.01 * strongest + 0.005
        changes.append(errors[min(errors)] / most**2)
    changes = np.array(changes)
    assert 16 <= np.sum(changes > 0) <= 48
    drawn = np.quantile(np.abs(changes), [0, 0.25, 0.5, 0.75, 1])
    assert np.abs(drawn - np.linspace(0, 1, 5)).max() < 0.15  # evenly


def test_every_change_of_black_and_white_stays_in_range():
    x = np.where(np.indices((32, 32)).sum(0) // 5 % 3 == 0, 255, 0)
    x = np.tile(x[None, :, :, None], (64, 1, 1, 1)).astype(np.float32)
    geometry = {"flip": True, "shift": 0.1, "rotate": 9.0, "scale": 0.2, "aspect": 0.2}
    for how in (
        {"gamma": 0.3, "blur": 0.5},
        {"gamma": 0.3, **geometry},
        {"gamma": 0.3, "brightness": 0.3, "contrast": 0.3, "blur": 0.5, "noise": 0.1, **geometry},
    ):
        out = _apply(x, **how)
        assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 255, how


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.2])
def test_a_blur_has_the_variance_it_is_told(sigma):
    """A dot spreads to moments of that variance, however small: samples of a Gaussian would not."""
    dot = np.zeros((400, 31, 31, 1), np.float32)
    dot[:, 15, 15] = 200
    out = _apply(dot, blur=sigma)[..., 0].astype(np.float64)
    blurred = out[out[:, 15, 15] < 200]
    at = np.arange(31) - 15
    for line in (blurred.sum(1), blurred.sum(2)):
        variance = (line @ at**2) / line.sum(-1)
        assert variance.max() == pytest.approx(sigma**2, rel=0.03)
        assert np.mean(variance) == pytest.approx(sigma**2 / 2, rel=0.1)


def test_noise_keeps_grey_grey_and_has_its_strength(images):
    flat = np.full((64, 40, 40, 3), 128, np.float32)
    change = _apply(flat, noise=0.1) - flat
    assert np.ptp(change, axis=-1).max() == 0
    deviation = change[..., 0].std((1, 2))
    variance = (deviation / (0.1 * 255)) ** 2
    drawn = np.quantile(variance, [0, 0.25, 0.5, 0.75, 1])
    assert np.abs(drawn - np.linspace(0, 1, 5)).max() < 0.15  # evenly


def test_borders_and_boxes_are_where_they_may_be(images):
    white = np.full((64, 40, 30, 1), 255, np.float32)
    out = _apply(white, border=0.2)[..., 0]
    touched = (out == 0).any((1, 2))
    assert 18 <= touched.sum() <= 46
    assert np.all(out[:, 8:32, 6:24] == 255) and set(np.unique(out)) == {0, 255}
    for image in out[touched]:  # whole rows and columns
        rows, columns = (image == 255).any(1), (image == 255).any(0)
        np.testing.assert_array_equal(image == 255, np.outer(rows, columns))
    wide = _apply(np.full((400, 100, 100, 1), 255, np.float32), border=0.2)[..., 0] == 0
    wide = wide[wide.any((1, 2))]
    rows, columns = wide[:, :, 50], wide[:, 50]
    for band in (rows[:, :50], rows[:, 50:], columns[:, :50], columns[:, 50:]):
        width = np.quantile(band.sum(1), [0, 0.25, 0.5, 0.75, 1])
        assert np.abs(width - [0, 5, 10, 15, 20]).max() < 2.5  # evenly
        assert band.sum(1).mean() == pytest.approx(10, abs=1)

    out = _apply(white, erase=0.5)[..., 0]
    boxes = out != 255
    touched = boxes.any((1, 2))
    assert 18 <= touched.sum() <= 46
    for image, box in zip(out[touched], boxes[touched], strict=True):
        np.testing.assert_array_equal(box, np.outer(box.any(1), box.any(0)))
        assert box.any(1).sum() <= 21 and box.any(0).sum() <= 16
        assert len(np.unique(image[box])) == 1
    boxes = _apply(np.full((400, 100, 100, 1), 255, np.float32), erase=0.5)[..., 0] != 255
    inner = boxes[
        boxes.any((1, 2)) & ~boxes[:, [0, -1]].any((1, 2)) & ~boxes[..., [0, -1]].any((1, 2))
    ]
    for edge, opposite in ((boxes[:, 0], boxes[:, -1]), (boxes[:, :, 0], boxes[:, :, -1])):
        met = [lines.any(1).sum() for lines in (edge, opposite)]
        assert abs(met[0] - met[1]) < 4 * np.sqrt(sum(met)) and min(met) > 20
    for side in (inner.any(1).sum(1), inner.any(2).sum(1)):
        assert side.min() < 13 and 42 < side.max() <= 51  # a tenth of the most, to the most


@pytest.fixture(scope="module")
def photographs():
    """Grey natural photographs, 96 x 128."""
    of = [data.camera(), data.coins(), data.moon(), data.page()]
    resized = [transform.resize(x, (96, 128), anti_aliasing=True) for x in of]
    return (255 * np.stack(resized)[..., None]).astype(np.float32)


def test_matched_greys_are_those_of_scikit_image(photographs):
    others = photographs[[1, 2, 3, 0]]
    want = np.stack(
        [exposure.match_histograms(a, b) for a, b in zip(photographs, others, strict=True)]
    )
    got = np.asarray(_match_greys(photographs, others, np.ones(4)))
    error, before = np.abs(got - want).mean((1, 2, 3)), np.abs(photographs - want).mean((1, 2, 3))
    assert np.all(error < 6) and np.all(error < before / 4), (error, before)
    half = np.asarray(_match_greys(photographs, others, np.full(4, 0.5)))
    np.testing.assert_allclose(half, (photographs + got) / 2, atol=1e-3)
    np.testing.assert_allclose(_match_greys(photographs, others, np.zeros(4)), photographs)


def test_colours_are_moved_by_what_their_grey_is():
    """Not channel by channel: a red above the brightest grey would be cut off."""
    colour = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)).astype(np.float32)
    colour[..., 1:] /= 8
    got = np.asarray(_match_greys(colour, colour, np.ones(1)))
    assert np.abs(got - colour).max() < 8  # what lies outside the quantiles of some
    other = colour / 2
    got = np.asarray(_match_greys(colour, other, np.ones(1)))
    np.testing.assert_allclose(np.ptp(got - colour, -1), 0, atol=1e-3)
    np.testing.assert_allclose(got.mean(), other.mean(), rtol=0.02)


def _amplitudes(images):
    """Root mean square amplitude in rings of equal steps of log frequency, float64 `[N, 6]`."""
    height, width = images.shape[1:3]
    at = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    power = np.abs(np.fft.fft2(images[..., 0].astype(np.float64))) ** 2
    edges = np.geomspace(5, height / 2, 7)
    rings = [(low <= at) & (at < high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return np.sqrt(np.stack([power[:, ring].mean(-1) for ring in rings], -1))


def test_matched_detail_has_the_other_s_amplitude_and_its_own_phase(photographs):
    others = photographs[[1, 2, 3, 0]]
    got = np.asarray(_match_detail(photographs, others, np.ones(4)))
    want, before = np.log(_amplitudes(others)), np.log(_amplitudes(photographs))
    within = np.abs(want - before) < 1.4  # the most that is given or taken is exp(1.5)
    assert within.mean() > 0.5 and np.abs(want - before)[within].mean() > 0.4
    for part, aim in ((1.0, want), (0.5, (want + before) / 2)):
        some = np.asarray(_match_detail(photographs, others, np.full(4, part)))
        error = np.abs(np.log(_amplitudes(some)) - aim)[within]
        assert error.mean() < 0.1 and error.max() < 0.3, error
    untouched = np.asarray(_match_detail(photographs, others, np.zeros(4)))
    np.testing.assert_allclose(untouched, photographs, atol=1e-2)

    old, new = (np.fft.rfft2(x[..., 0].astype(np.float64)) for x in (photographs, got))
    np.testing.assert_allclose(np.angle(new / old)[np.abs(old) > 50], 0, atol=0.02)
    # What is coarser than 4 cycles a side by far stays.
    np.testing.assert_allclose(new[:, :3, :3], old[:, :3, :3], rtol=1e-3)


def test_rings_cover_all_but_the_coarsest_frequencies_once():
    belongs = _rings(96, 128).sum(1).reshape(96, 65)
    at = np.hypot(np.fft.fftfreq(96)[:, None] * 96, np.fft.rfftfreq(128) * 128)
    np.testing.assert_array_equal(belongs[at < 3], 0)
    np.testing.assert_allclose(belongs[at > 5], 1, rtol=1e-6)


def test_a_look_comes_from_every_class_alike_and_from_no_filler():
    """Of flat images that change, each has moved towards the grey of the one it took after."""
    labels = np.array([0] * 24 + [1] * 6 + [2] * 2 + [1] * 8)
    real = np.arange(40) < 32
    greys = np.where(real, np.array([100, 160, 40])[labels], 250).astype(np.float32)
    flat = np.tile(greys[:, None, None, None], (1, 16, 16, 3))
    styled = jax.jit(lambda key: restyle(key, flat, labels, 1.0, real))
    change = np.stack([np.asarray(styled(jax.random.key(i)))[:24] for i in range(100)]) - 100
    assert np.ptp(change, axis=(2, 3, 4)).max() < 1e-3
    change = change.mean((2, 3, 4))
    assert change.max() <= 60 and change.min() >= -60
    for share in (np.mean(change > 1e-3), np.mean(change < -1e-3)):
        assert abs(share - 1 / 3) < 0.03
    assert change.max() > 55 and change.min() < -55  # up to all of it


def test_a_look_is_detail_too_and_each_image_takes_its_own_part():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 64, 64))
    x[:32] = ndimage.gaussian_filter(x[:32], (0, 0.7, 0.7))
    x = np.float32(128 + 20 * x / x.std((1, 2), keepdims=True))[..., None]

    def likeness_of_neighbours(x):  # which no change of greys makes small in a soft image
        x = x[..., 0] - x.mean((1, 2, 3))[:, None, None]
        return (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2)) / (x * x).mean((1, 2))

    out = np.asarray(_restyle(jax.random.key(0), x, np.arange(64) // 32, 1.0))
    before, after = likeness_of_neighbours(x)[:32], likeness_of_neighbours(out)[:32]
    assert after.min() < before.min() - 0.1
    assert len(np.unique(np.round(before - after, 3))) > 10
    flat = np.float32(np.repeat([100, 160], 32)[:, None, None, None] * np.ones((64, 16, 16, 1)))
    out = np.asarray(_restyle(jax.random.key(0), flat, np.arange(64) // 32, 1.0))
    moved = np.abs(out - flat).mean((1, 2, 3)) / 60
    moved = moved[moved > 1e-3]
    assert len(np.unique(moved.round(4))) > 10 and 0.3 < np.median(moved) < 0.7


def test_a_share_of_the_images_is_restyled(photographs):
    images = np.tile(photographs, (16, 1, 1, 1))
    labels = np.arange(len(images)) % 4
    out = np.asarray(_restyle(jax.random.key(0), images, labels, 0.3))
    same = np.abs(out - images).max((1, 2, 3)) < 0.05
    assert 0.55 < same.mean() < 0.95  # 0.7, and those that took after their own like
    assert out.min() >= 0 and out.max() <= 255
    np.testing.assert_allclose(_restyle(jax.random.key(0), images, labels, 0.0), images, atol=1e-2)


@pytest.mark.parametrize(
    "shape",
    [(6, 8), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 8), (16, 16))), (32, 28)],
)
def test_small_images_are_restyled_too(shape):
    images = np.random.default_rng(0).uniform(0, 255, (8, *shape, 1)).astype(np.float32)
    out = np.asarray(_restyle(jax.random.key(0), images, np.arange(8) % 2, 1.0))
    assert np.all((out >= 0) & (out <= 255)) and not np.allclose(out, images)


def _mix(images, seed=0, real=None, **how):
    mixed, share = _mixed(jax.random.key(seed), images, Augment(**how), real)
    return np.asarray(mixed), np.asarray(share)


def test_mixup_averages_neighbours_by_a_beta_share(images):
    shares = []
    for seed in range(20):
        mixed, share = _mix(images, seed, mixup=0.4)
        s, other = share[:, None, None, None], np.roll(images, 1, 0)
        np.testing.assert_allclose(mixed, s * images + (1 - s) * other, atol=1e-3)
        shares.append(share)
    folded = 2 * np.concatenate(shares) - 1  # the Beta's larger part
    assert folded.min() >= 0
    judge = np.abs(2 * stats.beta(0.4, 0.4).rvs(20_000, random_state=0) - 1)
    assert stats.ks_2samp(folded, judge).pvalue > 0.01


def test_cutmix_pastes_one_box_whose_area_is_the_share_that_goes(images):
    mixed, share = _mix(images, cutmix=1.0)
    other = np.roll(images, 1, 0)
    pasted = np.all(mixed == other, -1)
    assert np.all(pasted | np.all(mixed == images, -1))
    np.testing.assert_allclose(1 - pasted.mean((1, 2)), share, atol=1e-6)
    assert 0.5 <= share.min() < 0.6 and 0.9 < share.max() <= 1
    shares = np.concatenate([_mix(images, seed, cutmix=1.0)[1] for seed in range(8)])
    assert stats.kstest(2 * shares - 1, "uniform").statistic < 0.1  # Beta(1, 1), its larger part
    places = set()
    for inside in pasted:
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows):
            assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            places.add((rows[0], columns[0]))
    assert len(places) > 30


def test_both_mixings_take_turns(images):
    mixed, _ = _mix(images, mixup=1.0, cutmix=1.0)
    other = np.roll(images, 1, 0)
    cut = np.all((mixed == other) | (mixed == images), (1, 2, 3))
    assert 18 <= cut.sum() <= 46
    # Each by its own strength: a Beta of 0.01 hardly mixes, one of 50 halves.
    mixed, share = _mix(images, mixup=0.01, cutmix=50.0)
    cut = np.all((mixed == other) | (mixed == images), (1, 2, 3)) & (share < 0.999)
    assert cut.sum() > 18 and share[cut].max() < 0.8 and np.median(share[~cut]) > 0.99


@pytest.mark.parametrize("how", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_what_only_fills_a_batch_up_is_mixed_into_nothing(images, how):
    real = np.arange(len(images)) < 40
    mixed, share = _mix(images, real=real, **how)
    # The first's neighbour is the last, which is no real one.
    assert share[0] == 1 and np.array_equal(mixed[0], images[0])
    assert np.mean(share[1:40] < 1) > 0.8  # a box may hold no pixel
    np.testing.assert_array_equal(share[41:], 1)


@pytest.mark.parametrize("how", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_not_a_bit_of_what_fills_up_is_mixed_in(how):
    """Greys far apart, whose difference rounds."""
    x = np.random.default_rng(2).uniform(0, 255, (8, 6, 6, 3)).astype(np.float32) ** 3 / 255**2
    mixed, _ = _mix(x, real=np.arange(8) < 5, **how)
    np.testing.assert_array_equal(mixed[0], x[0])


def test_no_key_is_drawn_from_twice(monkeypatch):
    used = []

    def noting(draw):
        def draw_and_note(key, *args, **kwargs):
            used.append(jax.random.key_data(key))
            return draw(key, *args, **kwargs)

        return draw_and_note

    for name in ("uniform", "normal", "bernoulli"):
        monkeypatch.setattr(jax.random, name, noting(getattr(jax.random, name)))
    how = Augment(
        flip=True, shift=0.1, rotate=5.0, scale=0.1, aspect=0.1, brightness=0.1, contrast=0.1,
        gamma=0.1, blur=0.5, noise=0.1, border=0.1, erase=0.1,
    )  # fmt: skip
    image = jnp.full((12, 10, 1), 100.0)

    @jax.jit
    def keys():
        _geometry(jax.random.key(0), image, how)
        _appearance(jax.random.key(0), image, how)
        return used

    drawn = {tuple(key.tolist()) for key in map(np.asarray, keys())}
    assert len(used) >= 15 and len(drawn) == len(used)


def test_rows_and_columns_are_drawn_apart():
    y, x = np.mgrid[:61, :61]
    blob = 255 * np.exp(-((y - 30) ** 2 + (x - 30) ** 2) / 18)
    out = _apply(np.repeat(np.float32(blob)[None, :, :, None], 200, 0), shift=0.2)[..., 0]
    at = np.stack([(out * y).sum((1, 2)), (out * x).sum((1, 2))]) / out.sum((1, 2))
    assert abs(np.corrcoef(at)[0, 1]) < 0.3
    boxes = _apply(np.full((400, 60, 60, 1), 255, np.float32), erase=0.5)[..., 0] != 255
    on_edge = boxes[:, [0, -1]].any((1, 2)) | boxes[..., [0, -1]].any((1, 2))
    whole = boxes[boxes.any((1, 2)) & ~on_edge]
    assert abs(np.corrcoef(whole.any(2).sum(1), whole.any(1).sum(1))[0, 1]) < 0.5
