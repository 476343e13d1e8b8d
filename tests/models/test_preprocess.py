"""Judge: Keras's `imagenet_utils.preprocess_input`."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras.src.applications.imagenet_utils import preprocess_input

from covid_flax.models import preprocessing_of
from covid_flax.models.preprocess import preprocess
from ml_collections_configs import base


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)


@pytest.mark.parametrize("mode", ["caffe", "torch", "tf"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_modes_equal_keras(images, mode, dtype):
    x = images.astype(dtype)
    got = preprocess(x, mode)
    want = preprocess_input(images.astype(np.float32), data_format="channels_last", mode=mode)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, images)  # Keras's writes into its argument


def test_unit_is_division_by_255(images):
    got = preprocess(images, "unit")
    np.testing.assert_allclose(got, images.astype(np.float64) / 255, rtol=1e-6)


def test_lite_and_standard_are_arithmetic(images):
    x = images.astype(np.float64)
    np.testing.assert_allclose(preprocess(images, "lite"), (x - 127) / 128, rtol=1e-6)
    mean, deviation = (f(x, (1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    got = preprocess(images, "standard")
    np.testing.assert_allclose(got, (x - mean) / deviation, rtol=1e-5, atol=1e-5)
    brighter = preprocess(images * 0.5 + 20.0, "standard")
    np.testing.assert_allclose(brighter, got, rtol=1e-4, atol=1e-5)
    assert np.all(preprocess(np.full((1, 4, 4, 3), 93, np.uint8), "standard") == 0)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="bgr"):
        preprocess(np.zeros((1, 1, 1, 3)), "bgr")


@pytest.mark.parametrize("mode", ["unit", "caffe", "torch", "tf", "lite", "standard"])
def test_one_grey_channel_counts_as_three_equal_ones(images, mode):
    grey = images[..., :1]
    want = preprocess(np.repeat(grey, 3, -1), mode)
    np.testing.assert_array_equal(preprocess(grey, mode), want)
    assert want.shape == images.shape


def _efficientnet_input(x):
    """Of Keras's EfficientNet with ImageNet weights: the last layer undoes a wrong variance."""
    deviation = np.array([0.229, 0.224, 0.225])
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.Normalization(mean=[0.485, 0.456, 0.406], variance=deviation)(x)
    return keras.layers.Rescaling((1 / np.sqrt(deviation)).tolist())(x)


@pytest.mark.parametrize(
    ("names", "judge"),
    [
        ("resnet50", keras.applications.resnet.preprocess_input),
        ("mobilenet_v2", keras.applications.mobilenet_v2.preprocess_input),
        ("densenet121", keras.applications.densenet.preprocess_input),
        ("resnet50_v1_5", keras.applications.densenet.preprocess_input),  # torchvision's
        (
            "efficientnet_lite0 efficientnet_lite1 efficientnet_lite2 efficientnet_lite0_small",
            keras.layers.Rescaling(1 / 128, -127 / 128),
        ),
        ("mobilenet_v3_small mobilenet_v3_large", keras.layers.Rescaling(1 / 127.5, -1.0)),
        (
            "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3",
            _efficientnet_input,
        ),
    ],
)
def test_a_network_s_own_is_what_its_weights_were_trained_with(images, names, judge):
    want = np.asarray(judge(images.astype(np.float32)))
    for name in names.split():
        config = base.get_config().model
        config.name = name
        got = preprocess(images, preprocessing_of(config))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
        config.preprocessing = "unit"
        assert preprocessing_of(config) == "unit"
