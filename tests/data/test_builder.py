"""Records: the files' own bytes, complete or not there at all, and no TensorFlow."""

import errno
import io
import json
import os
import platform
import resource
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from covid_flax.data import builder
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.errors import UserError


def make_folder(root: Path, per_class: int = 4, side: int = 24) -> DataFolder:
    rng = np.random.default_rng(0)
    for label in ("COVID", "Viral Pneumonia"):
        (root / label / "images").mkdir(parents=True)
        for i in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (side, side), np.uint8))
            image.save(root / label / "images" / f"{label}-{i}.png")
    lines = [f"{label}/images/{label}-0.png,https://x" for label in ("COVID", "Viral Pneumonia")]
    (root / "manifest.csv").write_text("\n".join(["file,source_repo", *lines]))
    return open_folder(str(root))


def shard(records: builder.Records) -> Path:
    (path,) = records.place.rglob("*.array_record*")
    return path


def snapshot(root: Path) -> dict[str, bytes]:
    """Content of every file but the empty locks."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and not p.name.startswith(".lock-")
    }


def test_records_hold_the_files(tmp_path, capfd):
    folder = make_folder(tmp_path / "data")
    records = builder.prepare(folder, tmp_path / "cache")
    assert records.files == [f.file for f in folder.files] and len(records) == 8
    for i, f in enumerate(folder.files):
        assert records[i] == {
            "image": (tmp_path / "data" / f.file).read_bytes(),
            "file": f.file,
            "label": f.label,
            "source": "https://x" if f.file.endswith("-0.png") else "",
        }
    for i in (-1, 8):
        with pytest.raises(IndexError):
            records[i]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Preparing images: 100%" in printed.err and "Generating" not in printed.err


def test_second_call_reads_no_image(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "data")
    builder.prepare(folder, tmp_path / "cache")
    monkeypatch.setattr(DataFolder, "read", lambda *_: pytest.fail("an image was read"))
    again = builder.prepare(open_folder(str(tmp_path / "data")), tmp_path / "cache")
    assert again[7]["label"] == "Viral Pneumonia"


def test_a_changed_folder_is_prepared_anew(tmp_path):
    folder = make_folder(tmp_path / "data")
    first = builder.prepare(folder, tmp_path / "cache")
    changed = tmp_path / "data" / folder.files[0].file
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(changed)
    second = builder.prepare(open_folder(str(tmp_path / "data")), tmp_path / "cache")
    assert second[0]["image"] == changed.read_bytes() != first[0]["image"]


def test_threads_read_alike(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=20)
    records = builder.prepare(folder, tmp_path / "cache")
    order = np.random.default_rng(0).integers(0, len(records), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(records.__getitem__, order))
    assert [r["file"] for r in read] == [records.files[i] for i in order]
    assert all(r["image"] == folder.read(r["file"]) for r in read)


def test_all_unusable_images_are_counted_and_nothing_is_written(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=6)
    files = [tmp_path / "data" / f.file for f in folder.files]
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_bytes(b"not an image")
    jpeg = io.BytesIO()
    Image.open(files[3]).save(jpeg, "JPEG")
    files[3].write_bytes(jpeg.getvalue())
    for file in files[6:9]:
        file.write_bytes(b"\0")
    with pytest.raises(UserError) as e:
        builder.prepare(open_folder(str(tmp_path / "data")), tmp_path / "cache")
    message = str(e.value)
    assert message.startswith(f"7 of 12 images in {tmp_path / 'data'} cannot be used (")
    for part in (
        "COVID-0.png is an empty file", "COVID-1.png is truncated", "COVID-2.png is not a readable",
        "COVID-3.png is mislabelled", "Viral Pneumonia-0.png is not",
        "Viral Pneumonia-1.png is not", "Viral Pneumonia-2.png is not", "on_bad_image=skip",
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message
    assert snapshot(tmp_path / "cache") == {}


def test_truncated_records_are_written_anew(tmp_path):
    folder = make_folder(tmp_path / "data")
    records = builder.prepare(folder, tmp_path / "cache")
    path, whole = shard(records), shard(records).read_bytes()
    for damage in (whole[:-1], whole[:1000], b""):
        path.write_bytes(damage)
        again = builder.prepare(folder, tmp_path / "cache")
        assert again[3]["image"] == folder.read(folder.files[3].file)
        assert path.stat().st_size == len(whole)
    path.unlink()
    assert builder.prepare(folder, tmp_path / "cache")[3]["file"] == folder.files[3].file


def test_a_flipped_bit_is_not_read_as_an_image(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=2, side=300)
    records = builder.prepare(folder, tmp_path / "cache")
    image = folder.read(folder.files[1].file)
    content = shard(records).read_bytes()
    at = content.index(image[1000:1100]) + 50
    shard(records).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    damaged = builder.prepare(folder, tmp_path / "cache")
    with pytest.raises(UserError, match="record 1 in .* is damaged: delete that folder"):
        damaged[1]
    assert damaged[0]["image"] == folder.read(folder.files[0].file)


def test_what_a_killed_run_left_is_not_used(tmp_path):
    folder = make_folder(tmp_path / "data")
    place = builder.prepare(folder, tmp_path / "cache").place
    (place / "complete.json").unlink()  # as if killed before the end
    place.rename(place.with_name(f".{place.name}.{platform.node()}.4194305.part"))
    records = builder.prepare(folder, tmp_path / "cache")
    assert records[0]["file"] == folder.files[0].file
    assert not any(p.name.endswith(".part") for p in (tmp_path / "cache").iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("covid_flax.files.fcntl.flock", flock)
    assert len(builder.prepare(make_folder(tmp_path / "data"), tmp_path / "cache")) == 8


def test_unwritable_cache(tmp_path):
    folder = make_folder(tmp_path / "data")
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    for cache in (blocked, blocked / "below"):
        with pytest.raises(
            UserError, match="cannot write .*set data.cache_dir, or XDG_CACHE_HOME, to a"
        ):
            builder.prepare(folder, cache)
    assert blocked.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_cache(tmp_path):
    folder = make_folder(tmp_path / "data")
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(
        UserError, match="Permission denied.*set data.cache_dir, or XDG_CACHE_HOME, to a"
    ):
        builder.prepare(folder, tmp_path / "cache")


def test_full_disk_is_seen_before_the_work(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "data")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="the disk of .*/cache is full: free 1 MB there"):
        builder.prepare(folder, tmp_path / "cache")
    assert snapshot(tmp_path / "cache") == {}


def test_a_failed_write_leaves_nothing(tmp_path):
    """The operating system's limit on a file's size fails the C++ writer as a full disk does."""
    folder = make_folder(tmp_path / "data", side=400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write the image records in"):
            builder.prepare(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path / "cache") == {}
    assert len(builder.prepare(folder, tmp_path / "cache")) == 8


def test_dark_images_are_counted_and_told_of(tmp_path):
    """12 bits in files of 16 come out as 16 greys."""
    folder = make_folder(tmp_path / "data")
    for f in folder.files[:3]:
        values = np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "data" / f.file)
    Image.new("L", (20, 20)).save(tmp_path / "data" / folder.files[3].file)  # black is no sign
    for _ in range(2):  # when they are written, and when they are opened
        assert builder.prepare(open_folder(folder.root), tmp_path / "cache").dark == 3


def test_an_image_that_vanishes_while_written(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "data")
    check = builder._check_images

    def check_and_remove(*args: object) -> dict[str, str]:
        bad = check(*args)
        (tmp_path / "data" / folder.files[5].file).unlink()
        return bad

    monkeypatch.setattr(builder, "_check_images", check_and_remove)
    with pytest.raises(UserError, match=f"cannot read .*{folder.files[5].file}"):
        builder.prepare(folder, tmp_path / "cache")
    assert snapshot(tmp_path / "cache") == {}


def test_as_any_tfds_builder(tmp_path):
    """The class serves TFDS's own commands: manual_dir in, a data source out."""
    folder = make_folder(tmp_path / "data")
    made = builder.ChestXrayFolder(data_dir=tmp_path / "tfds")
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "data")
    made.download_and_prepare(download_config=config)
    source = made.as_data_source("images", decoders={"image": tfds.decode.SkipDecoding()})
    assert [r["file"].decode() for r in source] == [f.file for f in folder.files]
    assert "kaggle.com" in made.MANUAL_DOWNLOAD_INSTRUCTIONS
    with pytest.raises(AssertionError, match="kaggle.com"):
        builder.ChestXrayFolder(data_dir=tmp_path / "other").download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "none")
        )


def test_no_tensorflow_nor_jax_is_imported(tmp_path):
    make_folder(tmp_path / "data")
    code = """
import json, sys
from covid_flax.data import builder, decode, folder, splits
opened = folder.open_folder(sys.argv[1])
records = builder.prepare(opened, sys.argv[2])
decode.decode(records[0]["image"], records[0]["file"])
splits.make_split(opened, split="grouped", val_fraction=0.3)
print(json.dumps(sorted(m for m in sys.modules if "." not in m)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert "tensorflow_datasets" in modules
    assert not {"tensorflow", "jax", "torch", "keras"} & set(modules)


def test_folders_that_agree_in_names_sizes_and_times_are_kept_apart(tmp_path):
    prints = set()
    for name, grey in (("one", 10), ("two", 200)):
        for label in ("A", "B"):
            path = tmp_path / name / label / "x.bmp"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), grey, np.uint8)).save(path)
            os.utime(path, ns=(10**18, 10**18))
        records = builder.prepare(open_folder(str(tmp_path / name)), tmp_path / "cache")
        assert records[0]["image"] == (tmp_path / name / "A" / "x.bmp").read_bytes()
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as z:
            for label in ("A", "B"):
                z.write(tmp_path / name / label / "x.bmp", f"{label}/x.bmp")
        prints.add(open_folder(str(tmp_path / "data.zip")).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize(("limit", "shards"), [(1, 8), (2500, 6), (10**9, 1)])
def test_a_folder_larger_than_a_shard_is_written_in_order(tmp_path, monkeypatch, limit, shards):
    """None is held whole: TFDS would sort from 1,000 MiB on, and wants TensorFlow for it."""
    monkeypatch.setattr(builder, "SHARD_BYTES", limit)
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 1000)
    for label, side in (("A", 28), ("B", 4)):  # of 1,862 and of 1,094 bytes
        (tmp_path / "data" / label).mkdir(parents=True)
        for n in range(4):
            pixels = np.random.default_rng(n).integers(0, 256, (side, side), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{n}.bmp")
    folder = open_folder(str(tmp_path / "data"))
    records = builder.prepare(folder, tmp_path / "cache")
    assert len(list(records.place.rglob("*.array_record*"))) == shards
    for i, f in enumerate(folder.files):
        record = records[i]
        assert record["file"] == f.file and record["label"] == f.label
        assert record["image"] == (tmp_path / "data" / f.file).read_bytes()
