"""Numbers that went wrong: not finite, or further off with every epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from covid_flax.errors import UserError

MOST_SKIPPED = 100
"""Updates skipped in a row at which a run stops; an epoch's worth, where that is less."""


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number in a pytree of arrays is finite: bool, no axes."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def non_finite_error(what: str, first: int, last: int, config: Any, good: str) -> UserError:
    """The error, in one line, of a run whose numbers are no longer finite.

    Args:
      what: is not finite, as a sentence's beginning.
      first, last: the steps between which it came about, both counted.
      config: the run's.
      good: the last good checkpoint, in words.
    """
    mend = "with other settings in a new --workdir"
    if config.train.on_non_finite == "stop":
        mend += ", or go on in this one with train.on_non_finite=skip"
    causes = ", ".join(_causes(config))
    return UserError(
        f"{what} between steps {first:,} and {last:,} ({good}), likely by {causes}: train {mend}"
    )


def _causes(config: Any) -> list[str]:
    """What the configuration has that makes numbers overflow, the likeliest first."""
    o = config.optimizer
    unbounded = "" if o.clip_norm else " or unbounded gradients (optimizer.clip_norm=1)"
    causes = [f"optimizer.learning_rate={o.learning_rate:g} too high{unbounded}"]
    if o.epsilon < 1e-30:
        causes.insert(0, f"optimizer.epsilon={o.epsilon:g} (0/0 where a gradient is 0)")
    if config.model.dtype == "bfloat16":
        causes.append("model.dtype=bfloat16 too coarse")
    if config.train.class_weights == "balanced":
        causes.append("train.class_weights=balanced with a very rare class")
    if config.model.weights not in ("imagenet", "none"):
        causes.append(f"bad numbers in model.weights={config.model.weights}")
    return causes


def divergence(losses: Sequence[float], chance: float) -> str | None:
    """What shows that a run diverges, of its epochs' training losses; None where nothing does.

    Args:
      losses: of every epoch so far, the last one's last.
      chance: the loss of answers that are the same for every image.
    """
    *before, last = losses
    best = min(before, default=math.inf)
    if last > 2 * best and last > chance:
        return (
            f"training diverges: the loss {last:.4g} is more than twice the best epoch's "
            f"{best:.4g}, and above the {chance:.4g} of chance: lower optimizer.learning_rate"
        )
    if before and last > 2 * chance:  # a run may be far off from its first epoch on
        return (
            f"training diverges: the loss {last:.4g} is more than twice the {chance:.4g} of "
            "chance: lower optimizer.learning_rate"
        )
    return None
