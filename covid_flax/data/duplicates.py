"""Finds images that show the same radiograph: copies, also altered ones.

All chest X-rays look alike, so the search has two steps. The first is cheap and generous: each
image's centre, as a few whitened numbers (principal components), is compared with many windows of
every other image; the nearest few are candidates. The second is strict: of each candidate pair, the
centre of one image is registered in the other (shift and stretch, by the inverse compositional
Gauss-Newton method of Baker and Matthews 2004), and the fine detail of the two must then correlate
block by block. Anatomy makes the coarse shapes of two patients agree, but not their detail.

Brightness and contrast are taken out beforehand, by local mean and standard deviation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm import tqdm

SIDE = 64  # of the thumbnails that are compared
THRESHOLD = 0.85  # of similarity; measured in benchmarks/audit_recall.py

# The centre is four fifths of a side: it stays in view under a shift or crop of a tenth.
_CENTRE = 0.8
_NEIGHBOURS = 8
_MIRRORED_NEIGHBOURS = 3
_COMPONENTS = 64
_COARSE, _MEDIUM, _FINE = 12, 24, 48  # samples across the centre: search, first look, verdict
_FIRST_LOOK = 0.6
# Blocks whose detail is fainter than this are noise, or clipped to black or white. In units of
# the local standard deviation, squared.
_FAINTEST = 0.01
_FEWEST_BLOCKS = 8
_BLOCK = 6
_CHUNK = 256
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two images of the same radiograph.

    Attributes:
      first: index of one image, less than `second`.
      second: index of the other.
      similarity: 1 for equal content, else the mean correlation of fine detail after registration,
        at least the threshold.
      exact: whether the pixels are equal.
      mirrored: whether one is left-right mirrored.
    """

    first: int
    second: int
    similarity: float
    exact: bool = False
    mirrored: bool = False


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The image as `find_duplicates` wants it: uint8 `[SIDE, SIDE]`, grey, averaged.

    Args:
      pixels: uint8 `[height, width, 3]` (luma, as Pillow's "L") or `[height, width]`.
    """
    image = Image.fromarray(pixels).convert("L")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def find_duplicates(
    images: np.ndarray,
    *,
    digests: Sequence[bytes] | None = None,
    threshold: float = THRESHOLD,
    progress: bool = False,
) -> list[Pair]:
    """Pairs of images that show the same radiograph.

    Resized, re-encoded, brightened, slightly cropped or shifted copies count, and mirrored ones.
    Of images with equal content only the first is compared with others; the rest are paired with
    it. So the pairs link each group of copies, but need not hold all its pairs.

    Args:
      images: uint8 `[N, SIDE, SIDE]`, see `thumbnail`.
      digests: digest of each image's content. None takes the thumbnails' own.
      threshold: least similarity of a pair, between 0 and 1.
      progress: whether to show a progress bar.

    Returns:
      Pairs sorted by index. The same images give the same pairs.
    """
    if digests is None:
        digests = [image.tobytes() for image in images]
    seen: dict[bytes, int] = {}
    pairs = []
    for i, digest in enumerate(digests):
        first = seen.setdefault(digest, i)
        if first != i:
            pairs.append(Pair(first, i, 1.0, exact=True))
    kept = np.fromiter(seen.values(), np.int64, len(seen))
    if len(kept) > 1:
        for a, b, mirrored, similarity in _near(images[kept], threshold, progress):
            first, second = sorted((int(kept[a]), int(kept[b])))
            pairs.append(Pair(first, second, similarity, mirrored=mirrored))
    return sorted(pairs, key=lambda p: (p.first, p.second))


def _near(
    images: np.ndarray, threshold: float, progress: bool
) -> Iterator[tuple[int, int, bool, float]]:
    """`(a, b, mirrored, similarity)` of the pairs that pass, each once."""
    # The products are many and small: threads of our own gain more than BLAS's.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        flat = np.concatenate(list(pool.map(_flattened, _parts(images, 1024))))
        search = _Search(flat)
        jobs: list[_Job] = []
        for mirrored in (False, True):
            found = search.candidates(mirrored, pool, progress)
            parts = zip(*(_parts(x, _CHUNK) for x in found), strict=True)
            jobs += [_Job(mirrored, *part) for part in parts]

        def verify(job: _Job) -> np.ndarray:
            fixed = flat[job.template].astype(np.float32)
            moving = flat[job.target].astype(np.float32)
            if job.mirrored:
                moving = moving[:, :, ::-1]
            return _similarity(fixed, moving, job.windows, threshold)

        best: dict[tuple[int, int], tuple[float, bool]] = {}
        verified = tqdm(
            pool.map(verify, jobs),
            total=len(jobs),
            desc="Verifying pairs",
            bar_format=_BAR,
            disable=not progress,
        )
        for job, similarity in zip(jobs, verified, strict=True):
            for k in np.flatnonzero(similarity >= threshold):
                a, b = sorted((int(job.template[k]), int(job.target[k])))
                best[a, b] = max(
                    best.get((a, b), (0.0, False)), (float(similarity[k]), job.mirrored)
                )
    for (a, b), (value, mirrored) in sorted(best.items()):
        yield a, b, mirrored, min(value, 1.0)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Candidates to verify: the centres of `template` in `windows` of `target`."""

    mirrored: bool
    template: np.ndarray
    target: np.ndarray
    windows: np.ndarray


def _parts(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[k : k + size] for k in range(0, len(x), size)]


def _flattened(images: np.ndarray) -> np.ndarray:
    """Without local brightness and contrast: float16 `[n, SIDE, SIDE]`."""
    wide = _blur(SIDE, SIDE / 8)
    images = images.astype(np.float32)
    detail = images - wide @ images @ wide.T
    deviation = np.sqrt(np.maximum(wide @ (detail * detail) @ wide.T, 0))
    # Two grey levels more: what is flatter than that is rounding and compression.
    return (detail / (deviation + 2)).astype(np.float16)


def _blur(size: int, sigma: float) -> np.ndarray:
    """Gaussian blur as a matrix, float32 `[size, size]`, the edge continued outwards."""
    from scipy import ndimage

    identity = np.eye(size, dtype=np.float32)
    return ndimage.gaussian_filter1d(identity, sigma, axis=0, mode="nearest")


# Windows of an image in which another one's centre may lie, as (stretch, shift) along x and y:
# the centre's point u, from -0.4 to 0.4, lies at shift + stretch * u from the middle. Shifts are
# needed for one half plane only, for each pair is tried both ways round.
_STEPS = (-0.08, -0.04, 0.0, 0.04, 0.08)
_WINDOWS = np.array(
    [(1.0, x, 1.0, y) for y in _STEPS for x in _STEPS if (y, x) >= (0.0, 0.0)]
    + [(0.9, x, 0.9, y) for y in _STEPS[1:4] for x in _STEPS[1:4]]
    + [(0.8, 0.0, 0.8, 0.0)],
    np.float32,
)
_STRAIGHT = np.array([1.0, 0.0, 1.0, 0.0], np.float32)


class _Search:
    """Candidate pairs by nearest neighbours in a whitened space of windows."""

    def __init__(self, flat: np.ndarray) -> None:
        self._flat = flat
        rng = np.random.default_rng(0)
        sample = np.sort(rng.permutation(len(flat))[:1500])
        windows = _unit(_views(flat[sample], _WINDOWS[::3])).reshape(-1, _COARSE**2)
        self._mean = windows.mean(0)
        centred = windows - self._mean
        values, vectors = np.linalg.eigh(centred.T @ centred / len(windows))
        # Few images span few components; the rest would be rounding, blown up.
        count = min(_COMPONENTS, max(1, int((values > 1e-4 * values[-1]).sum())))
        scale = np.sqrt(np.maximum(values[-count:], 1e-12))  # 0 where all images are flat
        self._whiten = (vectors[:, -count:] / scale).astype(np.float32)
        self._centres = self._embed(_STRAIGHT[None])[0]

    def _embed(self, windows: np.ndarray, mirrored: bool = False) -> np.ndarray:
        """Unit vectors, float32 `[windows, N, components]`."""
        embedded = []
        for images in _parts(self._flat, 1024):
            views = _views(images[:, :, ::-1] if mirrored else images, windows)
            embedded.append(_unit((_unit(views) - self._mean) @ self._whiten, centre=False))
        return np.concatenate(embedded, 1)

    def candidates(
        self, mirrored: bool, pool: ThreadPoolExecutor, progress: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Template, target (int64 `[pairs]`), and the target's windows (float32 `[pairs, 4]`)."""
        windows = _STRAIGHT[None] if mirrored else _WINDOWS
        views = self._embed(windows, mirrored)
        num = len(self._flat)
        count = min(_MIRRORED_NEIGHBOURS if mirrored else _NEIGHBOURS, num - 1)

        def nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            likeness = views[0, rows] @ self._centres.T
            other = np.empty_like(likeness)
            for view in views[1:]:
                np.matmul(view[rows], self._centres.T, out=other)
                np.maximum(likeness, other, out=likeness)
            likeness[np.arange(len(rows)), rows] = -2  # itself
            chosen = np.argpartition(likeness, num - count, axis=1)[:, num - count :].copy()
            return chosen, np.take_along_axis(likeness, chosen, 1)

        rows = _parts(np.arange(num), 128)
        blocks = list(
            tqdm(
                pool.map(nearest, rows),
                total=len(rows),
                desc="Comparing mirrored" if mirrored else "Comparing images",
                bar_format=_BAR,
                disable=not progress,
            )
        )
        template = np.concatenate([chosen for chosen, _ in blocks]).ravel()
        likeness = np.concatenate([found for _, found in blocks]).ravel()
        target = np.repeat(np.arange(num), count)
        # Where both have found each other, the better way round is enough.
        pair = np.minimum(target, template) * num + np.maximum(target, template)
        order = np.lexsort((-likeness, pair))
        order = order[np.unique(pair[order], return_index=True)[1]]
        template, target = template[order], target[order]
        chosen = [
            np.einsum("vpd,pd->vp", views[:, b], self._centres[a]).argmax(0)
            for a, b in zip(_parts(template, 4096), _parts(target, 4096), strict=True)
        ]
        return template, target, windows[np.concatenate(chosen)]


def _views(images: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Windows of the images: `[windows, n, _COARSE**2]`."""
    images = images.astype(np.float32)
    rows = _sampling(windows[:, 2], windows[:, 3], _COARSE, SIDE)
    columns = _sampling(windows[:, 0], windows[:, 1], _COARSE, SIDE)
    views = rows[:, None] @ images @ columns[:, None].transpose(0, 1, 3, 2)
    return views.reshape(len(windows), len(images), -1)


def _unit(x: np.ndarray, *, centre: bool = True) -> np.ndarray:
    if centre:
        x = x - x.mean(-1, keepdims=True)
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def _sampling(stretch: np.ndarray, shift: np.ndarray, num: int, side: int) -> np.ndarray:
    """Matrices that take `num` samples across the window: float32 `[P, num, side]`.

    Each sample is a triangle as wide as the samples' distance, at least a pixel (linear
    interpolation), and loses what lies outside of the image.
    """
    u = ((np.arange(num, dtype=np.float32) + 0.5) / num - 0.5) * _CENTRE
    at = (0.5 + shift[:, None] + stretch[:, None] * u) * side - 0.5
    width = np.maximum(1, np.abs(stretch) * (_CENTRE * side / num))
    pixels = np.arange(side, dtype=np.float32)
    weights = np.maximum(1 - np.abs(pixels - at[:, :, None]) / width[:, None, None], 0)
    return weights / width[:, None, None]


def _sample(images: np.ndarray, windows: np.ndarray, num: int) -> np.ndarray:
    """Each image's window: float32 `[P, num, num]`."""
    side = images.shape[-1]
    rows = _sampling(windows[:, 2], windows[:, 3], num, side)
    columns = _sampling(windows[:, 0], windows[:, 1], num, side)
    return rows @ images @ columns.transpose(0, 2, 1)


def _similarity(
    fixed: np.ndarray, moving: np.ndarray, windows: np.ndarray, threshold: float
) -> np.ndarray:
    """Similarity of pairs `[P]`; 0 where a first look at half the resolution tells them apart."""
    small, other = _pooled(fixed, 2), _pooled(moving, 2)
    windows = _register(small, other, windows, _MEDIUM, 6)
    alike = np.flatnonzero(_agreement(small, other, windows, _MEDIUM) >= _FIRST_LOOK)
    similarity = np.zeros(len(fixed), np.float32)
    if len(alike):
        similarity[alike], windows = _verdict(fixed[alike], moving[alike], windows[alike])
        # The centre of one may be cut off, or border on a frame, in the other: then turn round.
        undecided = similarity[alike] < threshold
        alike, windows = alike[undecided], windows[undecided]
    if len(alike):
        back = np.empty_like(windows)
        back[:, ::2] = 1 / windows[:, ::2]
        back[:, 1::2] = -windows[:, 1::2] / windows[:, ::2]
        again, _ = _verdict(moving[alike], fixed[alike], back)
        similarity[alike] = np.maximum(similarity[alike], again)
    return similarity


def _verdict(
    fixed: np.ndarray, moving: np.ndarray, windows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    windows = _register(fixed, moving, windows, _FINE, 4)
    return _agreement(fixed, moving, windows, _FINE), windows


def _register(
    fixed: np.ndarray, moving: np.ndarray, windows: np.ndarray, num: int, steps: int
) -> np.ndarray:
    """The windows of `moving` that look most like the centres of `fixed`, `[P, 4]`."""
    template = _standard(_sample(fixed, np.tile(_STRAIGHT, (len(fixed), 1)), num))
    u = (((np.arange(num) + 0.5) / num - 0.5) * _CENTRE).astype(np.float32)
    down, across = (g * (num / _CENTRE) for g in np.gradient(template, axis=(1, 2)))
    descent = np.stack([across * u, across, down * u[:, None], down], 1)
    descent = descent.reshape(len(fixed), 4, -1)
    hessian = descent @ descent.transpose(0, 2, 1)
    ridge = 1e-4 * np.trace(hessian, axis1=1, axis2=2) + 1e-3
    solve = np.linalg.inv(hessian + ridge[:, None, None] * np.eye(4, dtype=np.float32)) @ descent

    best = np.full(len(fixed), np.inf, np.float32)
    chosen = windows.copy()
    for step in range(steps + 1):
        error = (_standard(_sample(moving, windows, num)) - template).reshape(len(fixed), -1)
        loss = np.einsum("pi,pi->p", error, error)
        better = loss < best
        best[better], chosen[better] = loss[better], windows[better]
        if step < steps:
            change = np.clip((solve @ error[:, :, None])[:, :, 0], -0.08, 0.08)
            windows = windows.copy()
            windows[:, ::2] /= 1 + change[:, ::2]
            windows[:, 1::2] -= windows[:, ::2] * change[:, 1::2]
            # A wider search would find chests of other patients.
            windows[:, ::2] = np.clip(windows[:, ::2], 0.6, 1.5)
            windows[:, 1::2] = np.clip(windows[:, 1::2], -0.2, 0.2)
    return chosen


def _standard(x: np.ndarray) -> np.ndarray:
    x = x - x.mean((1, 2), keepdims=True)
    return x / (np.sqrt((x * x).mean((1, 2), keepdims=True)) + 1e-6)


def _agreement(fixed: np.ndarray, moving: np.ndarray, windows: np.ndarray, num: int) -> np.ndarray:
    """Mean correlation of fine detail over the blocks that show detail in both, `[P]`.

    Every block counts alike, or a frame's or a letter's sharp edge would decide alone.
    """
    blur = _blur(num, 1.5)
    a = _sample(fixed, np.tile(_STRAIGHT, (len(fixed), 1)), num)
    b = _sample(moving, windows, num)
    a, b = a - blur @ a @ blur.T, b - blur @ b @ blur.T
    energy = np.sqrt(_pooled(a * a, _BLOCK) * _pooled(b * b, _BLOCK))
    shown = energy > _FAINTEST
    correlation = np.where(shown, _pooled(a * b, _BLOCK) / np.maximum(energy, _FAINTEST), 0)
    count = shown.sum((1, 2))
    enough = count >= min(_FEWEST_BLOCKS, shown[0].size // 2)
    return np.where(enough, correlation.sum((1, 2)) / np.maximum(count, 1), 0)


def _pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks: `[P, n, n]` to `[P, n / size, n / size]`."""
    num = x.shape[-1]
    pool = np.repeat(np.eye(num // size, dtype=np.float32) / size, size, axis=1)
    return pool @ x @ pool.T
