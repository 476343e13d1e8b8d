"""Strictness of loading: what fits, what is refused and in which words."""

import jax
import numpy as np
import pytest

from covid_flax.errors import UserError
from covid_flax.pretrained.load import load_weights
from covid_flax.pretrained.names import keras_name

HEAD = {"predictions/kernel": (512, 1000), "predictions/bias": (1000,)}


@pytest.fixture(scope="module")
def net(model_trees):
    """Initial trees, random, of the small network with a hidden layer of 8."""
    _, *trees = model_trees("resnet14_small", num_classes=4, hidden_units=8)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trees)


@pytest.fixture
def arrays(net, leaves):
    """Random arrays for every name of its backbone."""
    rng = np.random.default_rng(1)
    shapes = {keras_name(p): v.shape for t in net for p, v in leaves(t).items()}
    return {
        n: rng.normal(size=s).astype(np.float32)
        for n, s in shapes.items()
        if not n.startswith(("hidden", "predictions"))
    }


def random(shapes):
    rng = np.random.default_rng(2)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def load(arrays, net, **kw):
    return load_weights(arrays, *net, source="w.npz", **kw)


def refusal(arrays, net, **kw):
    with pytest.raises(UserError) as e:
        load(arrays, net, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_arrays_arrive_and_inputs_are_untouched(arrays, net, leaves):
    before = [jax.tree.map(np.copy, leaves(t)) for t in net]
    params, stats, report = load(arrays, net)
    conv = params["conv3"]["block1"]["unit0"]["conv"]
    np.testing.assert_array_equal(conv["kernel"], arrays["conv3_block1_0_conv/kernel"])
    np.testing.assert_array_equal(conv["bias"], arrays["conv3_block1_0_conv/bias"])
    bn = params["conv1"]["bn"]
    np.testing.assert_array_equal(bn["scale"], arrays["conv1_bn/gamma"])
    np.testing.assert_array_equal(bn["bias"], arrays["conv1_bn/beta"])
    running = stats["conv5"]["block1"]["unit3"]["bn"]
    np.testing.assert_array_equal(running["mean"], arrays["conv5_block1_3_bn/moving_mean"])
    np.testing.assert_array_equal(running["var"], arrays["conv5_block1_3_bn/moving_variance"])
    assert set(report.loaded) == set(arrays)
    for tree, old, new in zip(net, before, (params, stats), strict=True):
        now = leaves(tree)
        assert set(leaves(new)) == set(old) == set(now)
        assert all(np.array_equal(now[k], old[k]) for k in old)


def test_head_keeps_its_initial_values_and_says_so(arrays, net):
    params, _, report = load(arrays, net)
    for layer in ("hidden", "predictions"):
        np.testing.assert_array_equal(
            params["head"][layer]["kernel"], net[0]["head"][layer]["kernel"]
        )
    assert set(report.initialised) == {
        f"{la}/{a}" for la in ("hidden", "predictions") for a in ("kernel", "bias")
    }
    assert "initialised all of head (4)" in report.summary()


def test_imagenet_head_is_set_aside_by_name(arrays, net):
    params, _, report = load(arrays | random(HEAD), net)
    assert set(report.set_aside) == set(HEAD)
    assert all(n in report.summary() for n in HEAD)
    assert params["head"]["predictions"]["kernel"].shape == (8, 4)


def test_half_a_head_is_set_aside(arrays, net):
    """Also where the bias alone would fit: a bias without its kernel means nothing."""
    _, _, report = load(arrays | random({"predictions/bias": (4,)}), net)
    assert report.set_aside == ("predictions/bias",)
    assert "predictions/bias" in report.initialised


def test_whole_head_of_equal_shape_is_loaded(arrays, net):
    head = random(
        {
            "hidden/kernel": (512, 8),
            "hidden/bias": (8,),
            "predictions/kernel": (8, 4),
            "predictions/bias": (4,),
        }
    )
    params, _, report = load(arrays | head, net)
    np.testing.assert_array_equal(params["head"]["hidden"]["kernel"], head["hidden/kernel"])
    assert report.initialised == report.set_aside == ()


@pytest.mark.parametrize("name", ["conv1_conv/bias", "conv4_block1_2_bn/moving_variance"])
def test_missing_is_refused_with_the_opt_in(arrays, net, name):
    del arrays[name]
    message = refusal(arrays, net)
    stage = name.split("_")[0]
    assert f"1 missing ({name})" in message and "w.npz" in message
    assert message.endswith(f"(converter: --may_miss): {stage}")


def test_spare_is_refused(arrays, net):
    assert "1 spare (dense/kernel)" in refusal(arrays | random({"dense/kernel": (8, 4)}), net)
    assert "conv2_block2_1_conv/kernel" in refusal(
        arrays | random({"conv2_block2_1_conv/kernel": (1, 1, 64, 16)}), net
    )


@pytest.mark.parametrize("shape", [(3, 3, 16, 17), (16, 16, 3, 3), (16,), ()])
def test_misshapen_is_refused(arrays, net, shape):
    name = "conv2_block1_2_conv/kernel"
    message = refusal(arrays | random({name: shape}), net)
    assert f"1 misshapen ({name} " in message and "needed 3x3x16x16" in message


def test_all_problems_in_one_line(arrays, net):
    for unit in (0, 1, 2, 3):
        for array in ("gamma", "beta"):
            del arrays[f"conv3_block1_{unit}_bn/{array}"]
    arrays |= random({"extra/kernel": (1,), "conv1_conv/bias": (5,)})
    message = refusal(arrays, net)
    assert "8 missing" in message and "and 3 more" in message
    assert "1 spare (extra/kernel)" in message
    assert "1 misshapen (conv1_conv/bias 5, needed 16)" in message


def test_opt_in_loads_what_is_there(arrays, net):
    kept = dict(arrays)
    del kept["conv5_block1_2_conv/kernel"]
    params, stats, report = load(kept, net, may_miss=("conv5",))
    unit = params["conv5"]["block1"]["unit2"]
    initial = net[0]["conv5"]["block1"]["unit2"]["conv"]["kernel"]
    np.testing.assert_array_equal(unit["conv"]["kernel"], initial)
    np.testing.assert_array_equal(unit["bn"]["scale"], kept["conv5_block1_2_bn/gamma"])
    assert [n for n in report.initialised if n.startswith("conv")] == ["conv5_block1_2_conv/kernel"]
    assert "initialised 1 of conv5 (conv5_block1_2_conv/kernel)" in report.summary()


def test_opt_in_with_the_stage_wholly_absent(arrays, net):
    kept = {n: v for n, v in arrays.items() if not n.startswith("conv5")}
    _, _, report = load(kept, net, may_miss=("conv5",))
    assert "initialised all of conv5 (24)" in report.summary()


def test_opt_in_covers_its_stage_alone_and_absence_alone(arrays, net):
    del arrays["conv4_block1_2_conv/kernel"]
    assert "conv4_block1_2_conv/kernel" in refusal(arrays, net, may_miss=("conv5",))
    arrays["conv4_block1_2_conv/kernel"] = np.ones((1, 1, 1, 1), np.float32)
    assert "misshapen" in refusal(arrays, net, may_miss=("conv4",))


@pytest.mark.parametrize("stage", ["conv6", "head", "pool", "conv5_block1", ""])
def test_unknown_stage(arrays, net, stage):
    message = refusal(arrays, net, may_miss=(stage,))
    assert repr(stage) in message and "conv1, conv2, conv3, conv4, conv5" in message


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("resnet50", "resnet50_v1_5"),
        ("resnet50_v1_5", "resnet50"),
        ("resnet14_small", "resnet50"),
        ("resnet50", "resnet14_small"),
    ],
)
def test_another_networks_weights_are_recognised(model_trees, leaves, given, model):
    def trees(name):
        return model_trees(name, num_classes=4)[1:]

    arrays = {
        keras_name(path): np.broadcast_to(np.float32(0), leaf.shape)
        for tree in trees(given)
        for path, leaf in leaves(tree).items()
    }
    assert f"these look like {given} weights" in refusal(arrays, trees(model))
