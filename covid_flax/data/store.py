"""Decoded images on the disk: each decoded and resized once, then read by memory map.

A store is a `.npy` file, uint8 `[N, size, size, C]`, beside the records whose images it
holds and in their order. C is 1 where every image is grey, else 3. Its name says how the
images were made; the folder it lies in says of what they are.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import itertools
import os
import shutil
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from tqdm import tqdm

from covid_flax.data.pipeline import ImageSource
from covid_flax.files import part_of, wait_for_lock

# Raise it when `decode` or `resize` gives other pixels, or the file changes.
STORE_VERSION = 1

_IN_FLIGHT = 32_000_000  # bytes decoded ahead of the disk


class NoStoreError(Exception):
    """No store can be had; the message says why. The images can be decoded without one."""


def open_store(source: ImageSource, directory: Path) -> np.ndarray | None:
    """The store of `source` in `directory`, or None where there is no whole one.

    Returns:
      Read-only memory map, uint8 `[len(source), size, size, 1 or 3]`.
    """
    path = directory / _name(source)
    for channels in (1, 3):
        shape = (len(source), source.image_size, source.image_size, channels)
        header = _header(shape)
        try:
            with open(path, "rb") as f:
                whole = f.read(len(header)) == header
                if whole and os.fstat(f.fileno()).st_size == len(header) + int(np.prod(shape)):
                    # As a plain array: indexing a np.memmap costs more.
                    return np.asarray(np.memmap(f, np.uint8, "r", len(header), shape))
        except (OSError, ValueError):
            pass
    return None


def build_store(source: ImageSource, directory: Path, budget_gb: float) -> np.ndarray:
    """As `open_store`, but decodes every image of `source` first where it must.

    Processes that ask at once wait for the one that decodes. The file appears whole, under
    its final name, or not at all.

    Args:
      source: all images of the records in `directory`, in their order.
      directory: an existing folder.
      budget_gb: greatest size of the store, in 1e9 bytes.

    Raises:
      NoStoreError: the store is over the budget, or the system refuses to write it.
      UserError: an image that cannot be decoded.
    """
    images = open_store(source, directory)
    if images is not None:
        return images  # also where the folder is read-only
    path = directory / _name(source)
    try:
        with open(directory / f".lock-{path.name}", "w") as lock:
            wait_for_lock(lock)  # another process may be at it: wait for its store
            images = open_store(source, directory)
            if images is not None:
                return images
            part = part_of(path)
            try:
                _write(source, part, budget_gb)
                if open_store(source, directory) is None:  # else another host was faster
                    part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        images = open_store(source, directory)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoStoreError(f"the disk of {directory} is full") from e
        raise NoStoreError(f"cannot write in {directory} ({e.strerror or e})") from e
    if images is None:
        raise NoStoreError(f"{path} changed while it was opened")
    return images


def _name(source: ImageSource) -> str:
    how = f"{source.image_size}-{source.interpolation}-{source.intermediate_size}"
    # Pillow brings its own decoders of JPEG and WebP, whose pixels may change.
    return f"pixels-{how}-pillow{PIL.__version__}-v{STORE_VERSION}.npy"


def _header(shape: tuple[int, ...]) -> bytes:
    f = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, about)
    return f.getvalue()


def _write(source: ImageSource, part: Path, budget_gb: float) -> None:
    """Writes the store, with one channel until an image has colours."""
    images = _decoded(source)
    sync_every = max(1, _IN_FLIGHT // source.image_size**2)
    with contextlib.ExitStack() as files:
        files.callback(images.close)
        first = next(images)
        channels = first.shape[2]
        f = files.enter_context(_start(source, part, channels, budget_gb))
        for i, image in enumerate(itertools.chain([first], images)):
            if image.shape[2] > channels:
                channels = image.shape[2]
                f = files.enter_context(_widened(source, part, f, i, budget_gb))
            f.write(np.broadcast_to(image, (*image.shape[:2], channels)).tobytes())
            if (i + 1) % sync_every == 0:  # while others decode, not all at the end
                f.flush()
                os.fsync(f.fileno())
        f.flush()
        os.fsync(f.fileno())


def _start(source: ImageSource, part: Path, channels: int, budget_gb: float) -> BinaryIO:
    """A new file that holds the header. Refuses what will not fit."""
    shape = (len(source), source.image_size, source.image_size, channels)
    size = int(np.prod(shape))
    if size / 1e9 > budget_gb:
        raise NoStoreError(
            f"the decoded images need {size / 1e9:.2f} GB, over data.store_gb={budget_gb:g}"
        )
    if size > shutil.disk_usage(part.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    f = open(part, "wb")
    f.write(_header(shape))
    return f


def _widened(
    source: ImageSource, part: Path, grey: BinaryIO, count: int, budget_gb: float
) -> BinaryIO:
    """The file anew with three channels, `count` grey images copied into it."""
    grey.flush()
    with open(part, "rb") as old:
        part.unlink()
        wide = _start(source, part, 3, budget_gb)
        side = source.image_size
        old.seek(len(_header((len(source), side, side, 1))))
        for _ in range(count):
            pixels = np.frombuffer(old.read(side * side), np.uint8)
            wide.write(np.repeat(pixels, 3).tobytes())
    return wide


def _decoded(source: ImageSource) -> Generator[np.ndarray]:
    """Every image in order, decoded by threads, `[size, size, 1]` where it is grey, else 3."""

    def image(i: int) -> np.ndarray:
        pixels = np.asarray(source[i]["image"])
        red, green, blue = (pixels[..., channel] for channel in range(3))
        grey = np.array_equal(red, green) and np.array_equal(red, blue)
        return pixels[..., :1].copy() if grey else pixels

    threads = os.cpu_count() or 1
    # A slow disk must not fill the memory.
    most = max(2 * threads, _IN_FLIGHT // (3 * source.image_size**2))
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    bar = tqdm(
        total=len(source),
        desc="Decoding images",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        mininterval=0.5,
    )
    try:
        for i in range(len(source)):
            waiting.append(pool.submit(image, i))
            if len(waiting) >= most:
                yield waiting.popleft().result()
                bar.update()
        while waiting:
            yield waiting.popleft().result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
