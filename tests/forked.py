"""Commands for many small trials: forked from a process that has imported `covid_flax.main`.

Importing JAX, Orbax and the rest takes longer than a command that refuses its arguments.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["covid_flax.main", "jax"])


def main(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `covid_flax.main` to its end; returns what `subprocess.run` would."""
    return _wait(_main, args, cwd)


def command(target: str | Path, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same of another module's command, by its name, or of a script, by its path."""
    return _wait(_command, [target, *args], cwd)


def _wait(run, args, cwd):
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, name) for name in ("out", "err")]
        given = ([*map(str, args)], str(cwd), *paths)
        process = _context.Process(target=_run, args=(run, _few_optimizations(), *given))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(args)
        out, err = (Path(path).read_text() for path in paths)
        return subprocess.CompletedProcess(args, process.exitcode, out, err)


def _few_optimizations() -> bool:
    return jax.config.read("jax_disable_most_optimizations")


def _run(run, few_optimizations: bool, *given) -> None:
    """As this test's process compiles, not as the first did, at which all are forked."""
    jax.config.update("jax_disable_most_optimizations", few_optimizations)
    run(*given)


def _command(args: list[str], cwd: str, out: str, err: str) -> None:
    from absl import flags

    _redirect(cwd, out, err)
    own = flags.FLAGS.flags_by_module_dict()
    of_main = sum((own[module] for module in own if module.startswith("covid_flax")), [])
    for flag in of_main:
        delattr(flags.FLAGS, flag.name)
    sys.argv = args
    if args[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(args[0]))
        runpy.run_path(args[0], run_name="__main__")
    else:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)


def _main(args: list[str], cwd: str, out: str, err: str) -> None:
    from absl import flags

    from covid_flax import main
    from covid_flax.command import run_command

    _redirect(cwd, out, err)
    sys.argv = ["covid_flax.main", *args]
    flags.mark_flag_as_required("config")
    run_command(main._main, together=True)


def _redirect(cwd: str, out: str, err: str) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream.fileno())
    os.chdir(cwd)
