"""Random changes of training images, on the device, inside the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Augment:
    """How much of each change; see the configuration's `augment`."""

    flip: bool = False
    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    aspect: float = 0.0
    style: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    border: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def active(self) -> bool:
        return any(dataclasses.astuple(self))

    @property
    def warps(self) -> bool:
        return bool(self.shift or self.rotate or self.scale or self.aspect)


def _geometry(key: Array, image: Array, how: Augment) -> Array:
    """The mirror image in half of the cases, and all warps in one resampling."""
    flip_key, shift_key, rotate_key, scale_key, _ = jax.random.split(key, 5)
    if how.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if how.warps:
        # Output pixel p shows input pixel centre + zoom * R(angle) (p - centre) + shift, so
        # all of these resample the image once. Outside: the nearest edge pixel.
        height, width = image.shape[:2]
        centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
        angle = jnp.deg2rad(how.rotate) * jax.random.uniform(rotate_key, minval=-1, maxval=1)
        zoom = 1 + how.scale * jax.random.uniform(scale_key, minval=-1, maxval=1)
        shift = how.shift * jnp.array([height, width])
        shift = shift * jax.random.uniform(shift_key, (2,), minval=-1, maxval=1)
        cos, sin = zoom * jnp.cos(angle), zoom * jnp.sin(angle)
        y = jnp.arange(height)[:, None] - centre[0]
        x = jnp.arange(width)[None, :] - centre[1]
        down, right = cos * y - sin * x, sin * y + cos * x
        if how.aspect:
            aspect_key = jax.random.fold_in(scale_key, 1)
            stretch = jnp.exp(how.aspect * jax.random.uniform(aspect_key, minval=-1, maxval=1))
            down, right = down / stretch, right * stretch
        image = _looked_up(image, down + centre[0] + shift[0], right + centre[1] + shift[1])
    return image


def _looked_up(image: Array, rows: Array, columns: Array) -> Array:
    """`image` at places between its pixels, by Keys' cubic; beyond the edge its nearest pixel.

    Lines between pixels would keep 4/9 of white noise's power where the cubic keeps 2/3, and a
    network trained on softened images meets sharper ones where nothing is augmented.
    """
    height, width = image.shape[:2]
    top, left = jnp.floor(rows), jnp.floor(columns)
    down = [jnp.clip(top + i, 0, height - 1).astype(jnp.int32) for i in (-1, 0, 1, 2)]
    right = [jnp.clip(left + i, 0, width - 1).astype(jnp.int32) for i in (-1, 0, 1, 2)]
    of_rows, of_columns = _keys_cubic(rows - top), _keys_cubic(columns - left)
    lines = [
        sum(weight[..., None] * image[y, x] for weight, x in zip(of_columns, right, strict=True))
        for y in down
    ]
    found = sum(weight[..., None] * line for weight, line in zip(of_rows, lines, strict=True))
    return jnp.clip(found, 0, 255)


def _keys_cubic(f: Any) -> tuple[Any, Any, Any, Any]:
    """Weights of the four pixels about a place `f` after the second (Keys 1981, a = -1/2)."""
    return (
        ((-0.5 * f + 1) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1,
        ((-1.5 * f + 2) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    )


def _appearance(key: Array, image: Array, how: Augment) -> Array:
    """What a scanner, an export or a crop changes."""
    # That is `_geometry`'s shift_key too; split once more, its draws are none of that one's.
    keys = jax.random.split(jax.random.fold_in(key, 1), 6)

    def symmetric(i: int) -> Array:
        return jax.random.uniform(keys[i], minval=-1, maxval=1)

    if how.brightness:
        bright_key = jax.random.split(key, 5)[4]  # the first four are the geometry's
        factor = 1 + how.brightness * jax.random.uniform(bright_key, minval=-1, maxval=1)
        image = jnp.clip(image * factor, 0, 255)
    if how.blur:
        image = _blur_or_sharpen(keys[0], image, how.blur)
    if how.contrast:
        mean = jnp.mean(image)
        image = jnp.clip(mean + (image - mean) * jnp.exp(how.contrast * symmetric(1)), 0, 255)
    if how.gamma:
        image = 255 * (image / 255) ** jnp.exp(how.gamma * symmetric(2))
    if how.noise:
        strength_key, noise_key = jax.random.split(keys[3])
        # One draw for all channels: a grey image stays grey. The variance is drawn evenly, for an
        # export's noise adds to it: so it shifts what is drawn by the smallest share.
        noise = jax.random.normal(noise_key, (*image.shape[:2], 1))
        image = image + noise * 255 * how.noise * jnp.sqrt(jax.random.uniform(strength_key))
        image = jnp.clip(image, 0, 255)
    if how.erase:
        image = _erase(keys[4], image, how.erase)
    if how.border:
        image = _border(keys[5], image, how.border)
    return image


def _blur_or_sharpen(key: Array, image: Array, most: float) -> Array:
    """Half of the images blurred by up to `most` pixels, half sharpened by as much again.

    By Lindeberg's discrete Gaussian (1990), whose variance is what it says: samples of the
    continuous one change next to nothing below 0.3 pixels. The variance is drawn evenly, and so
    is then the logarithm of what the blur leaves of a frequency.
    """
    which, strength = jax.random.split(key)
    variance = most**2 * jax.random.uniform(strength)
    height, width = image.shape[:2]
    down = _discrete_gaussian(height, variance)
    right = down if width == height else _discrete_gaussian(width, variance)
    blurred = jnp.einsum("ab,bcd,ec->aed", down, image, right, precision="highest")
    # Rounding can take a product with black below 0, of which gamma would make no number.
    return jnp.clip(jnp.where(jax.random.bernoulli(which), blurred, 2 * image - blurred), 0, 255)


def _discrete_gaussian(size: int, variance: Array) -> Array:
    """`[size, size]`: its product with a line blurs it, the line mirrored at its ends."""
    w = np.pi / size * np.arange(size)
    waves = np.sqrt(2 / size) * np.cos(np.outer(w, np.arange(size) + 0.5))
    waves[0] /= np.sqrt(2)
    waves = waves.astype(np.float32)
    left = jnp.exp(variance * (np.cos(w) - 1))  # of every wave
    return jnp.einsum("wa,w,wb->ab", waves, left, waves, precision="highest")


def _erase(key: Array, image: Array, most: float) -> Array:
    """In half of the images, one box of up to `most` of each side filled with one grey."""
    whether, size_key, place_key, grey_key = jax.random.split(key, 4)
    height, width = image.shape[:2]
    sides = jnp.array([height, width]) * most * jax.random.uniform(size_key, (2,), minval=0.1)
    # Centres anywhere: boxes hang over borders and corners too.
    centre = jnp.array([height, width]) * jax.random.uniform(place_key, (2,))
    y, x = jnp.arange(height)[:, None, None] + 0.5, jnp.arange(width)[None, :, None] + 0.5
    inside = (abs(y - centre[0]) < sides[0] / 2) & (abs(x - centre[1]) < sides[1] / 2)
    grey = 255 * jax.random.uniform(grey_key)
    return jnp.where(inside & jax.random.bernoulli(whether), grey, image)


def _border(key: Array, image: Array, most: float) -> Array:
    """In half of the images, bands of up to `most` of the side made black, each its own width."""
    whether, width_key = jax.random.split(key)
    height, width = image.shape[:2]
    top, bottom, left, right = most * jax.random.uniform(width_key, (4,))
    # Of pixels' centres, so that opposite bands are alike.
    y, x = jnp.arange(height)[:, None, None] + 0.5, jnp.arange(width)[None, :, None] + 0.5
    inside = (y >= top * height) & (y < (1 - bottom) * height)
    inside &= (x >= left * width) & (x < (1 - right) * width)
    return jnp.where(inside | ~jax.random.bernoulli(whether), image, 0)


def augment(key: Array, images: Array, how: Augment) -> Array:
    """Changes each image by its own draw.

    Args:
      key: a random key; image i's draw depends on it and i alone.
      images: `[N, H, W, C]`, 0..255.
      how: which changes, how strong.

    Returns:
      float32 of the same shape, 0..255.
    """
    images = images.astype(jnp.float32)
    if not how.active:
        return images
    keys = jax.random.split(key, images.shape[0])

    def geometry(keys: Array, images: Array) -> Array:
        return jax.vmap(lambda k, image: _geometry(k, image, how))(keys, images)

    def geometry_apart(keys: Array, images: Array) -> Array:
        # On CPUs the geometry takes ten times as long where XLA compiles it together with what
        # follows. A branch is compiled by itself, and that this one is always taken XLA misses.
        taken = (jax.random.key_data(key).ravel()[0] | 1) != 0
        return jax.lax.cond(taken, geometry, lambda _, images: images, keys, images)

    images = jax.lax.platform_dependent(keys, images, cpu=geometry_apart, default=geometry)
    return jax.vmap(lambda k, image: _appearance(k, image, how))(keys, images)


def stretched(images: Array, stretch: float) -> Array:
    """Height times, width over `stretch`, about the centre, as `aspect` draws it.

    Args:
      images: `[N, H, W, C]`, 0..255.
      stretch: above 0.

    Returns:
      float32 of the same shape, by Keys' cubic; beyond the edge its nearest pixel.
    """
    rows, columns = (
        _resampling(size, zoom)
        for size, zoom in zip(images.shape[1:3], (stretch, 1 / stretch), strict=True)
    )
    images = jnp.asarray(images, jnp.float32)
    found = jnp.einsum("ab,nbcd,ec->naed", rows, images, columns, precision="highest")
    return jnp.clip(found, 0, 255)


def _resampling(size: int, zoom: float) -> np.ndarray:
    """`[size, size]`: the row that makes a pixel of a zoomed line, from the line's pixels."""
    at = (np.arange(size) - (size - 1) / 2) / zoom + (size - 1) / 2
    first = np.floor(at)
    rows = np.zeros((size, size), np.float32)
    for i, weight in zip((-1, 0, 1, 2), _keys_cubic(at - first), strict=True):
        pixel = np.clip(first + i, 0, size - 1).astype(int)
        np.add.at(rows, (np.arange(size), pixel), weight)
    return rows


def _rings(height: int, width: int, count: int = 12, first: float = 4.0) -> np.ndarray:
    """Which ring each frequency of `rfft2` belongs to, float32 `[H * (W // 2 + 1), count]`.

    Rings lie at equal steps of the logarithm from `first` cycles a side to the finest there are;
    between two of them a frequency belongs to both in part. Coarser ones, the chest itself, are
    left out: their rows fade to zero.
    """
    y = np.fft.fftfreq(height)[:, None] * height
    x = np.fft.rfftfreq(width)[None, :] * width
    octaves = np.log2(np.maximum(np.hypot(y, x), 1e-9) / first)
    finest = max(min(height, width) / 2 / first, 2.0)  # of small images some rings are empty
    place = octaves / np.log2(finest) * (count - 1)
    near = np.clip(place, 0, count - 1)[..., None]
    belongs = np.maximum(0, 1 - abs(near - np.arange(count)))
    belongs *= np.clip(2 * octaves + 0.5, 0, 1)[..., None]
    return belongs.reshape(-1, count).astype(np.float32)


def _match_detail(images: Array, others: Array, part: Array) -> Array:
    """Fine detail as strong as in the other image, ring by ring; `part` of the way, `[N]`."""
    count, height, width = images.shape[:3]
    rings = _rings(height, width)

    def spectrum_and_strength(x: Array) -> tuple[Array, Array]:
        spectrum = jnp.fft.rfft2(jnp.mean(x, -1)).reshape(count, -1)
        power = jnp.abs(spectrum) ** 2 @ rings / np.maximum(rings.sum(0), 1e-6)
        # The least that counts is a noise of 0.03 greys: nothing is amplified out of nothing.
        return spectrum, 0.5 * jnp.log(power + 1e-3 * height * width)

    spectrum, mine = spectrum_and_strength(images)
    _, theirs = spectrum_and_strength(others)
    gain = jnp.exp((jnp.clip(theirs - mine, -1.5, 1.5) * part[:, None]) @ rings.T)
    change = (spectrum * (gain - 1)).reshape(count, height, -1)
    return images + jnp.fft.irfft2(change, (height, width))[..., None]


def _match_greys(images: Array, others: Array, part: Array) -> Array:
    """Greys distributed as in the other image, by 17 quantiles; `part` of the way, `[N]`."""
    of_some = np.linspace(0, 1, 17)

    def quantiles(x: Array) -> Array:
        grey = jnp.mean(x, -1)[:, 1::4, 1::4]
        ordered = jnp.sort(grey.reshape(len(x), -1), -1)
        return ordered[:, np.round(of_some * (ordered.shape[1] - 1)).astype(int)]

    mine, theirs = (quantiles(x)[..., None, None, None] for x in (images, others))
    grey = jnp.mean(images, -1, keepdims=True)
    matched = theirs[:, 0]
    for k in range(len(of_some) - 1):
        width = jnp.maximum(mine[:, k + 1] - mine[:, k], 0.5)
        rise = jnp.clip((grey - mine[:, k]) / width, 0, 1)
        matched = matched + rise * (theirs[:, k + 1] - theirs[:, k])
    return images + part[:, None, None, None] * (matched - grey)


def restyle(
    key: Array, images: Array, labels: Array, share: float, real: Array | None = None
) -> Array:
    """Gives images the look of others: how strong fine detail is, how greys are distributed.

    Where a class comes from other hospitals than the rest, its images look otherwise for no medical
    reason. The other image is drawn with equal chances for every class in the batch, whatever the
    image's own, and how much of its look is taken is drawn too: a look then tells little of the
    class. Detail by the amplitude of the spectrum (after Yang and Soatto 2020), its phase is kept;
    greys by quantiles (histogram matching).

    Args:
      key: a random key.
      images: `[N, H, W, C]`, 0..255; channels change alike.
      labels: int `[N]`.
      share: of the images, how many are changed, 0..1.
      real: bool `[N]`: False images only fill the batch up, and no look is theirs. None: all are.

    Returns:
      float32 of the same shape, 0..255.
    """
    images = jnp.asarray(images, jnp.float32)
    count = images.shape[0]
    real = jnp.ones(count, bool) if real is None else real
    which_key, other_key, detail_key, grey_key = jax.random.split(key, 4)
    of_class = jnp.sum((labels[:, None] == labels) & real, 1)
    chances = jnp.where(real, 1 / jnp.maximum(of_class, 1), 0)
    others = images[jax.random.categorical(other_key, jnp.log(chances), shape=(count,))]
    chosen = jax.random.bernoulli(which_key, share, (count,))
    part = chosen * jax.random.uniform(detail_key, (count,))
    images = jnp.clip(_match_detail(images, others, part), 0, 255)
    part = chosen * jax.random.uniform(grey_key, (count,))
    return jnp.clip(_match_greys(images, others, part), 0, 255)


def mix(key: Array, images: Array, how: Augment, real: Array | None = None) -> tuple[Array, Array]:
    """Mixes each image with the one before it in the batch (the first with the last).

    With `mixup` greys are averaged (Zhang et al. 2018), with `cutmix` one box is the other
    image's (Yun et al. 2019); with both, each image's draw decides between them. The share that
    stays is drawn from a Beta distribution of that strength, and is half or more (of a box, to
    whole pixels).

    Args:
      key: a random key.
      images: `[N, H, W, C]`, 0..255.
      how: `mixup` and `cutmix` of it are used.
      real: bool `[N]`: False images only fill the batch up and are mixed into none. None: all are.

    Returns:
      The images, and the share of each that is its own, float32 `[N]`.
    """
    count, height, width = images.shape[:3]
    which_key, share_key, place_key = jax.random.split(key, 3)
    both = bool(how.mixup and how.cutmix)
    cuts = (
        jax.random.bernoulli(which_key, 0.5, (count,)) if both else jnp.full(count, not how.mixup)
    )
    strength = jnp.where(cuts, how.cutmix, how.mixup) if both else how.mixup or how.cutmix
    share = jax.random.beta(share_key, strength, strength, (count,), jnp.float32)
    share = jnp.maximum(share, 1 - share)
    if real is not None:
        share = jnp.where(jnp.roll(real, 1), share, 1.0)
    other = jnp.roll(images, 1, axis=0)
    part = share[:, None, None, None]
    averaged = part * images + (1 - part) * other  # exactly the image where all of it stays
    if not how.cutmix:
        return averaged, share
    # A box wholly inside, of whole pixels: the share is what it leaves.
    sides = jnp.round(jnp.sqrt(1 - share)[:, None] * jnp.array([height, width])).astype(jnp.int32)
    room = jnp.array([height, width]) - sides
    first = jnp.floor(jax.random.uniform(place_key, (count, 2)) * (room + 1)).astype(jnp.int32)
    y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    inside = (y >= first[:, 0, None, None]) & (y < (first + sides)[:, 0, None, None])
    inside &= (x >= first[:, 1, None, None]) & (x < (first + sides)[:, 1, None, None])
    pasted = jnp.where(inside[..., None], other, images)
    left = 1 - jnp.prod(sides, 1) / (height * width)
    images = jnp.where(cuts[:, None, None, None], pasted, averaged)
    return images, jnp.where(cuts, left, share)
