"""Checkpoints: the only module that knows Orbax.

One checkpoint holds the whole state of a run: the arrays (parameters, optimiser, batch
statistics, RNG key, running sums) and, as JSON beside them, what the loop needs to go on
(data iterator, early stopping, elapsed time, length of the metrics file).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from covid_flax.errors import UserError

_policies = ocp.training.preservation_policies


class _Best:
    """Preserves the newest checkpoint that was saved as the best so far.

    Orbax's own `BestN` compares metrics; the rule for "best" here is early stopping's
    (Keras: an improvement by more than `min_delta`, the first of equals), so the loop
    says it and this policy keeps it.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = [bool((c.metrics or {}).get("best")) for c in checkpoints]
        last = max((i for i, b in enumerate(best) if b), default=-1)
        return [i == last for i in range(len(checkpoints))]


class Checkpoints:
    """The checkpoints of one run; the best and the latest are always kept.

    A context manager: leaving it waits for the last save and raises its error.

    Args:
      directory: of the checkpoints.
      writing: whether this process trains the run. Only then are half-written checkpoints
        cleared away: to a reader they may be another process's, under way.
    """

    def __init__(self, directory: Path, *, writing: bool = False):
        self._directory = directory
        with _readable(f"the checkpoints in {directory}"):
            self._orbax = ocp.training.Checkpointer(
                directory.absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_policies.AnyPreservationPolicy(
                    [_policies.LatestN(1), _Best()]
                ),
                cleanup_tmp_directories=writing,
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self._orbax.close()

    def save(self, step: int, state: Any, loop: dict[str, Any], *, best: bool) -> None:
        """Starts an asynchronous save; waits for an earlier one, raising its error.

        Args:
          step: the state's.
          state: pytree of arrays that nobody will donate or change.
          loop: JSON of the loop's own state.
          best: whether this is the best so far.
        """
        self._orbax.save_async(
            step, state, metrics={"best": int(best)}, custom_metadata={"loop": loop}
        )

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._orbax.wait()

    @property
    def steps(self) -> list[int]:
        return [c.step for c in self._orbax.checkpoints]

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        best = [c.step for c in self._orbax.checkpoints if (c.metrics or {}).get("best")]
        return max(best, default=None)

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state at `step`, placed as `like` is, and the loop's JSON.

        Args:
          step: one of `steps`.
          like: pytree of arrays or ShapeDtypeStructs with shardings: the target.

        Raises:
          UserError: the checkpoint is damaged, or of another model.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        with _readable(f"checkpoint {self._directory}/{step}"):
            state = self._orbax.load(step, abstract)
            loop = (self._orbax.metadata(step).custom_metadata or {})["loop"]
        return state, loop


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever Orbax raises on files that are not as it wrote them, as one line."""
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(
            f"{what}: damaged, or of another model: restore it, or remove the damaged step's "
            f"folder to go on from an older one ({why})"
        ) from e


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
        raise UserError(f"--checkpoint=best: no epoch has ended yet; there are: {there}")
    if step is None:
        raise UserError(f"--checkpoint={which}: no such checkpoint; there are: {there}")
    return step
