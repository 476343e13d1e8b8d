"""Checkpoints: the only module that knows Orbax.

One checkpoint holds the whole state of a run: the arrays (parameters, optimiser, batch
statistics, RNG key, running sums) and, as JSON beside them, what the loop needs to go on
(data iterator, early stopping, elapsed time, length of the metrics file). The JSON also keeps a
record of what was saved, SHA-256 of all arrays included, that is checked when it is loaded: Orbax
itself does not see a flipped bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp
from orbax.checkpoint.metadata import get_step_metadata

from covid_flax import __version__, distributed
from covid_flax.console import duration, say
from covid_flax.errors import UserError

_policies = ocp.training.preservation_policies

SET_ASIDE = "checkpoints_damaged"  # beside the checkpoints
_UNFINISHED = "it was not finished, or files are missing"
_BEST_IS_GONE = "the best so far, it is gone or files are missing"
SLOW_WRITE_S = 5.0  # for which training may wait for a checkpoint without a word


class DamagedError(UserError):
    """A checkpoint that does not hold what was saved."""


class _Best:
    """Preserves the best checkpoint so far.

    Orbax's own `BestN` compares metrics; the rule for "best" here is early stopping's
    (Keras: an improvement by more than `min_delta`, the first of equals), so the loop
    says it and this policy keeps it.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        # Of which the checkpoint before the latest tells, if the latest is the best.
        self.before: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [c.step in (self.step, self.before) for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run; the best, the latest and the one before it are kept.

    A context manager: leaving it waits for the last save and raises its error.

    Args:
      directory: of the checkpoints.
      writing: whether this process trains the run. Only then are half-written checkpoints
        cleared away: to a reader they may be another process's, under way.
    """

    def __init__(self, directory: Path, *, writing: bool = False):
        self._directory = directory
        self._writing = writing
        self._best = _Best()
        self._saving: Any = None
        with _readable(f"the checkpoints in {directory}"):
            self._orbax = ocp.training.Checkpointer(
                directory.absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                # The latest and the one before: of the latest, power that fails may take files
                # that the system has not written yet.
                preservation_policy=_policies.AnyPreservationPolicy(
                    [_policies.LatestN(2), self._best]
                ),
                cleanup_tmp_directories=writing,
            )
        # `resume`, or who asks for the best, will say so: it may be damaged, or not ours to read.
        with contextlib.suppress(UserError, OSError):
            self._best.step = self.best_step

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def save(self, step: int, state: Any, loop: dict[str, Any], *, best: bool) -> None:
        """Starts an asynchronous save; waits for an earlier one, raising its error.

        Args:
          step: the state's.
          state: pytree of arrays that nobody will donate or change.
          loop: JSON of the loop's own state.
          best: whether this is the best so far.
        """
        self._best.before = self._best.step
        if best:
            self._best.step = step
        record = {
            "step": step,
            "best_step": self._best.step,
            "arrays": _digest_of_arrays(state),
            "layout": _digest_of_layout(state),
            "versions": _versions(),
        }
        contents = {"loop": loop, "record": record}
        started = time.monotonic()
        self.wait()
        self._saving = self._orbax.save_async(
            step, state, custom_metadata={**contents, "sha256": _digest_of_json(contents)}
        )
        if self._saving is None:
            raise RuntimeError(f"Orbax did not save step {step:,}: {self._directory} has a later")
        waited = time.monotonic() - started
        if waited > SLOW_WRITE_S:
            say(
                f"note: training waited {duration(waited)} for the disk to save step {step:,}: "
                "write fewer checkpoints, or choose a faster disk for --workdir"
            )

    def wait(self) -> None:
        """Until the last save is on disk; raises its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            # Its thread, event loop and three open files end when the result is taken, not before.
            saving.result()
        self._orbax.wait()

    @property
    def steps(self) -> list[int]:
        return [c.step for c in self._orbax.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """Raises DamagedError where a newer one than Orbax knows is there."""
        known = max(self.steps, default=-1)
        self._look_again(any(step > known for step in self._unlisted))
        latest = max(self.steps, default=None)
        for step in self._unlisted:
            if latest is None or step > latest:
                raise self._damaged(step, _UNFINISHED)
        return latest

    @property
    def latest_loop(self) -> dict[str, Any] | None:
        """The loop's JSON of the newest checkpoint. Raises DamagedError: it has none."""
        newest = self.latest_step
        return None if newest is None else self._contents(newest)["loop"]

    @property
    def best_step(self) -> int | None:
        """As the newest checkpoint says. Raises DamagedError: it cannot, or that one is gone."""
        newest = self.latest_step
        if newest is None:
            return None
        best = self._contents(newest)["record"]["best_step"]
        if best is not None and best not in self.steps:
            raise self._damaged(best, _BEST_IS_GONE)
        return best

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state at `step`, placed as `like` is, and the loop's JSON.

        Args:
          step: one of `steps`.
          like: pytree of arrays or ShapeDtypeStructs with shardings: the target.

        Raises:
          DamagedError: it does not hold what was saved.
          UserError: it is of another model, may not be read, or is gone meanwhile.
        """
        contents = self._contents(step)
        record = contents["record"]
        if record["layout"] != _digest_of_layout(like):
            raise UserError(
                f"checkpoint {self._directory}/{step} is of another model"
                f"{self._first_difference(step, like)}: give the run's own configuration"
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        with self._sound(step, _what_else(record)):
            state = self._orbax.load(step, abstract)
        if _digest_of_arrays(state) != record["arrays"]:
            raise self._damaged(step, "its arrays are not those that were saved")
        return state, contents["loop"]

    def digest(self, step: int) -> str:
        """SHA-256 of the arrays of one of `steps`, as they were saved. Raises DamagedError."""
        return self._contents(step)["record"]["arrays"]

    def resume(self, like: Any) -> tuple[int, Any, dict[str, Any], bool] | None:
        """The newest sound checkpoint, for the process that trains; None where there is none.

        Damaged ones that are newer, and a damaged best, are moved to `checkpoints_damaged`.

        Args:
          like: as of `load`.

        Returns:
          Step, state, the loop's JSON, and whether the best so far is lost.

        Raises:
          UserError: none is sound, or it is of another model. Nothing is moved then.
        """
        damaged: dict[int, str] = {}
        found = None
        # A file system may show hosts different folders: all try the same steps in the same order.
        for step in distributed.of_first(sorted({*self.steps, *self._unlisted}, reverse=True)):
            loaded, why = self._load_everywhere(step, like)
            if loaded is not None:
                found = (step, *loaded)
                break
            damaged[step] = why
        if found is None:
            if damaged:
                raise UserError(
                    f"{self._directory}: every checkpoint is damaged "
                    f"({', '.join(map(str, damaged))}): restore one, or choose another --workdir"
                )
            return None
        step, state, loop = found
        best = self._contents(step)["record"]["best_step"]
        lost = False
        if best is not None and best != step:
            if distributed.anywhere(best not in self.steps):
                loaded, why = None, str(self._damaged(best, _BEST_IS_GONE))
            else:
                loaded, why = self._load_everywhere(best, like)
            if loaded is None:
                damaged[best], lost = why, True
        for number, line in damaged.items():
            say(f"note: {line}")
            self._set_aside(number)
        if damaged:
            self._orbax.reload()
            say(f"note: going on from step {step:,}; what is damaged lies in {SET_ASIDE}")
        self._best.step = None if lost else best
        return step, state, loop, lost

    def _load_everywhere(
        self, step: int, like: Any
    ) -> tuple[tuple[Any, dict[str, Any]] | None, str]:
        """As `load`; or None and why, in all processes alike, where it is damaged for one."""
        loaded, why = None, ""
        try:
            self._contents(step)
        except DamagedError as e:
            why = str(e)
        # Orbax loads in all processes or in none: the others would wait for this one.
        if distributed.anywhere(bool(why)):
            return None, why or str(self._damaged(step, "as another process read it"))
        try:
            loaded = self.load(step, like)
        except DamagedError as e:
            why = str(e)
        if distributed.anywhere(loaded is None):
            return None, why or str(self._damaged(step, "as another process read it"))
        return loaded, ""

    @property
    def _unlisted(self) -> list[int]:
        """Steps with a folder that Orbax does not take for a checkpoint."""
        if not self._directory.is_dir():
            return []
        there = (int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())
        return sorted(set(there) - set(self.steps))

    def _contents(self, step: int) -> dict[str, Any]:
        """The checked JSON of a checkpoint: `loop` and `record`."""
        self._look_again(step not in self.steps)
        if step not in self.steps:
            raise self._damaged(step, _UNFINISHED)
        with self._sound(step):
            # Not the checkpointer's own `metadata`, which opens every array first; what TensorStore
            # (0.1.86) tells of each is never freed.
            contents = dict(get_step_metadata(self._directory / str(step)).custom_metadata)
            digest = contents.pop("sha256")
            if digest != _digest_of_json(contents) or contents["record"]["step"] != step:
                raise ValueError("its JSON is not what was saved")
        return contents

    @contextlib.contextmanager
    def _sound(self, step: int, what_else: str = "") -> Iterator[None]:
        """Whatever Orbax raises on files that are not as it wrote them, as one line."""
        try:
            yield
        except Exception as e:
            if not self._writing and not (self._directory / str(step)).exists():
                raise UserError(
                    f"checkpoint {self._directory}/{step} is gone, as when a training goes on and "
                    "keeps a newer one: give the command again"
                ) from e
            raise self._damaged(step, what_else + _what_was_met(e)) from e

    def _look_again(self, needed: bool) -> None:
        """At the folder, where another process may have saved since it was opened."""
        # Several processes might not all see the need.
        if needed and not self._writing and jax.process_count() == 1:
            self._orbax.reload()

    def _damaged(self, step: int, why: str) -> DamagedError:
        _refuse_unreadable(self._directory / str(step))
        others = ", ".join(str(s) for s in self.steps if s != step) or "none"
        return DamagedError(
            f"checkpoint {self._directory}/{step} is damaged ({why}): restore it, or take another "
            f"step (there are: {others})"
        )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            place = self._directory.parent / SET_ASIDE
            place.mkdir(exist_ok=True)
            number = 0
            while (target := place / f"{step}{f'.{number}' if number else ''}").exists():
                number += 1
            with contextlib.suppress(FileNotFoundError):  # a best that is gone altogether
                (self._directory / str(step)).rename(target)
        distributed.barrier(f"checkpoint {step} set aside")

    def _first_difference(self, step: int, like: Any) -> str:
        """Where the saved arrays begin to differ from `like`, as far as Orbax tells."""
        try:
            saved = _shapes(self._orbax.metadata(step).metadata)
        except Exception:  # the record has told that they differ, which is enough
            return ""
        wanted = _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                here, there = wanted.get(name, "nothing"), saved.get(name, "nothing")
                return f" ({name}: it has {there}, this network {here})"
        return ""


def _what_else(record: dict[str, Any]) -> str:
    """Of a checkpoint whose arrays do not load: what may be the matter if not damage."""
    if record["versions"] == _versions():
        return ""
    wrote = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    return f"or unknown here, for {wrote} wrote it: "


def _what_was_met(e: BaseException) -> str:
    """What lies behind what Orbax made of it, in 200 characters; raised if it is no damage."""
    while e.__cause__ is not None:
        e = e.__cause__
    if _is_no_damage(e):
        raise e from None
    # TensorStore adds the specification of how it reads, of a thousand characters.
    return " ".join(f"{type(e).__name__}: {e}".partition("[tensorstore_spec")[0].split())[:200]


def _is_no_damage(e: BaseException) -> bool:
    """Whether the machine, or another, lacks something, rather than the file."""
    of_machine = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if isinstance(e, OSError) and e.errno in of_machine:
        return True
    # The last: another process was waited for in vain.
    lacking = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
    return isinstance(e, MemoryError) or any(word in str(e) for word in lacking)


def _refuse_unreadable(folder: Path) -> None:
    """Raises UserError of a checkpoint that this user may not read: no error of Orbax tells."""
    for path in (folder, *folder.rglob("*")):
        wanted = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        if path.exists() and not os.access(path, wanted):
            raise UserError(f"no permission to read {path}: let this user read the checkpoint")


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        why = _what_was_met(e)
        raise DamagedError(f"{what} cannot be listed ({why}): restore them") from e


def _versions() -> dict[str, str]:
    orbax = importlib.metadata.version("orbax-checkpoint")
    return {"covid_flax": __version__, "orbax-checkpoint": orbax}


def _shapes(tree: Any) -> dict[str, str]:
    """`float32[3, 3, 64, 64]` by the names of the path, whatever kind of node they come from."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def _digest_of_layout(tree: Any) -> str:
    """SHA-256 of names, types and shapes."""
    return _digest_of_json(_shapes(tree))


def _digest_of_arrays(tree: Any) -> str:
    """SHA-256 of all values, in the order of the tree; the same however they are placed."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(_on_host(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _same(x: jax.Array) -> jax.Array:
    return x


def _on_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    if not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(_same, out_shardings=whole)(x)
    return np.asarray(x.addressable_data(0))


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def has_checkpoints(directory: Path) -> bool:
    """Whether a step was ever saved whole there."""
    return directory.is_dir() and any(p.name.isdecimal() for p in directory.iterdir())


def resolve_step(checkpoints: Checkpoints, which: str) -> int:
    """`best`, `latest` or a number to a step that is there. Raises UserError."""
    there = ", ".join(map(str, checkpoints.steps)) or "none"
    if which == "best":
        step = checkpoints.best_step
    elif which == "latest":
        step = checkpoints.latest_step
    elif which.isascii() and which.isdecimal():
        step = int(which) if int(which) in checkpoints.steps else None
    else:
        raise UserError(f"--checkpoint={which}: give best, latest or a step ({there})")
    if step is None and which == "best" and there != "none":
        ended = ((checkpoints.latest_loop or {}).get("early_stopping") or {}).get("epoch", 0)
        why = "the best so far is lost until an epoch ends" if ended else "no epoch has ended yet"
        raise UserError(f"--checkpoint=best: {why}; there are: {there}")
    if step is None:
        raise UserError(f"--checkpoint={which}: no such checkpoint; there are: {there}")
    return step
