"""Reading: the layouts as Keras writes them, and files that are none of them."""

import re
import zipfile

import h5py
import jax
import numpy as np
import pytest

from covid_flax.errors import UserError
from covid_flax.models import create_model
from covid_flax.pretrained.load import array_paths, load_weights
from covid_flax.pretrained.read import read_weights
from ml_collections_configs import base


@pytest.fixture(scope="module")
def small():
    """A trained Keras network with ResNet's layer names, and what Keras says it holds."""
    from keras_judge import keras

    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv1_conv"),
            layers.BatchNormalization(name="conv1_bn"),
            layers.Conv2D(4, 3, use_bias=False, name="conv2_block1_1_conv"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4, name="predictions"),
        ],
        name="small",
    )
    network.compile("adam", "mse")
    rng = np.random.default_rng(0)
    network.fit(rng.normal(size=(8, 8, 8, 3)), rng.normal(size=(8, 4)), verbose=0)
    arrays = {f"{la.name}/{w.name}": np.asarray(w) for la in network.layers for w in la.weights}
    return network, arrays


def same(read, arrays):
    assert set(read) == set(arrays)
    for name, value in arrays.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_keras3_weights_with_optimizer_state(small, tmp_path):
    network, arrays = small
    network.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as f:
        assert "optimizer" in f  # else the test would not show that it is left out
    same(read_weights(tmp_path / "a.weights.h5"), arrays)


def test_whole_model_h5(small, tmp_path):
    network, arrays = small
    network.save(tmp_path / "a.h5")
    same(read_weights(tmp_path / "a.h5"), arrays)


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_network_inside_another(small, tmp_path, suffix):
    from keras_judge import keras

    network, arrays = small
    outer = keras.Sequential([keras.Input((8, 8, 3)), network, keras.layers.Dense(2, name="top")])
    path = tmp_path / f"a{suffix}"
    outer.save_weights(path) if suffix == ".weights.h5" else outer.save(path)
    top = {f"top/{w.name}": np.asarray(w) for w in outer.layers[-1].weights}
    same(read_weights(path), arrays | top)


def test_official_h5_is_what_keras_loads(small, tmp_path, write_official_h5):
    """The hand-written layout of the published files is checked by Keras's own loader."""
    from keras_judge import keras

    network, arrays = small
    write_official_h5(tmp_path / "a.h5", arrays)
    same(read_weights(tmp_path / "a.h5"), arrays)
    copy = keras.models.clone_model(network)
    copy.load_weights(tmp_path / "a.h5", by_name=True)
    for layer in copy.layers:
        for w in layer.weights:
            np.testing.assert_array_equal(np.asarray(w), arrays[f"{layer.name}/{w.name}"])


def test_npz_by_content_not_suffix_and_half_precision(tmp_path):
    values = {"a/kernel": np.float16([[1.5, -2]]), "a/bias": np.float64([0.1])}
    with (tmp_path / "a.h5").open("wb") as f:
        np.savez_compressed(f, **values)
    read = read_weights(tmp_path / "a.h5")
    same(read, {k: v.astype(np.float32) for k, v in values.items()})


def refused(path, *words):
    with pytest.raises(UserError) as e:
        read_weights(path)
    message = str(e.value)
    assert "\n" not in message and path.name in message
    for word in words:
        assert word in message, message


def test_files_that_are_no_weights(small, tmp_path):
    network, _ = small
    refused(tmp_path / "none.h5", "no such")
    refused(tmp_path, "folder")
    (tmp_path / "empty.h5").touch()
    refused(tmp_path / "empty.h5", "empty")
    (tmp_path / "text.h5").write_text("<!DOCTYPE html><html>not found</html>")
    refused(tmp_path / "text.h5", "neither")
    network.save(tmp_path / "a.keras")
    refused(tmp_path / "a.keras", "whole Keras model", "save_weights")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as z:
        z.writestr("readme.txt", "hello")
    refused(tmp_path / "z.npz", "no npz")
    np.savez(tmp_path / "nothing.npz")
    refused(tmp_path / "nothing.npz", "holds no weights")
    with h5py.File(tmp_path / "nothing.h5", "w"):
        pass
    refused(tmp_path / "nothing.h5", "holds no weights")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.97, 0.999])
def test_truncated(small, tmp_path, share):
    network, arrays = small
    network.save_weights(tmp_path / "a.weights.h5")
    np.savez(tmp_path / "b.npz", **arrays)
    for path in (tmp_path / "a.weights.h5", tmp_path / "b.npz"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "truncated, damaged")


def test_damaged_inside_npz(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **{"a/kernel": np.arange(5000.0)})
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", "truncated, damaged")


def test_arrays_that_are_no_weights(tmp_path):
    good = {"a/kernel": np.ones((2, 2), np.float32)}
    bad = {
        "int": np.arange(3),
        "object": np.array([{}], object),
        "nan": np.float32([np.nan]),
        "inf": np.float64([1e300]),  # finite, but not in float32
    }
    for kind, value in bad.items():
        np.savez(tmp_path / f"{kind}.npz", **good, **{"b/bias": value})
    refused(tmp_path / "int.npz", "b/bias", "float")
    refused(tmp_path / "object.npz", "Object arrays")
    refused(tmp_path / "nan.npz", "b/bias", "finite")
    refused(tmp_path / "inf.npz", "b/bias", "finite")
    with h5py.File(tmp_path / "text.h5", "w") as f:
        f["a/kernel"] = "words"
    refused(tmp_path / "text.h5", "a/kernel", "float")


def test_keras3_without_layer_names(small, tmp_path):
    network, _ = small
    path = tmp_path / "a.weights.h5"
    network.save_weights(path)
    with h5py.File(path, "a") as f:
        del f["layers/conv2d/vars"].attrs["name"]
    refused(path, "layers/conv2d/vars", "no layer name")


def test_keras3_layer_of_another_kind(tmp_path):
    from keras_judge import keras

    network = keras.Sequential([keras.Input((5, 3)), keras.layers.LSTM(2, name="memory")])
    network.save_weights(tmp_path / "a.weights.h5")
    refused(tmp_path / "a.weights.h5", "another network")


MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("name", ["normalization", "normalization_1"])  # of a session's second
def test_what_keras_s_normalization_holds(name, suffix, tmp_path):
    from keras_judge import keras

    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Normalization(name=name),
            layers.Conv2D(4, 3, name="stem_conv"),
        ]
    )
    kernel, bias = network.get_layer("stem_conv").get_weights()
    network.get_layer(name).set_weights([np.array(MEAN), np.array(DEVIATION), np.array(7)])
    (network.save if suffix == ".h5" else network.save_weights)(tmp_path / f"a{suffix}")
    read = read_weights(tmp_path / f"a{suffix}")
    assert set(read) == {f"{name}/{k}" for k in ("mean", "variance")} | {
        "stem_conv/kernel",
        "stem_conv/bias",
    }
    np.testing.assert_allclose(np.ravel(read[f"{name}/mean"]), MEAN, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(read[f"{name}/variance"]), DEVIATION, rtol=1e-6)


def test_what_a_file_says_of_its_input_is_checked():
    config = base.get_config().model
    config.name, config.hidden_units = "efficientnet_b0", 0
    _, params, stats = jax.eval_shape(lambda: create_model(config, 4, 0))
    shapes = dict(zip(array_paths(params, stats), jax.tree.leaves([params, stats]), strict=True))
    arrays = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    said = {"normalization/mean": np.array(MEAN), "normalization/variance": np.array(DEVIATION)}
    report = load_weights(arrays | said, params, stats, source="a.h5")[2]
    assert len(report.loaded) == len(arrays)
    numbered = {n.replace("normalization/", "normalization_1/"): v for n, v in said.items()}
    assert load_weights(arrays | numbered, params, stats, source="a.h5")[2] == report
    for wrong in (
        {"normalization/mean": np.array(DEVIATION)},
        {"normalization/variance": np.square(DEVIATION)},
        {"normalization/mean": np.zeros(4)},
        {"normalization_2/mean": np.zeros(1)},
    ):
        with pytest.raises(
            UserError, match=r"a\.h5: normalization\w*/\w+ is .*another preprocessing"
        ):
            load_weights(arrays | said | wrong, params, stats, source="a.h5")


def test_an_array_without_a_layer_keeps_its_name(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["kernel:0"] = np.ones(2, np.float32)
    assert set(read_weights(tmp_path / "a.h5")) == {"kernel"}


def test_same_layer_name_twice(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["one/conv1_conv/kernel:0"] = np.ones(2, np.float32)
        f["two/conv1_conv/kernel:0"] = np.ones(2, np.float32)
    refused(tmp_path / "a.h5", "conv1_conv/kernel twice")


def _keras2_layer(name, network):
    """The layer's name in Keras 2, whose published files are still what is downloaded."""
    if network == "densenet121":
        return name.replace("conv1_", "conv1/") if name in ("conv1_conv", "conv1_bn") else name
    if network == "mobilenet_v2":  # all but the first and last layers, of 2018
        old = re.fullmatch(r"(?:expanded_conv|block_(\d+))_([a-z]+)(_BN)?", name)
        if old is None:
            return name
        i = old[1] or 0
        return f"bn{i}_conv_{i}_bn_{old[2]}" if old[3] else f"mobl{i}_conv_{i}_{old[2]}"
    block = re.fullmatch(r"(expanded_conv(?:_\d+)?)_(squeeze_excite|\w+?)_?(conv\w*|bn)?", name)
    if block is None:  # conv, conv_bn, conv_1, conv_1_bn
        return name.replace("conv", "Conv").replace("_bn", "/BatchNorm")
    parts = [
        block[1],
        block[2],
        (block[3] or "").replace("conv", "Conv").replace("bn", "BatchNorm"),
    ]
    return "/".join(filter(None, parts))


@pytest.mark.parametrize(
    "network",
    [pytest.param("densenet121", marks=pytest.mark.slow), "mobilenet_v2", "mobilenet_v3_small"],
)
def test_published_files_of_light_networks_name_layers_as_keras_2_did(
    network, write_official_h5, tmp_path
):
    config = base.get_config().model
    config.name, config.hidden_units = network, 0
    _, params, stats = jax.eval_shape(lambda: create_model(config, 4, 0))
    rng = np.random.default_rng(0)
    shapes = dict(zip(array_paths(params, stats), jax.tree.leaves([params, stats]), strict=True))
    arrays = {
        name: rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
        for name, leaf in shapes.items()
        if not name.startswith("predictions/")
    }
    old = {}
    for name, value in arrays.items():
        layer, _, array = name.partition("/")
        layer = _keras2_layer(layer, network)
        if layer.endswith(("/depthwise", "_depthwise")) and array == "kernel":
            array = "depthwise_kernel"
        old[f"{layer}/{array}"] = value
    assert len(old) == len(arrays) and old.keys() & {
        "conv1/bn/gamma",
        "expanded_conv_3/squeeze_excite/Conv_1/bias",
        "bn16_conv_16_bn_project/moving_mean",
    }
    path = tmp_path / "published.h5"
    write_official_h5(path, old)
    params, stats, report = load_weights(read_weights(path), params, stats, source="published")
    assert len(report.loaded) == len(arrays)
    loaded = dict(zip(array_paths(params, stats), jax.tree.leaves([params, stats]), strict=True))
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
