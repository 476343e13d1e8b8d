"""Reading small files that may hold anything, and writing them so that nobody sees half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from covid_flax.errors import UserError


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`. ValueError for all that is not JSON, and where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


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
