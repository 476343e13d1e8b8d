"""Read access to the files of a folder or of a zip, which need not be unpacked."""

from __future__ import annotations

import os
import posixpath
import stat
import zipfile
from typing import Protocol

from covid_flax.data.decode import MAX_PIXELS
from covid_flax.errors import UserError

MAX_BYTES = 8 * MAX_PIXELS  # of a file: 16-bit RGBA without compression
LAYOUTS = "<Class>/images/*.png (Kaggle's) or <Class>/*.png"


class FileTree(Protocol):
    """Read access to a folder's files by posix path relative to it."""

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in `folder` ("" is the top)."""

    def has(self, file: str) -> bool: ...

    def read(self, file: str) -> bytes: ...

    def stamp(self, file: str) -> tuple[int, int]:
        """The file's size, and a number that changes with its content."""


class Disk:
    def __init__(self, root: str) -> None:
        self._root = root

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        path = os.path.join(self._root, folder)
        try:
            with os.scandir(path) as entries:
                kinds = [(e.name, e.is_dir()) for e in entries]
        except OSError as e:
            raise UserError(f"cannot list {path}: {e.strerror}") from e
        # A link to nothing counts as a file: it is refused when read, not passed over.
        return [n for n, d in kinds if d], [n for n, d in kinds if not d]

    def has(self, file: str) -> bool:
        return os.path.isfile(os.path.join(self._root, file))

    def read(self, file: str) -> bytes:
        path = os.path.join(self._root, file)
        _refuse_large(file, self.stamp(file)[0])
        try:
            with open(path, "rb") as f:
                return f.read(MAX_BYTES)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}: mend or remove it") from e

    def stamp(self, file: str) -> tuple[int, int]:
        path = os.path.join(self._root, file)
        try:
            status = os.stat(path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}: mend or remove it") from e
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise UserError(f"{path} is no regular file: remove it")
        return status.st_size, status.st_mtime_ns


class Zip:
    """Members whose names lead out of the zip are not there."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
            raise UserError(f"{path} is a broken zip ({e}): download it again") from e
        if "" in self._zip.namelist():
            raise UserError(f"{path} is a broken zip (a member without a name): pack it again")
        self._folders: dict[str, dict[str, None]] = {}
        self._files: dict[str, list[str]] = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.flag_bits & 1:
                raise UserError(f"{path} is encrypted: unpack it and give the folder")
            if info.filename.startswith("/") or ".." in info.filename.split("/"):
                continue
            file = posixpath.normpath(info.filename)  # some archivers write ./COVID/1.png
            if file in self._members:
                raise UserError(f"{path} holds a name twice: pack it again")
            self._members[file] = info
            if info.is_dir():
                self._add_folder("" if file == "." else file)
            else:
                parent, _, name = file.rpartition("/")
                self._add_folder(parent)
                self._files.setdefault(parent, []).append(name)

    def _add_folder(self, folder: str) -> None:
        while folder:
            folder, _, name = folder.rpartition("/")
            self._folders.setdefault(folder, {})[name] = None

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        return list(self._folders.get(folder, {})), self._files.get(folder, [])

    def has(self, file: str) -> bool:
        parent, _, name = file.rpartition("/")
        return name in self._files.get(parent, [])

    def read(self, file: str) -> bytes:
        _refuse_large(file, self.stamp(file)[0])
        try:
            return self._zip.read(self._members[file])
        except Exception as e:  # what it raises on damaged content depends on the compression
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(
                f"cannot read {file} in {self._path} ({reason}): download the zip again"
            ) from e

    def stamp(self, file: str) -> tuple[int, int]:
        info = self._members[file]
        return info.file_size, info.CRC


def _refuse_large(file: str, size: int) -> None:
    """What a zip says a member unpacks to is more than it ever will."""
    if size > MAX_BYTES:
        raise UserError(
            f"{file} has {size:,} bytes, above the limit of {MAX_BYTES:,}: shrink or remove it"
        )


def open_tree(path: str) -> FileTree:
    if not path:
        raise UserError(f"no data folder given: name a folder of {LAYOUTS}, or its zip")
    if os.path.isdir(path):
        return Disk(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: name a folder of {LAYOUTS}, or its zip")
    try:
        with open(path, "rb"):
            pass
    except OSError as e:  # which `is_zipfile` would take for a broken zip
        raise UserError(f"cannot read {path} ({e.strerror}): let this user read it") from e
    if zipfile.is_zipfile(path):
        return Zip(path)
    if path.lower().endswith(".zip"):
        raise UserError(f"{path} is a broken zip: download it again")
    raise UserError(f"{path} is neither a folder nor a zip: name a folder of {LAYOUTS}")


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
