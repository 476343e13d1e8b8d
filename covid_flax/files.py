"""Reading small files that may hold anything, and writing them so that nobody sees half of one."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from covid_flax.errors import UserError


def expanded(path: str | os.PathLike[str]) -> Path:
    """With the home folder for `~`, where there is one, as shells have it; else as it is."""
    return Path(os.path.expanduser(path))


def cache_dir(configured: str) -> Path:
    """Where prepared data and downloaded weights are kept between runs.

    Raises:
      UserError: `configured` is empty and the system knows no home folder.
    """
    if configured:
        return expanded(configured)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise UserError("the home folder is not known: set XDG_CACHE_HOME to a folder")
    return Path(home) / "covid_flax"


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`. ValueError for all that is not JSON, and where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def peek(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may hold anything; empty where there is none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_foreign(output: Path, names: Sequence[str], key: str) -> None:
    """Where files would be lost that the command has not written.

    Args:
      output: folder to write to.
      names: of the files, the first a JSON object in which `key` tells that they are the command's.

    Raises:
      UserError: one is there, and that object is not.
    """
    there = [name for name in names if (output / name).exists()]
    if there and key not in peek(output / names[0]):
        raise UserError(
            f"{output / there[0]} is of something else and would be lost: choose another --output"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path` and renames, creating the folder; what was there stays until then.

    Raises:
      UserError: the system refused (read-only, full, a folder of that name); the old file is whole.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): free the place or name another folder"
        ) from error


def csv_bytes(rows: Iterable[Iterable[Any]]) -> bytes:
    """The rows as csv (UTF-8); a file name that is not UTF-8 keeps its bytes."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """As indented UTF-8, by `write_atomically`.

    Args:
      allow_nan: whether what JSON has no word for is written as Python reads it.

    Raises:
      UserError: as `write_atomically`.
      ValueError: NaN or an infinity that is not allowed.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    # What stands for the bytes of a file name that is not UTF-8: no text, but JSON can say it.
    text = re.sub("[\ud800-\udfff]", lambda lone: f"\\u{ord(lone[0]):04x}", text)
    write_atomically(path, f"{text}\n".encode())


@contextlib.contextmanager
def written_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write in, whose files take the places of `folder`'s once all are written.

    The last of `names` is gone before the others come: where there is one, what lies beside it is
    of the same writing.

    Args:
      folder: made if it is not there.
      names: of the files, in the order in which they take their places; one that is not written
        is removed from `folder` too.

    Raises:
      UserError: nothing can be written in `folder`.
    """
    make_writable(folder)
    part = part_of(folder / "files")
    try:
        part.mkdir()
        yield part
        (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            if (part / name).exists():
                os.replace(part / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def wait_for_lock(file: IO[str] | int) -> bool:
    """Until no other process has the lock of an open file or folder.

    Goes on without it where the file system has no locks, as Lustre and NFS may: False then.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; the others wait.

    Raises:
      UserError: a folder that this user may not open.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot open {folder} ({error.strerror}): name another folder") from error
    try:
        wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def make_writable(folder: Path) -> None:
    """Creates a folder that results will be written to, before the work on them.

    Raises:
      UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f"cannot write {folder} ({e.strerror}): free the place or name another folder"
        ) from e


def result_file(name: str) -> Path:
    """A command line's type: a file to be written after long work, whose folder is made now.

    Raises:
      UserError: nothing can be written there.
    """
    path = Path(name)
    make_writable(path.parent)
    return path


def part_of(path: Path) -> Path:
    """Where this process writes what it will rename to `path`, a file or a folder."""
    mine = f".{path.name}.{platform.node()}."
    _remove_parts_of_the_dead(path.parent, mine)
    return path.with_name(f"{mine}{os.getpid()}.part")


def _remove_parts_of_the_dead(folder: Path, beginning: str) -> None:
    """What processes of this host left that were killed between writing and renaming.

    One of this process's own number too: as in a container that is started again.
    """
    for name in os.listdir(folder):
        number = name.removeprefix(beginning).removesuffix(".part")
        if name == f"{beginning}{number}.part" and number.isdecimal() and _is_dead(int(number)):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                (folder / name).unlink(missing_ok=True)


def _is_dead(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False  # another user's, or no process's number
    return number == os.getpid()
