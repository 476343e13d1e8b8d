"""`python -m covid_flax.main` for many small trials: forked from a process that has imported it.

Importing JAX, Orbax and the rest takes longer than a command that refuses its arguments.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["covid_flax.main", "jax"])


def main(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; returns what `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, name) for name in ("out", "err")]
        process = _context.Process(target=_run, args=([*map(str, args)], str(cwd), *paths))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(args)
        out, err = (Path(path).read_text() for path in paths)
        return subprocess.CompletedProcess(args, process.exitcode, out, err)


def _run(args: list[str], cwd: str, out: str, err: str) -> None:
    from absl import flags

    from covid_flax import main
    from covid_flax.command import run_command

    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream.fileno())
    os.chdir(cwd)
    sys.argv = ["covid_flax.main", *args]
    flags.mark_flag_as_required("config")
    run_command(main._main, together=True)
