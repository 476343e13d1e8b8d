"""Judges: copies planted among phantoms (the truth is known), SciPy's graphs, and the groups that
came with the real images."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from covid_flax.data import phantoms
from covid_flax.data.duplicates import SIDE, find_duplicates, thumbnail
from covid_flax.data.groups import connected

SIZE = 128


@pytest.fixture(scope="module")
def patients() -> list[np.ndarray]:
    """32 phantoms, each of another patient."""
    return [phantoms.draw(phantoms.CLASSES[i % 4], 1000 + i, SIZE) for i in range(32)]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def shift(image: Image.Image, dx: int, dy: int) -> Image.Image:
    moved = Image.new("L", image.size)
    moved.paste(image, (dx, dy))
    return moved


CHANGES = {
    "smaller": lambda im: im.resize((64, 64), Image.Resampling.BICUBIC),
    "larger": lambda im: im.resize((256, 256), Image.Resampling.BICUBIC),
    "stretched": lambda im: im.resize((150, 110), Image.Resampling.BICUBIC),
    "JPEG": lambda im: jpeg(im, 30),
    "darker": lambda im: ImageEnhance.Brightness(im).enhance(0.7),
    "brighter": lambda im: ImageEnhance.Brightness(im).enhance(1.3),
    "flatter": lambda im: ImageEnhance.Contrast(im).enhance(0.7),
    "gamma": lambda im: im.point([round(255 * (v / 255) ** 1.7) for v in range(256)]),
    "cropped": lambda im: im.crop((12, 6, 116, 120)),
    "cropped at a corner": lambda im: im.crop((0, 0, 115, 115)),
    "right and down": lambda im: shift(im, 10, 7),
    "left and up": lambda im: shift(im, -10, -7),
    "mirrored": lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def found(images: list[np.ndarray]) -> set[tuple[int, int]]:
    return {(p.first, p.second) for p in find_duplicates(np.stack(images))}


@pytest.mark.parametrize("change", CHANGES)
def test_finds_each_altered_copy_and_no_other_pair(patients, change):
    originals = [thumbnail(p) for p in patients]
    copies = [thumbnail(np.asarray(CHANGES[change](Image.fromarray(p)))) for p in patients[:8]]
    assert found(originals + copies) == {(i, 32 + i) for i in range(8)}


def test_says_which_pairs_are_equal_and_which_are_mirrored(patients):
    images = [thumbnail(patients[i]) for i in (0, 1, 2)]
    images += [images[0], images[1][:, ::-1], thumbnail(patients[2][4:, 4:])]
    equal, mirrored, cropped = find_duplicates(np.stack(images))
    assert (equal.first, equal.second, equal.exact, equal.similarity) == (0, 3, True, 1.0)
    assert (mirrored.first, mirrored.second, mirrored.mirrored) == (1, 4, True)
    assert (cropped.first, cropped.second, cropped.exact, cropped.mirrored) == (2, 5, False, False)
    assert 0.9 < cropped.similarity < 1


def test_other_patients_are_not_copies(patients):
    assert found([thumbnail(p) for p in patients]) == set()


def test_the_order_of_the_images_does_not_matter(patients):
    images = [thumbnail(p) for p in patients[:24]]
    images += [thumbnail(p[6:, :-4]) for p in patients[:12]]
    order = np.random.default_rng(0).permutation(len(images))
    pairs = {tuple(sorted((order[a], order[b]))) for a, b in found([images[i] for i in order])}
    assert pairs == found(images)


def test_a_group_larger_than_the_neighbourhood_stays_whole(patients):
    rng = np.random.default_rng(0)
    copies = []
    for _ in range(40):
        left, top, right, bottom = rng.integers(0, 9, 4)
        copies.append(thumbnail(patients[0][top : SIZE - bottom, left : SIZE - right]))
    images = copies + [thumbnail(p) for p in patients[1:]]
    groups = connected(len(images), sorted(found(images)))
    assert set(groups[:40]) == {0} and list(groups[40:]) == list(range(40, len(images)))


def test_digests_decide_what_is_equal(patients):
    image = thumbnail(patients[0])
    (pair,) = find_duplicates(np.stack([image, image]), digests=[b"a", b"b"])
    assert not pair.exact and pair.similarity > 0.99


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_images(patients, count):
    images = np.array([thumbnail(p) for p in patients[:count]], np.uint8).reshape(-1, SIDE, SIDE)
    assert find_duplicates(images) == []


def test_flat_images_are_copies_only_where_they_are_equal():
    levels = (0, 0, 90, 200)
    images = [np.full((SIDE, SIDE), level, np.uint8) for level in levels]
    assert found(images) == {(0, 1)}


def test_groups_are_the_components_of_the_graph():
    rng = np.random.default_rng(3)
    for count, links in ((1, 0), (30, 5), (50, 40), (40, 200)):
        pairs = rng.integers(0, count, (links, 2))
        ours = connected(count, [(int(a), int(b)) for a, b in pairs])
        graph = coo_array((np.ones(links), (pairs[:, 0], pairs[:, 1])), (count, count))
        _, theirs = connected_components(graph, directed=False)
        first = {component: int(np.flatnonzero(theirs == component)[0]) for component in theirs}
        assert ours.tolist() == [first[component] for component in theirs]


def test_finds_the_known_groups_of_the_real_images():
    root = Path(os.environ.get("COVID_FLAX_SHARED", "../shared")) / "data" / "radiography"
    if not root.is_dir():
        pytest.skip(f"no real images: {root} does not exist (set COVID_FLAX_SHARED)")
    with open(root / "manifest.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row["near_dup_group"], []).append(i)
    known = [group for group in members.values() if len(group) > 1]
    assert (len(known), sum(map(len, known))) == (182, 420)
    grouped = [i for group in known for i in group]
    others = np.random.default_rng(0).permutation(sorted(set(range(len(rows))) - set(grouped)))
    chosen = grouped + others[:200].tolist()
    images = [thumbnail(np.asarray(Image.open(root / rows[i]["file"]))) for i in chosen]
    pairs = find_duplicates(np.stack(images))

    groups = connected(len(chosen), [(p.first, p.second) for p in pairs])
    place = {i: k for k, i in enumerate(chosen)}
    assert all(len({groups[place[i]] for i in group}) == 1 for group in known)
    # No radiograph of this database stands in two classes; patients of several sources do not.
    labels = [rows[i]["label"] for i in chosen]
    assert all(labels[p.first] == labels[p.second] for p in pairs)
    # Seven and two exposures of one patient make the largest group: nothing is chained together.
    assert np.bincount(groups).max() <= 12
