"""Judge: `keras.applications.ResNet50`, every array random, on colour images.

Arrays are copied here by a rule of their own, so that a mistake in the package's table of
names cannot hide behind itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from keras import layers as kl
from keras.src.applications.resnet import ResNet as KerasResNet
from keras.src.applications.resnet import stack_residual_blocks_v1
from keras_judge import keras

from covid_flax.models import MODELS, ResNet
from covid_flax.models.resnet import STAGES

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERAS_STAGES = {
    "conv1": "pool1_pool",
    "conv2": "conv2_block3_out",
    "conv3": "conv3_block4_out",
    "conv4": "conv4_block6_out",
    "conv5": "conv5_block3_out",
    "pool": "avg_pool",
    "head": "predictions",
}
BATCH_NORM = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def layer_of(model, name):
    """`conv2_block1_3_bn` -> `model.conv2.block1.unit3.bn`; hidden, predictions -> the head's."""
    if name in ("hidden", "predictions"):
        return getattr(model.head, name)
    *place, kind = name.split("_")
    stage, *rest = place
    layer = getattr(model, stage)
    if rest:
        block, unit = rest
        layer = getattr(getattr(layer, block), f"unit{unit}")
    return getattr(layer, kind)


def arrays(keras_model):
    """`(layer name, our array name, Keras variable)` of everything with a value."""
    for layer in keras_model.layers:
        for variable in layer.variables:
            if "seed" not in variable.path:
                yield layer.name, BATCH_NORM.get(variable.name, variable.name), variable


def randomize(keras_model, seed=0):
    """Fills every array; scales keep activations within a few powers of ten."""
    rng = np.random.default_rng(seed)
    for layer, name, variable in arrays(keras_model):
        shape = variable.shape
        if name == "kernel":
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        elif name == "scale":
            value = rng.uniform(0.2, 0.6, shape) if "_3_" in layer else rng.uniform(0.7, 1.3, shape)
        elif name == "var":
            value = rng.uniform(0.7, 1.5, shape)
        else:
            value = 0.2 * rng.normal(size=shape)
        variable.assign(value.astype(np.float32))


def copy_arrays(keras_model, model):
    for layer, name, variable in arrays(keras_model):
        target = getattr(layer_of(model, layer), name)
        assert target[...].shape == variable.shape
        target[...] = jnp.asarray(np.asarray(variable.value))


def our_model(keras_model, name="resnet50", depths=None, **kw):
    spec = MODELS[name]
    if depths:
        spec = dataclasses.replace(spec, depths=depths)
    model = nnx.eval_shape(lambda: ResNet(spec, rngs=nnx.Rngs(0), **kw))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), state)
    model = nnx.merge(graph, state)  # an array that is not copied leaves NaN in the output
    copy_arrays(keras_model, model)
    return model


def colour_images(batch, size, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, size, size, 3)) * (1.0, 0.5, 2.0) + (0.3, -0.5, 0.1)
    return images.astype(np.float32)


def keras_stages(keras_model, images):
    outputs = [keras_model.get_layer(layer).output for layer in KERAS_STAGES.values()]
    return dict(
        zip(STAGES, keras.Model(keras_model.input, outputs).predict_on_batch(images), strict=True)
    )


@jax.jit
def split_run(graph_state, images):
    """Every stage's output, each computed from the one before."""
    model = nnx.merge(*graph_state)
    outputs, x = {}, images
    for stage in STAGES:
        outputs[stage] = x = model(x, start=stage, stop=stage)
    return outputs


def assert_close(got, want, tolerance, name=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    scale = np.abs(want).max()
    assert 0 < scale < 1e6, f"{name}: a poor judge, largest {scale}"
    error = np.abs(got - want).max() / scale
    assert error <= tolerance, f"{name}: {error:.2e}"


def assert_stages_close(model, keras_model, images):
    want = keras_stages(keras_model, images)
    got = split_run(nnx.split(model), images)
    layer = keras_model.get_layer("predictions")
    if layer.activation is keras.activations.softmax:
        probabilities = want["head"]
        x = want["pool"].astype(np.float64)
        if model.head.hidden is not None:
            hidden = keras_model.get_layer("hidden")
            x = np.maximum(x @ np.asarray(hidden.kernel) + np.asarray(hidden.bias), 0)
        want["head"] = x @ np.asarray(layer.kernel) + np.asarray(layer.bias)  # the logits
        # A softmax turns its logits' absolute error, 1e-5 of the largest, into a relative one.
        logits = max(1, np.abs(want["head"]).max())
        assert_close(jax.nn.softmax(got["head"]), probabilities, 1e-5 * logits, "softmax")
    for stage in STAGES:
        assert_close(got[stage], want[stage], 1e-5, stage)


RESNET50 = (3, 4, 6, 3)


def paper_model(size, dropout=0.5, depths=RESNET50):
    """Keras's own ResNet with as many blocks in each stage, and the paper's head."""

    def stages(x):
        for i, depth in enumerate(depths):
            stride = 1 if i == 0 else 2
            x = stack_residual_blocks_v1(x, 64 * 2**i, depth, stride, name=f"conv{i + 2}")
        return x

    how = {"include_top": False, "weights": None, "input_shape": (size, size, 3), "pooling": "avg"}
    base = (
        keras.applications.ResNet50(**how)
        if depths == RESNET50
        else KerasResNet(stages, preact=False, use_bias=True, **how)
    )
    x = kl.Dense(1024, activation="relu", name="hidden")(base.output)
    x = kl.Dropout(dropout)(x)
    model = keras.Model(base.input, kl.Dense(4, activation="softmax", name="predictions")(x))
    randomize(model)
    return model


# Of both, test_keras_golden.py has the network whole, and the training step below the head.
@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 224])
def test_every_stage_equals_keras_with_the_papers_head(size):
    keras_model = paper_model(size)
    model = our_model(keras_model, num_classes=4)
    assert_stages_close(model, keras_model, colour_images(2, size))


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 224])
def test_every_stage_equals_keras_with_the_imagenet_top(size):
    keras_model = keras.applications.ResNet50(weights=None, input_shape=(size, size, 3))
    randomize(keras_model)
    model = our_model(keras_model, num_classes=1000, hidden_units=0)
    assert_stages_close(model, keras_model, colour_images(2, size))


def keras_v1_5(size):
    """Torchvision's ResNet50: stride on the 3x3, no convolution biases, epsilon 1e-5."""

    def conv_bn(x, name, features, kernel, stride=1):
        if kernel > 1:
            x = kl.ZeroPadding2D(kernel // 2)(x)
        x = kl.Conv2D(features, kernel, stride, use_bias=False, name=f"{name}_conv")(x)
        return kl.BatchNormalization(epsilon=1e-5, name=f"{name}_bn")(x)

    inputs = kl.Input((size, size, 3))
    x = kl.ReLU()(conv_bn(inputs, "conv1", 64, 7, 2))
    x = kl.MaxPooling2D(3, 2, name="pool1_pool")(kl.ZeroPadding2D(1)(x))
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 2):
        for block in range(1, depth + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = conv_bn(x, f"{name}_0", 4 * width, 1, stride) if block == 1 else x
            y = kl.ReLU()(conv_bn(x, f"{name}_1", width, 1))
            y = kl.ReLU()(conv_bn(y, f"{name}_2", width, 3, stride))
            y = conv_bn(y, f"{name}_3", 4 * width, 1)
            x = kl.ReLU(name=f"{name}_out")(kl.Add()([shortcut, y]))
    x = kl.GlobalAveragePooling2D(name="avg_pool")(x)
    return keras.Model(inputs, kl.Dense(1000, name="predictions")(x))


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_every_stage_of_v1_5_equals_a_keras_model_of_it(size):
    keras_model = keras_v1_5(size)
    assert keras_model.count_params() == 25_557_032 + 2 * 26_560  # torchvision's, and statistics
    randomize(keras_model)
    model = our_model(keras_model, "resnet50_v1_5", num_classes=1000, hidden_units=0)
    assert_stages_close(model, keras_model, colour_images(2, size))


@pytest.mark.parametrize("depths", [(1, 2, 1, 1), pytest.param(RESNET50, marks=pytest.mark.slow)])
def test_a_training_step_equals_keras_in_outputs_statistics_and_gradients(depths):
    size, batch = 96, 4
    keras_model = paper_model(size, dropout=0.0, depths=depths)
    model = our_model(keras_model, depths=depths, num_classes=4)
    images, labels = colour_images(batch, size), jnp.array([0, 1, 2, 3])

    def keras_loss(trainable, fixed):
        p, fixed = keras_model.stateless_call(trainable, fixed, images, training=True)
        return -jnp.mean(jnp.log(p[jnp.arange(batch), labels])), (p, fixed)

    trainable = [v.value for v in keras_model.trainable_variables]
    fixed = [v.value for v in keras_model.non_trainable_variables]
    (_, (want, fixed)), keras_grads = jax.jit(jax.value_and_grad(keras_loss, has_aux=True))(
        trainable, fixed
    )

    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params, stats):
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(images, batch_stats_in=STAGES)
        value = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(batch), labels])
        return value, (logits, nnx.state(model, nnx.BatchStat))

    (_, (logits, new_stats)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats)
    assert_close(jax.nn.softmax(logits), want, 1e-4, "probabilities")

    # Statistics: compare what the step added, a hundredth of the batch's.
    updated = nnx.merge(graph, params, new_stats)
    checked = 0
    for variable, new in zip(keras_model.non_trainable_variables, fixed, strict=True):
        if "moving" not in variable.path:
            continue
        layer, name = variable.path.split("/")
        old = np.asarray(variable.value, np.float64)
        got = np.asarray(getattr(layer_of(updated, layer), BATCH_NORM[name])[...], np.float64)
        assert_close((got - 0.99 * old) / 0.01, (new - 0.99 * old) / 0.01, 3e-4, variable.path)
        checked += 1
    assert checked == 2 * (1 + 4 + 3 * sum(depths))

    gradients = nnx.merge(graph, grads, stats)
    for variable, want in zip(keras_model.trainable_variables, keras_grads, strict=True):
        layer, name = variable.path.split("/")
        got = getattr(layer_of(gradients, layer), BATCH_NORM.get(name, name))[...]
        if layer.endswith("_conv") and name == "bias":
            assert not np.any(got)  # Keras's is what rounding leaves of zero
            continue
        # Rounding turns a few ReLUs over, and that moves these gradients by 1e-2: as much as
        # Keras's own move when the images change by 2e-7. Behind the last of them all is tight.
        tight = layer in ("hidden", "predictions", f"conv5_block{depths[-1]}_3_conv")
        want = np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < (1e-3 if tight else 6e-2), f"{variable.path}: {error:.2e}"


def count(state):
    return sum(x.size for x in jax.tree.leaves(state))


def test_parameter_counts():
    model = nnx.eval_shape(lambda: ResNet(MODELS["resnet50"], num_classes=4, rngs=nnx.Rngs(0)))
    hidden, last = count(nnx.state(model.head.hidden)), count(nnx.state(model.head.predictions))
    assert (hidden, last) == (2_098_176, 4_100)
    assert count(nnx.state(model)) - hidden - last == 23_587_712


@pytest.fixture(scope="module")
def small():
    """The small network, every array moved off its initial value."""
    model = ResNet(MODELS["resnet14_small"], num_classes=4, hidden_units=64, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)

    def move(x):
        return x + jnp.asarray(rng.uniform(-0.05, 0.05, x.shape), x.dtype)

    return graph, jax.tree.map(move, params), jax.tree.map(move, stats)


@pytest.mark.parametrize("cut", STAGES[:-1])
def test_start_after_stop_composes_to_the_whole(small, cut):
    model = nnx.merge(*small)
    images = colour_images(2, 33)
    middle = model(images, stop=cut)
    end = model(middle, start=STAGES[STAGES.index(cut) + 1])
    assert_close(end, model(images), 1e-5)


def test_only_the_named_stages_use_and_update_batch_statistics(small):
    images = colour_images(4, 32)
    model = nnx.merge(*small, copy=True)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    frozen = model(images, stop="conv3")
    model(images, batch_stats_in=("conv4",))
    np.testing.assert_array_equal(model(images, stop="conv3"), frozen)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    for stage in before:
        for old, new in zip(
            jax.tree.leaves(before[stage]), jax.tree.leaves(after[stage]), strict=True
        ):
            assert np.all(old != new) if stage == "conv4" else np.array_equal(old, new), stage


def test_dropout_acts_only_with_a_key(small):
    model = nnx.merge(*small)
    images = colour_images(2, 32)
    plain = np.asarray(model(images))
    assert np.all(plain != 0)
    np.testing.assert_array_equal(plain, model(images))
    one = np.asarray(model(images, dropout_key=jax.random.key(0)))
    assert np.abs(one - plain).max() > 0
    np.testing.assert_array_equal(one, model(images, dropout_key=jax.random.key(0)))
    assert np.abs(one - model(images, dropout_key=jax.random.key(1))).max() > 0


@pytest.mark.parametrize("batch_stats_in", [pytest.param((), marks=pytest.mark.slow), STAGES])
def test_bfloat16_computes_convolutions_only(small, batch_stats_in):
    def build(dtype):
        model = ResNet(
            MODELS["resnet14_small"], num_classes=4, hidden_units=64, dtype=dtype, rngs=nnx.Rngs(0)
        )
        nnx.update(model, *small[1:])
        return model

    def run(model, **how):
        graph, state = nnx.split(model)

        def apply(state, x):
            model = nnx.merge(graph, state)
            return model(x, **how), nnx.state(model, nnx.BatchStat)

        out, stats = jax.jit(apply)(state, images)
        statistics.append(stats)
        return out

    images, statistics = colour_images(8, 64), []
    half, full = build(jnp.bfloat16), build(jnp.float32)
    assert jax.eval_shape(lambda x: half(x, stop="conv2"), images).dtype == jnp.bfloat16
    got, want = (run(model, batch_stats_in=batch_stats_in) for model in (half, full))
    assert got.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    # Each of 14 layers rounds to 2^-8; batch statistics of few images amplify it.
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert 0 < error < (0.1 if batch_stats_in else 0.05)
    # Each layer's running statistics move as they do in float32.
    before = nnx.state(full, nnx.BatchStat)
    for old, a, b in zip(*map(jax.tree.leaves, (before, *statistics[-2:])), strict=True):
        moved = np.linalg.norm(b - old)
        assert bool(moved > 0) == bool(batch_stats_in)
        assert np.linalg.norm(a - b) <= 0.15 * moved
