"""The pure steps: one update of the state, one scored batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from covid_flax.augment import Augment, augment
from covid_flax.models import STAGES
from covid_flax.models.preprocess import preprocess

Array = jax.Array
Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32, updates made.
      params: trained parameters, by stage.
      frozen: parameters that stay as they are, by stage.
      batch_stats: batch norm's running statistics.
      opt_state: Optax's.
      rng: uint32 key data; step t draws from `fold_in(rng, t)`.
      sums: of the running epoch, float32: `loss`, `correct`, `count`.
    """

    step: Array
    params: Tree
    frozen: Tree
    batch_stats: Tree
    opt_state: Tree
    rng: Array
    sums: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs to know of the configuration.

    Attributes:
      preprocessing: mode of `covid_flax.models.preprocess`.
      batch_stats_in: stages whose batch norm uses and updates batch statistics.
      start: first stage to compute; what precedes it comes cached in place of images.
      class_weights: weight of each class's examples in the loss, or None.
      label_smoothing: share of the target spread evenly over the classes.
      augment: random changes of the images.
      axis_name: mapped axis to average over, None under jit.
    """

    preprocessing: str
    batch_stats_in: frozenset[str] = frozenset()
    start: str = STAGES[0]
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    augment: Augment = Augment()
    axis_name: str | None = None


def zero_sums() -> dict[str, Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "count")}


def create_state(
    params: Mapping[str, Tree],
    batch_stats: Tree,
    trainable: frozenset[str],
    tx: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """The state before the first step; `trainable` names stages."""
    trained = {k: v for k, v in params.items() if k in trainable}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen={k: v for k, v in params.items() if k not in trainable},
        batch_stats=batch_stats,
        opt_state=tx.init(trained),
        rng=jax.random.key_data(jax.random.key(seed)),
        sums=zero_sums(),
    )


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
) -> Array:
    """Categorical cross-entropy of each example, `[N]`, in float32.

    Smoothing and class weights as in Keras: targets `(1 - s) onehot + s / classes`; an
    example's loss times its true class's weight. Keras, given probabilities, clips them to
    [1e-7, 1 - 1e-7]; from logits nothing is clipped.
    """
    classes = logits.shape[-1]
    onehot = jax.nn.one_hot(labels, classes)
    targets = onehot * (1 - label_smoothing) + label_smoothing / classes
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), -1)
    if class_weights is not None:
        losses = losses * jnp.asarray(class_weights, jnp.float32)[labels]
    return losses


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: StepConfig
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Array]]:
    """A pure `step(state, batch) -> (state, loss)`, for jit or pmap.

    `batch` has `image` (`[N, H, W, 3]` 0..255, or the cached output of the stage before
    `config.start`) and `label` `[N]`; `loss` is the batch's mean, before the update.
    """
    axis = config.axis_name
    cached = config.start != STAGES[0]

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))
        augment_key, dropout_key = jax.random.split(key)
        x, labels = batch["image"], batch["label"]
        if not cached:
            x = preprocess(augment(augment_key, x, config.augment), config.preprocessing)

        def loss_fn(params: Tree) -> tuple[Array, tuple[Tree, Array, Array]]:
            model = nnx.merge(graphdef, {**state.frozen, **params}, state.batch_stats)
            logits = model(
                x,
                batch_stats_in=config.batch_stats_in,
                dropout_key=dropout_key,
                axis_name=axis,
                start=config.start,
            )
            losses = cross_entropy(
                logits,
                labels,
                label_smoothing=config.label_smoothing,
                class_weights=config.class_weights,
            )
            batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return jnp.mean(losses), (batch_stats, losses, logits)

        grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        sums = {
            "loss": jnp.sum(losses),
            "correct": jnp.sum(jnp.argmax(logits, -1) == labels).astype(jnp.float32),
            "count": jnp.float32(labels.shape[0]),
        }
        if axis is not None:
            grads = lax.pmean(grads, axis)
            sums = lax.psum(sums, axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            sums=jax.tree.map(jnp.add, state.sums, sums),
        )
        return new_state, sums["loss"] / sums["count"]

    return step


def make_eval_step(
    graphdef: nnx.GraphDef, preprocessing: str, *, start: str = STAGES[0], stop: str = STAGES[-1]
) -> Callable[[Tree, Tree, Array], Array]:
    """A pure `step(params, batch_stats, images) -> output of stage stop`, nothing random."""

    def step(params: Tree, batch_stats: Tree, images: Array) -> Array:
        model = nnx.merge(graphdef, params, batch_stats)
        x = preprocess(images, preprocessing) if start == STAGES[0] else images
        return model(x, start=start, stop=stop)

    return step
