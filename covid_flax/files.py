"""Writing a small file so that nobody ever sees half of it."""

from __future__ import annotations

import os
from pathlib import Path

from covid_flax.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path` and renames, creating the folder; what was there stays until then.

    Raises:
      UserError: the system refused (read-only, full, a folder of that name); the old file is whole.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
