"""What the commands share: flags in, one line and exit status 2 for a user's error."""

from __future__ import annotations

import difflib
import errno
import logging as std_logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

# Before JAX and TensorStore load: their C++ logs are not the user's concern.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import app, flags, logging

from covid_flax import distributed, preemption
from covid_flax.errors import UserError, printable
from covid_flax.files import cache_dir

_FULL_OR_LOCKED = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "the system limits the size of files",
    errno.ENOTDIR: "choose another folder",
    errno.EISDIR: "choose another folder",
    errno.EROFS: "it is read-only: choose another folder",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EPERM: "check its permissions, or choose another folder",
    errno.ENAMETOOLONG: "give a shorter name",
}


def run_command(
    main: Callable[..., None],
    *,
    together: bool = False,
    positional: bool = False,
    resumes: bool = False,
) -> None:
    """Parses the flags, runs `main`, and exits: 0, or 2 for an error the user can mend.

    130 is an interrupt's status, 143 SIGTERM's (see `covid_flax.preemption`), 141 that of output
    whose reader is gone, 1 anything else's.

    Args:
      main: the command.
      together: whether several processes may run it as one, see `covid_flax.distributed`.
      positional: whether it takes arguments besides its flags; `main` is given their list.
      resumes: whether an interrupted one goes on where it was.
    """
    # Libraries log what they then raise; the raised error is what the user is told.
    logging.set_verbosity(logging.FATAL)
    logging.get_absl_logger().propagate = False
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    threading.excepthook = _thread_error
    sys.excepthook = _error_of_nobody
    if together:
        distributed.define_flags()
    preemption.notice_interrupts()
    try:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # A second start finds its programs compiled; JAX_COMPILATION_CACHE_DIR overrides it.
            jax.config.update("jax_compilation_cache_dir", str(cache_dir("") / "xla"))
        arguments = _parse(sys.argv, positional)
        if together:
            distributed.initialize()
        main(*([arguments] if positional else []))
        distributed.shutdown()
    except UserError as e:
        _fail(str(e))
    except BrokenPipeError:  # the reader of our output is gone, as under `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        distributed.fail("the reader of its output is gone", 141, printed=True)
        sys.exit(141)
    except preemption.Terminated as e:
        print(e, file=sys.stderr, flush=True)
        distributed.fail(str(e), preemption.STATUS, printed=True)
        sys.exit(preemption.STATUS)
    except KeyboardInterrupt:
        hope = "; the same command goes on from the last checkpoint, if there is one yet"
        print(f"interrupted{hope if resumes else ''}", file=sys.stderr)
        distributed.fail("interrupted", 130, printed=True)
        sys.exit(130)
    except Exception as e:
        line = _disk_error(e)
        if line is not None:
            _fail(line)
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
            _fail(
                f"out of memory ({str(e)[:200] or 'of the host'}): smaller batches "
                "(train.batch_size, eval.batch_size) or parts of them (train.micro_batch), smaller "
                "images, or data.on_device=never need less"
            )
        if distributed.lost_a_peer(e):
            _fail(f"lost another process ({str(e)[:200]}): see what it said, start all again", 1)
        traceback.print_exc()
        distributed.fail(f"{type(e).__name__}: {e}", 1, printed=True)
        sys.exit(1)


def _parse(argv: list[str], positional: bool) -> list[str]:
    """Sets the flags, and returns what is no flag."""
    app.define_help_flags()
    try:
        extra = flags.FLAGS(argv)[1:]
    except SystemExit:  # absl has printed the help, and would exit with 1
        sys.exit(0)
    except Exception as e:  # a config file may raise anything
        raise UserError(_flag_line(e)) from e
    if extra and not positional:
        raise UserError(f"unknown argument {extra[0]!r}: flags have the form --name=value")
    return extra


def no_such_config(name: str) -> str:
    """The line for a `--config` that is not there."""
    return (
        f"--config={name}: no such file here, where names begin at the working folder; "
        "configs/ has paper.py, finetune.py, ..."
    )


def _flag_line(e: Exception) -> str:
    """What ml_collections and absl raise, as a line: the key, file or value, and the mend."""
    # Here, for they bring the networks and the input pipeline with them.
    from covid_flax.config import flatten
    from ml_collections_configs import base

    text = str(e)
    unknown = re.search(r'Key "(\w+)" does not exist', text) or re.fullmatch(r"\W*(\w+)\W*", text)
    unknown = re.search(r'instead of "(\w+)"', text) or unknown
    if isinstance(e, AttributeError | KeyError) and unknown:
        known = {part: key for key in flatten(base.get_config()) for part in key.split(".")}
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.0)[0]
        nearest = known[near].partition(f"{near}.")[1].rstrip(".") or known[near]
        return f"unknown config key {unknown[1]!r}: the nearest known one is config.{nearest}"
    if isinstance(e, TypeError) or "positional argument" in text:
        return "that configuration file has no variants: leave out what follows the colon"
    if missing := re.search(r"Flag --(\w+) must have a value", text):
        return f"--{missing[1]} is missing (--help lists the flags)"
    if lost := re.search(
        r"Failed loading config file.*No such file or directory: '(.*)'", text, re.S
    ):
        return no_such_config(lost[1])
    if strange := re.match(r"Unknown command line flag '(config\.)?([\w.]+)", text):
        if strange[1]:
            return f"--config.{strange[2]}=... needs --config=FILE too, a file of configs/"
        keys = [k for k in flatten(base.get_config()) if k.rpartition(".")[2] == strange[2]]
        near = {"data_dir": "data.dir"}.get(strange[2], keys[0] if len(keys) == 1 else "")
        if near and "config" in flags.FLAGS:
            return f"unknown flag --{strange[2]}: here it is --config.{near}"
    text = re.sub(r"\('([^']*)', '([^']*)'\)", r"\1: \2", text)
    if "Traceback" in text:
        text = text.rstrip().splitlines()[-1]
    return f"{text} (--help lists the flags)"


def _disk_error(e: BaseException | None) -> str | None:
    """A line for a full or locked disk, however the libraries wrapped it; None for others."""
    while e is not None:
        if isinstance(e, OSError) and e.errno in _FULL_OR_LOCKED:
            where = f"{e.filename}: " if e.filename else ""
            return f"cannot write: {where}{os.strerror(e.errno)}: {_FULL_OR_LOCKED[e.errno]}"
        for number, mend in _FULL_OR_LOCKED.items():
            # TensorStore and ArrayRecord raise ValueError or RuntimeError with the text.
            if os.strerror(number).lower() in str(e).lower():
                return f"cannot write: {' '.join(str(e).split())[:300]}: {mend}"
        e = e.__cause__ or e.__context__
    return None


def _thread_error(args: threading.ExceptHookArgs) -> None:
    """A checkpoint's writer thread meets a full disk first; the main thread raises it again."""
    if _disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def _error_of_nobody(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """TensorStore prints one for every write that a failed checkpoint leaves under way."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _fail(line: str, status: int = 2) -> NoReturn:
    line = printable(line)
    distributed.fail(line, status)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)
