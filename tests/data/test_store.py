"""Judges: Pillow for the pixels, NumPy's own reader for the file; real small image files."""

import multiprocessing
import os
import platform
import resource
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from covid_flax import distributed
from covid_flax.data import store
from covid_flax.data.builder import prepare
from covid_flax.data.dataset import Dataset
from covid_flax.data.folder import open_folder
from covid_flax.data.pipeline import ImageSource, StoreSource
from covid_flax.data.splits import Row
from covid_flax.errors import UserError
from ml_collections_configs import base

SIZE = 32


def _draw(path: Path, rng: np.random.Generator, *, colour: bool = False) -> None:
    height, width = rng.integers(20, 60, 2)
    shape = (height, width, 3) if colour else (height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)


def make_data(root: Path, *, coloured: tuple[int, ...] = ()) -> Dataset:
    """Ten images, PNG and JPEG, of different sizes; the last of each class is `val`."""
    rng = np.random.default_rng(0)
    for i in range(10):
        label, suffix = ("a", "b")[i // 5], ("png", "jpg")[i % 2]
        _draw(root / "data" / label / f"{i}.{suffix}", rng, colour=i in coloured)
    return open_data(root)


def open_data(root: Path) -> Dataset:
    folder = open_folder(str(root / "data"))
    rows = [Row(f.file, f.label, "val" if i % 5 == 4 else "train", "")
            for i, f in enumerate(folder.files)]  # fmt: skip
    return Dataset(folder, prepare(folder, root / "cache"), rows, folder.class_names)


def make_config(**changes):
    config = base.get_config().data
    config.image_size = SIZE
    for key, value in changes.items():
        config[key] = value
    return config


def by_pillow(root: Path, file: str, how: Image.Resampling, sides: list[int]) -> np.ndarray:
    image = Image.open(root / "data" / file).convert("RGB")
    for side in sides:
        image = image.resize((side, side), how)
    return np.asarray(image)


def in_colour(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def everything(source) -> np.ndarray:
    return in_colour(source.gather(np.arange(len(source)))["image"])


def stores(data: Dataset) -> list[Path]:
    return sorted(data.records.place.glob("pixels-*"))


def leftovers(data: Dataset) -> list[Path]:
    return list(data.records.place.glob(".*.part"))


def decodes(monkeypatch) -> list[int]:
    """Grows by the index of every image that is decoded."""
    seen = []
    real = ImageSource.__getitem__

    def counted(self, i):
        seen.append(i)
        return real(self, i)

    monkeypatch.setattr(ImageSource, "__getitem__", counted)
    return seen


@pytest.mark.parametrize("coloured", [(), (0,), (7,), (9,), tuple(range(10))])
@pytest.mark.parametrize(
    ("interpolation", "intermediate"), [("nearest", 0), ("bilinear", 0), ("lanczos", 48)]
)
def test_the_pixels_are_pillows(tmp_path, coloured, interpolation, intermediate):
    data = make_data(tmp_path, coloured=coloured)
    config = make_config(interpolation=interpolation, intermediate_size=intermediate)
    sides = [intermediate, SIZE] if intermediate else [SIZE]
    how = Image.Resampling[interpolation.upper()]
    for split, count in (("train", 8), ("val", 2), ("all", 10)):
        source = data.source(split, config)
        assert isinstance(source, StoreSource) and len(source) == count
        images = everything(source)
        assert images.dtype == np.uint8
        for i, row in enumerate(data.files(split)):
            expected = by_pillow(tmp_path, row.file, how, sides)
            np.testing.assert_array_equal(images[i], expected)
            np.testing.assert_array_equal(in_colour(source[i]["image"]), expected)
            assert source[i]["label"] == "ab".index(row.label)
        np.testing.assert_array_equal(
            source.gather(np.arange(count))["label"], data.labels(split), strict=True
        )


def test_an_image_of_equal_channels_is_grey(tmp_path):
    """As copies of X-rays saved in RGB are: one channel holds them."""
    data = make_data(tmp_path)
    for path in (tmp_path / "data").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    data = open_data(tmp_path)
    source = data.source("train", make_config())
    assert source.images.shape == (10, SIZE, SIZE, 1)
    expected = by_pillow(tmp_path, data.files("train")[0].file, Image.Resampling.NEAREST, [SIZE])
    np.testing.assert_array_equal(in_colour(source[0]["image"]), expected)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_one_coloured_pixel_is_kept(tmp_path, channel):
    make_data(tmp_path)
    pixels = np.full((SIZE, SIZE, 3), 100, np.uint8)
    pixels[-1, -1, channel] = 101
    Image.fromarray(pixels).save(tmp_path / "data/b/6.png")
    data = open_data(tmp_path)
    source = data.source("train", make_config())
    place = [row.file for row in data.files("train")].index("b/6.png")
    np.testing.assert_array_equal(source[place]["image"], pixels)
    np.testing.assert_array_equal(everything(source)[place], pixels)


def test_the_file_is_a_plain_npy(tmp_path):
    data = make_data(tmp_path, coloured=(3,))
    source = data.source("train", make_config())
    (path,) = stores(data)
    assert path.name == f"pixels-32-nearest-0-pillow{PIL.__version__}-v1.npy"
    images = np.load(path)
    np.testing.assert_array_equal(images, source.images, strict=True)
    assert images.shape == (10, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="read-only"):
        source.images[0] = 0


def test_each_image_is_decoded_once_for_all_splits_and_runs(tmp_path, monkeypatch, capfd):
    data = make_data(tmp_path)
    seen = decodes(monkeypatch)
    for split in ("train", "val", "all", "train"):
        everything(data.source(split, make_config()))
    assert sorted(seen) == list(range(10))
    assert "Decoding images: 100%" in capfd.readouterr().err
    everything(open_data(tmp_path).source("train", make_config()))
    assert len(seen) == 10 and capfd.readouterr() == ("", "")


def test_other_settings_and_other_images_have_their_own(tmp_path):
    data = make_data(tmp_path)
    for change in ({}, {"image_size": 40}, {"interpolation": "box"}, {"intermediate_size": 50}):
        data.source("train", make_config(**change))
    assert len(stores(data)) == 4
    assert data.source("val", make_config(image_size=40)).images.shape == (10, 40, 40, 1)

    file = data.files("train")[0].file
    _draw(tmp_path / "data" / file, np.random.default_rng(9))
    changed = open_data(tmp_path)
    assert stores(changed) == []
    expected = by_pillow(tmp_path, file, Image.Resampling.NEAREST, [SIZE])
    got = changed.source("train", make_config())[0]["image"]
    np.testing.assert_array_equal(in_colour(got), expected)


@pytest.mark.parametrize("attribute", ["STORE_VERSION", "PIL"])
def test_another_version_has_its_own(tmp_path, monkeypatch, attribute):
    data = make_data(tmp_path)
    data.source("train", make_config())
    other = type("Module", (), {"__version__": "0.0"}) if attribute == "PIL" else 0
    monkeypatch.setattr(store, attribute, other)
    open_data(tmp_path).source("train", make_config())
    assert len(stores(data)) == 2


def test_only_training_builds_one(tmp_path):
    data = make_data(tmp_path)
    for split in ("val", "all"):
        assert isinstance(data.source(split, make_config()), ImageSource)
    assert stores(data) == []
    data.source("train", make_config())
    assert isinstance(data.source("val", make_config()), StoreSource)
    assert isinstance(open_data(tmp_path).source("val", make_config()), StoreSource)


def test_a_process_without_a_store_has_all_decode(tmp_path, monkeypatch):
    """Images of a store may have one channel, decoded ones three: one program takes either."""
    data = make_data(tmp_path)
    monkeypatch.setattr(distributed, "anywhere", lambda here: True)
    assert isinstance(data.source("train", make_config()), ImageSource)
    monkeypatch.undo()
    assert isinstance(open_data(tmp_path).source("train", make_config()), StoreSource)


def test_without_a_store_images_and_labels_are_the_same(tmp_path):
    data = make_data(tmp_path, coloured=(3,))
    for split in ("train", "val"):
        source = data.source(split, make_config(store_gb=0.0))
        assert isinstance(source, ImageSource)
        labels = [row.label for row in data.rows if row.split == split]
        assert [data.class_names[source[i]["label"]] for i in range(len(source))] == labels
        for i, row in enumerate(data.files(split)):
            want = by_pillow(tmp_path, row.file, Image.Resampling.NEAREST, [SIZE])
            np.testing.assert_array_equal(in_colour(source[i]["image"]), in_colour(want))


def test_switched_off(tmp_path, capfd):
    data = make_data(tmp_path)
    capfd.readouterr()
    assert isinstance(data.source("train", make_config(store_gb=0.0)), ImageSource)
    assert stores(data) == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:100],
        lambda whole: b"",
        lambda whole: whole + b"\0",
        lambda whole: whole.replace(b"(10, 32", b"(32, 10"),
        lambda whole: b"\0" * len(whole),
        # As many bytes of another shape.
        lambda whole: whole.replace(b"32, 32, 1)", b"16, 64, 1)"),
    ],
)
def test_a_damaged_store_is_built_anew(tmp_path, damage):
    data = make_data(tmp_path)
    expected = everything(data.source("train", make_config()))
    (path,) = stores(data)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    again = open_data(tmp_path)
    assert isinstance(again.source("val", make_config()), ImageSource)
    np.testing.assert_array_equal(everything(again.source("train", make_config())), expected)
    assert path.read_bytes() == whole


def test_what_a_killed_process_left_is_not_used(tmp_path):
    data = make_data(tmp_path)
    expected = everything(data.source("train", make_config()))
    (path,) = stores(data)
    part = path.with_name(f".{path.name}.{platform.node()}.4194305.part")
    path.rename(part)
    with open(part, "ab") as f:
        f.write(b"more")
    np.testing.assert_array_equal(
        everything(open_data(tmp_path).source("train", make_config())), expected
    )
    assert leftovers(data) == []


def test_a_bad_image_is_told_as_without_a_store(tmp_path, monkeypatch):
    data = make_data(tmp_path)
    file = data.records.files[6]
    records = type(data.records)
    real = records.__getitem__

    def damaged(self, i):
        record = real(self, i)
        return {**record, "image": record["image"][:-30]} if i == 6 else record

    monkeypatch.setattr(records, "__getitem__", damaged)
    without = data.source("all", make_config(store_gb=0.0))
    with pytest.raises(UserError) as expected:
        without[6]
    with pytest.raises(UserError) as e:
        data.source("train", make_config())
    assert str(e.value) == str(expected.value) and file in str(e.value)
    assert stores(data) == [] and leftovers(data) == []


@pytest.mark.parametrize("coloured", [(), (0,), (6,)])
def test_the_budget_is_heeded(tmp_path, capfd, coloured):
    """10 x 32 x 32 pixels are 10,240 bytes grey, 30,720 in colours."""
    data = make_data(tmp_path, coloured=coloured)
    capfd.readouterr()
    size = 30_720 if coloured else 10_240
    for _ in range(2):
        source = data.source("train", make_config(store_gb=(size - 1) / 1e9))
        assert isinstance(source, ImageSource) and len(source) == 8
    err = capfd.readouterr().err
    assert err.count("note: every epoch decodes its images anew: the decoded images need") == 1
    assert "over data.store_gb=" in err
    assert stores(data) == [] and leftovers(data) == []
    source = open_data(tmp_path).source("train", make_config(store_gb=size / 1e9))
    assert isinstance(source, StoreSource)


def test_a_full_disk_falls_back_to_decoding(tmp_path, monkeypatch, capfd):
    data = make_data(tmp_path)
    usage = type("Usage", (), {"free": 10_000})
    with monkeypatch.context() as m:
        m.setattr(store.shutil, "disk_usage", lambda _: usage)
        assert isinstance(data.source("train", make_config()), ImageSource)
    note = f"note: every epoch decodes its images anew: the disk of {data.records.place} is full\n"
    assert capfd.readouterr().err.endswith(note)
    assert isinstance(open_data(tmp_path).source("train", make_config()), StoreSource)


def test_a_write_that_fails_midway_leaves_nothing(tmp_path, capfd):
    """The operating system's limit on a file's size stands in for a disk that fills up."""
    data = make_data(tmp_path, coloured=(9,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        source = data.source("train", make_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(source, ImageSource)
    err = capfd.readouterr().err
    assert f"anew: cannot write in {data.records.place} (File too large)" in err
    assert stores(data) == [] and leftovers(data) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache(tmp_path):
    data = make_data(tmp_path)
    data.records.place.chmod(0o500)
    try:
        assert isinstance(data.source("train", make_config()), ImageSource)
    finally:
        data.records.place.chmod(0o700)


def _build_in_process(root: str, barrier, results) -> None:
    data = open_data(Path(root))
    seen = []
    real = ImageSource.__getitem__
    ImageSource.__getitem__ = lambda self, i: seen.append(i) or real(self, i)  # type: ignore
    barrier.wait(120)
    source = data.source("train", make_config())
    results.put((len(seen), everything(source).tobytes()))


def test_processes_that_want_it_at_once_decode_it_once(tmp_path):
    data = make_data(tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(
            target=_build_in_process, args=(str(tmp_path), barrier, results), daemon=True
        )
        for _ in range(2)
    ]
    for p in processes:
        p.start()
    made = [results.get(timeout=300) for _ in processes]
    for p in processes:
        p.join()
    assert sorted(count for count, _ in made) == [0, 10]
    expected = everything(data.source("train", make_config())).tobytes()
    assert all(images == expected for _, images in made)
