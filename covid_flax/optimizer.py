"""Adam and its learning rate, from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScaleByKerasAdamState(NamedTuple):
    step: jax.Array
    mu: Any
    nu: Any


def scale_by_keras_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam whose epsilon means what it means in Keras.

    Keras adds epsilon to the root of the second moment before the bias correction (the
    paper's "epsilon hat", Kingma and Ba 2015, section 2), Optax after it. Keras's 1e-7 is
    Optax's `1e-7 / sqrt(1 - b2**t)`: 3.2e-6 at the first step.
    """

    def init(params: Any) -> ScaleByKerasAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ScaleByKerasAdamState(
            jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params)
        )

    def update(grads: Any, state: ScaleByKerasAdamState, params: Any = None):
        del params
        step = state.step + 1
        t = step.astype(jnp.float32)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        mu = jax.tree.map(lambda m, g: m + (g - m) * (1 - b1), state.mu, grads)
        nu = jax.tree.map(lambda v, g: v + (g * g - v) * (1 - b2), state.nu, grads)
        updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, ScaleByKerasAdamState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def learning_rate_schedule(config: Any, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then constant or a cosine to zero."""
    peak = config.learning_rate
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps_per_epoch * epochs - warmup))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: Any, schedule: optax.Schedule, stages: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The configuration's `optimizer`, at a learning rate by step.

    Args:
      config: the configuration's `optimizer`.
      schedule: see `learning_rate_schedule`.
      stages: of the network, in order of computation: the outermost names of the parameter tree.
        Needed where `stage_decay` is not 1.
    """
    if config.epsilon_mode == "keras":
        adam = scale_by_keras_adam(config.b1, config.b2, config.epsilon)
    else:
        adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    chain = [adam]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        # Kernels only: decaying a batch norm's scale or a bias has no such meaning.
        chain.append(
            optax.add_decayed_weights(
                config.weight_decay,
                mask=lambda params: jax.tree_util.tree_map_with_path(
                    lambda path, _: path[-1].key == "kernel", params
                ),
            )
        )
    if config.stage_decay != 1:
        # Discriminative rates (Howard and Ruder 2018); `pool` has no parameters and is skipped.
        order = [stage for stage in stages if stage != "pool"][::-1]
        factors = {stage: config.stage_decay**i for i, stage in enumerate(order)}
        chain.append(
            optax.stateless(
                lambda updates, params: {
                    stage: jax.tree.map(lambda u, f=factors[stage]: u * f, update)
                    for stage, update in updates.items()
                }
            )
        )
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))


def updates_made(opt_state: Any) -> jax.Array:
    """How many, by the optimiser's own count (under pmap of each device): int32."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
