"""The pure steps: one update of the state, one scored batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from covid_flax.augment import Augment, augment, mix, restyle, stretched
from covid_flax.models.layers import set_own_shares
from covid_flax.models.preprocess import preprocess
from covid_flax.optimizer import updates_made

Array = jax.Array
Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32, batches seen; of some the update may have been skipped.
      params: trained parameters, by stage.
      frozen: parameters that stay as they are, by stage.
      batch_stats: batch norm's running statistics.
      opt_state: Optax's.
      rng: uint32 key data; step t draws from `fold_in(rng, t)`.
      sums: of the running epoch, float32: `loss`, `correct`, `count`; where updates may be
        skipped, `skipped` and `skipped_in_a_row` too, which no checkpoint's arrays have.
      average: moving averages of `params` and `batch_stats` under these names; empty where
        none are kept. Where what training began with has a share in what is evaluated, that is
        `start`, and `start_share` the share.
    """

    step: Array
    params: Tree
    frozen: Tree
    batch_stats: Tree
    opt_state: Tree
    rng: Array
    sums: dict[str, Array]
    average: dict[str, Tree]

    def for_evaluation(self) -> tuple[Tree, Tree]:
        """All parameters and the batch statistics: the averages where there are any.

        Of these and the weights that training began with, the mean by `start_share` (WiSE-FT,
        Wortsman et al. 2022b).
        """
        params: Tree = self.average.get("params", self.params)
        if "start" in self.average:
            share, start = self.average["start_share"], self.average["start"]
            params = jax.tree.map(lambda x, at_first: x + share * (at_first - x), params, start)
        return {**self.frozen, **params}, self.average.get("batch_stats", self.batch_stats)


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network whose answers a step learns from (Hinton, Vinyals and Dean 2015).

    Attributes:
      logits: of images `[N, H, W, 1 or 3]`, 0..255: float32 `[N, K]`.
      weight: share of the loss that its answers make; the labels make the rest.
      temperature: both networks' logits are divided by it in that share.
    """

    logits: Callable[[Array], Array]
    weight: float
    temperature: float


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs to know of the configuration.

    Attributes:
      preprocessing: mode of `covid_flax.models.preprocess`.
      batch_stats_in: stages whose batch norm uses and updates batch statistics.
      start: first stage to compute; what precedes it comes cached in place of images. None:
        all of them.
      class_weights: weight of each class's examples in the loss, or None.
      label_smoothing: share of the target spread evenly over the classes.
      augment: random changes of the images.
      micro_batch: > 0: at most so many examples go through the network at once; the
        gradients of a batch's parts are added up.
      ema_decay: > 0: of the moving averages of parameters and batch statistics.
      swa_after: > 0: their averages are plain means over all steps after so many.
      teacher: whose answers to the same augmented images are learned from, or None.
      skip_non_finite: a batch whose loss or gradients are not finite changes nothing but the
        step's number and the counts of `zero_skipped`, which the state's sums must have.
      axis_name: mapped axis to average over, None under jit.
    """

    preprocessing: str
    batch_stats_in: frozenset[str] = frozenset()
    start: str | None = None
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    augment: Augment = Augment()
    micro_batch: int = 0
    ema_decay: float = 0.0
    swa_after: int = 0
    teacher: Teacher | None = None
    skip_non_finite: bool = False
    axis_name: str | None = None

    def chance_loss(self, classes: int) -> float:
        """The mean loss of answers that give every class the same probability."""
        labels = math.log(classes)
        if self.teacher is None:
            return labels
        share, temperature = self.teacher.weight, self.teacher.temperature
        return ((1 - share) + share * temperature**2) * labels


def zero_sums() -> dict[str, Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "count")}


def zero_skipped() -> dict[str, Array]:
    """What the sums have besides where updates may be skipped: how many, and up to now in a row."""
    return {name: jnp.zeros((), jnp.float32) for name in ("skipped", "skipped_in_a_row")}


def create_state(
    params: Mapping[str, Tree],
    batch_stats: Tree,
    trainable: Collection[str],
    tx: optax.GradientTransformation,
    seed: int,
    *,
    average: bool = False,
    start_share: float = 0.0,
) -> TrainState:
    """The state before the first step.

    Args:
      params, batch_stats: of the network, by stage.
      trainable: names of the trained stages.
      tx: the optimiser.
      seed: of what steps draw.
      average: whether moving averages are kept.
      start_share: > 0, with averages: of these parameters in those that are evaluated.
    """
    trained = {k: v for k, v in params.items() if k in trainable}
    averages = {"params": trained, "batch_stats": batch_stats} if average else {}
    if start_share:
        averages |= {"start": trained, "start_share": jnp.float32(start_share)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen={k: v for k, v in params.items() if k not in trainable},
        batch_stats=batch_stats,
        opt_state=tx.init(trained),
        rng=jax.random.key_data(jax.random.key(seed)),
        sums=zero_sums(),
        average=averages,
    )


def abstract_batch(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    size: int,
    image_size: int,
    cached: str | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `size` images, or of what stage `cached` makes of them."""
    image = jax.ShapeDtypeStruct((size, image_size, image_size, 3), jnp.uint8)
    if cached is not None:
        prefix = make_eval_step(graphdef, "unit", stop=cached)
        image = jax.eval_shape(prefix, params, batch_stats, image)
    return {"image": image, "label": jax.ShapeDtypeStruct((size,), jnp.int32)}


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


def distillation_loss(logits: Array, teacher_logits: Array, temperature: float) -> Array:
    """Cross-entropy of each example to the teacher's softened answers, `[N]`, float32.

    Times the square of the temperature, so that its gradient stays as large as the labels'
    (Hinton, Vinyals and Dean 2015).
    """
    targets = jax.nn.softmax(teacher_logits.astype(jnp.float32) / temperature)
    answers = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return -(temperature**2) * jnp.sum(targets * answers, -1)


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: StepConfig
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Array]]:
    """A pure `step(state, batch) -> (state, loss)`, for jit or pmap.

    `batch` has `image` (`[N, H, W, 1 or 3]` 0..255, or the cached output of the stage before
    `config.start`), `label` `[N]`, and where examples are only there to fill it up, `mask`
    `[N]`, False for those: they touch neither loss nor statistics. `loss` is the batch's
    mean, before the update.
    """
    axis = config.axis_name
    teacher = config.teacher

    def loss_fn(
        params: Tree, frozen: Tree, batch_stats: Tree, batch: dict[str, Array], key: Array
    ) -> tuple[Array, tuple[Tree, dict[str, Array]]]:
        model = nnx.merge(graphdef, {**frozen, **params}, batch_stats)
        weights = _example_weights(batch, axis)
        logits = model(
            batch["image"],
            batch_stats_in=config.batch_stats_in,
            example_weights=weights,
            dropout_key=key,
            axis_name=axis,
            start=config.start,
        )
        labels = batch["label"]

        def label_losses(labels: Array) -> Array:
            return cross_entropy(
                logits,
                labels,
                label_smoothing=config.label_smoothing,
                class_weights=config.class_weights,
            )

        losses = label_losses(labels)
        if "share" in batch:
            own = batch["share"]
            losses = own * losses + (1 - own) * label_losses(batch["other"])
        if teacher is not None:
            answers = lax.stop_gradient(teacher.logits(batch["augmented"]))
            distilled = distillation_loss(logits, answers, teacher.temperature)
            losses = (1 - teacher.weight) * losses + teacher.weight * distilled
        loss = jnp.mean(losses) if weights is None else jnp.sum(losses * weights)
        real = batch.get("mask", jnp.ones(labels.shape, bool))
        sums = {
            "loss": jnp.sum(losses * real),
            "correct": jnp.sum((jnp.argmax(logits, -1) == labels) & real).astype(jnp.float32),
            "count": jnp.sum(real).astype(jnp.float32),
        }
        return loss, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), sums)

    def gradients(
        state: TrainState, batch: dict[str, Array], key: Array
    ) -> tuple[Tree, Tree, dict[str, Array]]:
        """Of the batch's mean loss; the new batch statistics; the batch's sums."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        size = batch["label"].shape[0]
        parts = -(-size // config.micro_batch) if config.micro_batch else 1
        if parts == 1:
            grads, (batch_stats, sums) = grad_fn(
                state.params, state.frozen, state.batch_stats, batch, key
            )
            return grads, batch_stats, sums

        # Every parts-th example makes a part, so that each device's share holds some of each.
        def split(x: Array) -> Array:
            return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

        def add(carry: Tree, part: Tree) -> tuple[Tree, None]:
            batch_stats, grads, sums = carry
            number, examples = part
            new, (batch_stats, new_sums) = grad_fn(
                state.params,
                state.frozen,
                batch_stats,
                examples,
                jax.random.fold_in(key, number),
            )
            count = new_sums["count"] if axis is None else lax.pmean(new_sums["count"], axis)
            grads = jax.tree.map(lambda total, g: total + g * count, grads, new)
            return (batch_stats, grads, jax.tree.map(jnp.add, sums, new_sums)), None

        start = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params), zero_sums())
        numbered = (jnp.arange(parts), jax.tree.map(split, batch))
        (batch_stats, grads, sums), _ = lax.scan(add, start, numbered)
        count = sums["count"] if axis is None else lax.pmean(sums["count"], axis)
        return jax.tree.map(lambda g: g / count, grads), batch_stats, sums

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))
        augment_key, dropout_key = jax.random.split(key)
        if config.start is None:
            batch = _augmented(config, augment_key, batch)
        grads, batch_stats, sums = gradients(state, batch, dropout_key)
        if axis is not None:
            grads = lax.pmean(grads, axis)
            sums = lax.psum(sums, axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = dict(state.average)
        if config.ema_decay or config.swa_after:
            new = {"params": params, "batch_stats": batch_stats}
            share = _share_of_average(config, updates_made(opt_state))
            old = {name: average[name] for name in new}
            average |= jax.tree.map(lambda a, x: a + share * (x - a), old, new)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            sums={**state.sums, **{name: state.sums[name] + x for name, x in sums.items()}},
            average=average,
        )
        if config.skip_non_finite:
            finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(optax.global_norm(grads))
            new_state = _unless_skipped(finite, state, new_state)
        return new_state, sums["loss"] / sums["count"]

    return step


# What changes a whole batch draws from the key folded with these: folded with the number of an
# image, as `split` does it, it would be that image's own key.
_STYLE, _MIX = 2**31, 2**31 + 1


def _augmented(config: StepConfig, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """The batch of images as the network takes it, and what else the loss needs of them."""
    how, x = config.augment, batch["image"]
    if how.style:
        style_key = jax.random.fold_in(key, _STYLE)
        x = restyle(style_key, x, batch["label"], how.style, batch.get("mask"))
    x = augment(key, x, how)
    if how.mixup or how.cutmix:
        x, share = mix(jax.random.fold_in(key, _MIX), x, how, batch.get("mask"))
        # Its own share of the labels too, and the labels of what was mixed in.
        batch = {**batch, "share": share, "other": jnp.roll(batch["label"], 1)}
    if config.teacher is not None:
        batch = {**batch, "augmented": x}
    return {**batch, "image": preprocess(x, config.preprocessing)}


def _example_weights(batch: dict[str, Array], axis: str | None) -> Array | None:
    """`[N]`, summing to one over the batch's real examples; None where all are real.

    Under a mapped axis they are so scaled that the mean over the devices is the batch's.
    """
    if "mask" not in batch:
        return None
    real = batch["mask"].astype(jnp.float32)
    count = jnp.sum(real)
    return real / (count if axis is None else lax.pmean(count, axis))


def _unless_skipped(finite: Array, state: TrainState, new: TrainState) -> TrainState:
    """`new` where `finite`; else `state`, at the next step and with one more update skipped."""
    chosen = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, state)
    counts = {
        "skipped": state.sums["skipped"] + ~finite,
        "skipped_in_a_row": jnp.where(finite, 0.0, state.sums["skipped_in_a_row"] + 1),
    }
    return dataclasses.replace(chosen, step=new.step, sums={**chosen.sums, **counts})


def _share_of_average(config: StepConfig, updates: Array) -> Array:
    """What the weights after so many updates make of their average.

    Moving averages forget faster while they are young, as TensorFlow's `ExponentialMovingAverage`
    with `num_updates`. Plain means (SWA, Izmailov et al. 2018) are the weights themselves until
    `config.swa_after`.
    """
    t = updates.astype(jnp.float32)
    if config.swa_after:
        return 1 / jnp.maximum(t - config.swa_after, 1.0)
    return 1 - jnp.minimum(config.ema_decay, (1 + t) / (10 + t))


def make_steps_on_device(
    step: Callable[[TrainState, dict[str, Array]], tuple[TrainState, Array]],
) -> Callable[..., tuple[TrainState, Array]]:
    """Several steps in one program, on data that lie on the device.

    Returns:
      `steps(state, data, indices, count) -> (state, loss of the last step)`: `data` has
      `image` `[examples, H, W, 1 or 3]` uint8 and `label` `[examples]`; `indices`
      `[S, N]` int32 says what each batch takes; of its rows the first `count` count.
    """

    def steps(
        state: TrainState, data: dict[str, Array], indices: Array, count: Array
    ) -> tuple[TrainState, Array]:
        def one(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            return step(carry[0], take(data, indices[i]))

        return lax.fori_loop(0, count, one, (state, jnp.zeros((), jnp.float32)))

    return steps


def take(data: dict[str, Array], index: Array) -> dict[str, Array]:
    """A batch of data on the device: those of `index` `[N]`."""
    return {"image": data["image"][index], "label": data["label"][index]}


def make_eval_step(
    graphdef: nnx.GraphDef,
    preprocessing: str,
    *,
    start: str | None = None,
    stop: str | None = None,
    mirror: bool = False,
    aspect: float = 0.0,
    own_shares: Mapping[str, float] | None = None,
) -> Callable[[Tree, Tree, Array], Array]:
    """A pure `step(params, batch_stats, images) -> output`, nothing random.

    Args:
      graphdef: of the network.
      preprocessing: mode of `covid_flax.models.preprocess`.
      start: first stage to compute, of what comes in place of images; None is from them on.
      stop: the last stage; None is the network's, whose output are logits.
      mirror: the output is the mean of the image's and its mirror image's; from images only.
      aspect: > 0: and of the image's with height times, width over exp(+- this).
      own_shares: that an image's own moments have in those that batch norm takes, by stage.
    """

    def step(params: Tree, batch_stats: Tree, images: Array) -> Array:
        model = nnx.merge(graphdef, params, batch_stats)
        set_own_shares(model, own_shares or {})
        if start is not None:
            return model(images, start=start, stop=stop)
        views = [images]
        if aspect:
            views += [stretched(images, math.exp(aspect)), stretched(images, math.exp(-aspect))]
        views = [preprocess(view, preprocessing) for view in views]
        if mirror:
            views += [view[:, :, ::-1] for view in views]
        return functools.reduce(jnp.add, [model(x, stop=stop) for x in views]) / len(views)

    return step
