"""Files appear whole, and what a killed process left of one goes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from covid_flax.errors import UserError
from covid_flax.files import parse_json, part_of, refuse_foreign, write_atomically, write_json


def test_what_a_killed_writer_left_is_cleared_and_no_other_s_part(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = platform.node()
    left = tmp_path / f".a.json.{host}.{dead.pid}.part"
    folder = tmp_path / f".drawn.{host}.{dead.pid}.part"
    (folder / "a").mkdir(parents=True)
    assert part_of(tmp_path / "drawn").name == f".drawn.{host}.{os.getpid()}.part"
    assert not folder.exists()
    others = [
        tmp_path / f".a.json.{host}.{os.getppid()}.part",  # at work
        tmp_path / f".a.json.elsewhere.{dead.pid}.part",  # of a host whose processes are unknown
        tmp_path / f".b.json.{host}.{dead.pid}.part",
        tmp_path / f".a.json.{host}.{'9' * 30}.part",
    ]
    for file in (left, *others):
        file.write_bytes(b"half")
    write_atomically(tmp_path / "a.json", b"whole")
    assert (tmp_path / "a.json").read_bytes() == b"whole"
    assert not left.exists() and all(file.exists() for file in others)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_json_keeps_the_bytes_of_a_name_that_is_no_text(tmp_path):
    """In UTF-8 that every reader takes."""
    value = {"root": os.fsdecode(b"/data/x-\xff \xc3\xa9"), "wide": "肺"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert parse_json(text) == value and "肺" in text


def test_what_a_process_of_this_number_left_is_removed(tmp_path):
    """As in a container that was killed and started again."""
    for make in (Path.mkdir, Path.touch):
        part = part_of(tmp_path / "x")
        make(part)
        assert part_of(tmp_path / "x") == part and not part.exists()


def test_files_of_something_else_are_not_replaced(tmp_path):
    names = ("compare.json", "compare.csv")
    refuse_foreign(tmp_path / "new", names, "runs")
    (tmp_path / "compare.csv").write_text("a,b\n")
    for text in (None, "{}", "[1]", "no json"):
        if text is not None:
            (tmp_path / "compare.json").write_text(text)
        with pytest.raises(UserError, match="of something else and would be lost"):
            refuse_foreign(tmp_path, names, "runs")
    (tmp_path / "compare.json").write_text('{"runs": []}')
    refuse_foreign(tmp_path, names, "runs")
