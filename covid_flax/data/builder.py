"""Image files in ArrayRecord, written once by TFDS and read at random, without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from covid_flax.data.decode import decode, is_dark
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.errors import UserError, printable
from covid_flax.files import expanded, parse_json, part_of, wait_for_lock, write_atomically

# Part of the cache's key: raise it when what a record holds changes.
RECORDS_VERSION = "1.0.0"

SHARD_BYTES = 128 << 20

_MARKER = "complete.json"
_NAMED = 20  # bad images in a message


class ChestXrayFolder(tfds.core.ShardBasedBuilder):
    """The images of a data folder: every file's own bytes, name, class and source.

    One TFDS split, `images`, in the order of `DataFolder.files`, in shards of `SHARD_BYTES`: TFDS
    holds a shard in memory while it writes it. (A generator of all would be held whole, and from
    1,000 MiB on be sorted by TensorFlow.) Give a `folder`, or use it as any TFDS builder with
    `DownloadConfig(manual_dir=...)`.
    """

    VERSION = tfds.core.Version(RECORDS_VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Download the COVID-19 Radiography Database from
    https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database
    (a free account is needed), unpack the archive, and give the unpacked folder, which holds
    COVID-19_Radiography_Dataset/<Class>/images/*.png. Any folder of <Class>/* images works too.
    """

    def __init__(
        self,
        *,
        folder: DataFolder | None = None,
        on_image: Callable[[], object] = lambda: None,
        **kwargs: Any,
    ) -> None:
        self._folder = folder
        self._on_image = on_image  # called as each image is read
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Labelled images, stored as the files' own bytes.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, None)),
                    "file": tfds.features.Text(),
                    "label": tfds.features.Text(),
                    "source": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        folder = self._folder or open_folder(os.fspath(dl_manager.manual_dir))
        return {"images": [partial(self._examples, folder, s) for s in _shards(folder)]}

    def _examples(self, folder: DataFolder, shard: range) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in shard:
            f = folder.files[i]
            image = folder.read(f.file)
            self._on_image()
            yield i, {"image": image, "file": f.file, "label": f.label, "source": f.source}


def _shards(folder: DataFolder) -> list[range]:
    """Which of the folder's files lie together: as many as `SHARD_BYTES` hold, one at least."""
    starts, size = [0], 0
    for i, f in enumerate(folder.files):
        size += folder.num_bytes(f.file)
        if size > SHARD_BYTES and i > starts[-1]:
            starts.append(i)
            size = folder.num_bytes(f.file)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(folder.files)], strict=True)]


@dataclasses.dataclass(frozen=True)
class Records:
    """Stored image files, by number. Thread safe.

    Attributes:
      files: name of each, relative to the data folder.
      place: the folder that holds the records.
      bad: images of the data folder that cannot be read and are left out: the reason by name.
      dark: how many images `is_dark`.
    """

    files: list[str]
    place: Path
    bad: Mapping[str, str]
    dark: int
    _source: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`image` (the file's bytes), `file`, `label` (class name) and `source`.

        Raises:
          UserError: the record is damaged on the disk.
          IndexError: `i` is outside 0..len - 1.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        try:
            record = self._source[int(i)]
            image, texts = record["image"], (record["file"], record["label"], record["source"])
            file, label, source = (text.decode() for text in texts)
            if not isinstance(image, bytes):
                raise TypeError(image)
        except Exception as e:  # ArrayRecord, protobuf and TFDS raise many types
            raise UserError(
                f"record {i} in {self.place} is damaged: delete that folder and run again"
            ) from e
        return {"image": image, "file": file, "label": label, "source": source}


def prepare(
    folder: DataFolder, cache_dir: str | os.PathLike[str], *, on_bad_image: str = "refuse"
) -> Records:
    """The folder's files as records, written under `cache_dir` the first time.

    Every image is decoded once to see that it can be, before a record is written. A second
    call with the same folder and cache opens what the first wrote. Records that are
    incomplete or whose files changed size are written anew.

    Args:
      folder: the images.
      cache_dir: made where it is not there.
      on_bad_image: what to do about images that cannot be read: `refuse` them, or `skip`, which
        leaves them out of the records.

    Raises:
      UserError: images that cannot be read, all of them named, in a file where they are many;
        a class of which no image can be; or a cache folder that is full or not writable.
    """
    cache_dir = expanded(cache_dir)
    place = cache_dir / _cache_key(folder)
    records = _open(place, folder)
    if records is None:
        try:
            _write(folder, cache_dir, place, on_bad_image)
        except (OSError, RuntimeError) as e:  # ArrayRecord's writer raises RuntimeError
            raise _cannot_write(cache_dir, folder, e) from e
        records = _open(place, folder)
    if records is None:
        raise UserError(f"the image records in {place} changed while they were opened: run again")
    if records.bad and on_bad_image == "refuse":
        raise _bad_images(folder, records.bad, place)
    return records


def _cache_key(folder: DataFolder) -> str:
    # With the path: copies of a folder can agree in names, sizes and times.
    where = os.path.realpath(folder.root)
    key = f"{RECORDS_VERSION}\n{where}\n{folder.fingerprint()}"
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _write(folder: DataFolder, cache_dir: Path, place: Path, on_bad_image: str) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / f".lock-{place.name}", "w") as lock:
        wait_for_lock(lock)  # another process may be at it: wait for its records
        if _is_complete(place):
            return
        unfinished = part_of(place)
        if shutil.disk_usage(cache_dir).free < _needed_bytes(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        bar = tqdm(
            total=2 * len(folder.files),  # each is checked, then written
            desc="Preparing images",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            mininterval=0.5,
        )
        try:
            with bar:
                bad, dark = _check_images(folder, bar)
                if bad and on_bad_image == "refuse":
                    raise _bad_images(folder, bad, place)
                unfinished.mkdir()
                _build(folder.without(bad), unfinished, bar)
                bar.update(len(bad))
            _mark_complete(unfinished, bad, dark)
            if not _is_complete(place):  # else another host was faster, and may be reading
                shutil.rmtree(place, ignore_errors=True)
                unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _check_images(folder: DataFolder, bar: tqdm) -> tuple[dict[str, str], int]:
    """Decodes every image; why it failed, of each that does, and how many are dark."""

    def check(file: str) -> tuple[str, bool]:
        try:
            return _look_at(folder, file)
        finally:
            bar.update()

    files = [f.file for f in folder.files]
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # of what is reported below
        found = list(pool.map(check, files))
    bad = {file: problem for file, (problem, _) in zip(files, found, strict=True) if problem}
    return bad, sum(dark for _, dark in found)


def _look_at(folder: DataFolder, file: str) -> tuple[str, bool]:
    """Why an image cannot be used, "" for one that can; and whether it is dark."""
    try:
        return "", is_dark(decode(folder.read(file), file))
    except UserError as e:
        return printable(str(e)), False


def _bad_images(folder: DataFolder, bad: Mapping[str, str], place: Path) -> UserError:
    """Names them all: in the line itself, or those of a long list in a file."""
    first, more = list(bad.values())[:_NAMED], ""
    if len(bad) > _NAMED:
        listed = place.with_name(f"bad-images-{place.name}.txt")
        write_atomically(listed, "".join(f"{reason}\n" for reason in bad.values()).encode())
        more = f"; and {len(bad) - _NAMED:,} more, all listed in {listed}"
    return UserError(
        f"{len(bad):,} of {len(folder.files):,} images in {folder.root} cannot be used "
        f"(in training, config.data.on_bad_image=skip leaves them out): {'; '.join(first)}{more}"
    )


def _build(folder: DataFolder, data_dir: Path, bar: tqdm) -> None:
    with _quiet_tfds():
        builder = ChestXrayFolder(folder=folder, on_image=bar.update, data_dir=data_dir)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    shutil.rmtree(data_dir / "downloads", ignore_errors=True)  # made empty by TFDS


def _mark_complete(data_dir: Path, bad: Mapping[str, str], dark: int) -> None:
    files = [p for p in data_dir.rglob("*") if p.is_file()]
    for p in files:
        with open(p, "rb") as f:
            os.fsync(f.fileno())
    sizes = {str(p.relative_to(data_dir)): p.stat().st_size for p in files}
    (data_dir / _MARKER).write_text(json.dumps({"sizes": sizes, "bad": dict(bad), "dark": dark}))


def _is_complete(place: Path) -> bool:
    """Whether all files that the marker names are there in full."""
    return _marker(place) is not None


def _marker(place: Path) -> tuple[dict[str, str], int] | None:
    """The bad images that complete records lack, and how many of theirs are dark.

    None where the records are not complete.
    """
    try:
        marker = parse_json((place / _MARKER).read_text())
        whole = all((place / name).stat().st_size == n for name, n in marker["sizes"].items())
        return (dict(marker.get("bad", {})), int(marker.get("dark", 0))) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open(place: Path, folder: DataFolder) -> Records | None:
    """The records of `folder` in `place`, or None where they are not whole."""
    marker = _marker(place)
    if marker is None:
        return None
    bad, dark = marker
    # What kept an image from being read may be gone without a trace on the file.
    bad = {file: _look_at(folder, file)[0] for file in bad}
    if not all(bad.values()):
        shutil.rmtree(place, ignore_errors=True)
        return None
    files = [f.file for f in folder.files if f.file not in bad]
    with _quiet_tfds():
        builder = ChestXrayFolder(data_dir=place)
        source = builder.as_data_source(
            split="images", decoders={"image": tfds.decode.SkipDecoding()}
        )
    if len(source) != len(files):
        return None
    return Records(files, place, bad, dark, source)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's own bars and lines off the console, and TFDS off the network."""
    tfds.core.utils.gcs_utils._is_gcs_disabled = True
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _needed_bytes(folder: DataFolder) -> int:
    # Measured: a record costs some 150 bytes, and TFDS writes a few small files.
    return sum(folder.num_bytes(f.file) + 300 for f in folder.files) + 1_000_000


def _cannot_write(cache_dir: Path, folder: DataFolder, error: OSError | RuntimeError) -> UserError:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return UserError(
            f"the disk of {cache_dir} is full: free {_needed_bytes(folder) / 1e6:,.0f} MB there, "
            "or set data.cache_dir to a folder on another disk"
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(
        f"cannot write the image records in {cache_dir} ({reason}): set data.cache_dir, or "
        "XDG_CACHE_HOME, to a writable folder"
    )
