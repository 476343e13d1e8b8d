"""Files appear whole, and what a killed process left of one goes."""

import os
import platform
import subprocess
import sys

from covid_flax.files import write_atomically


def test_what_a_killed_writer_left_is_cleared_and_no_other_s_part(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = platform.node()
    left = tmp_path / f".a.json.{host}.{dead.pid}.part"
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
