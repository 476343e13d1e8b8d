"""The table of names against Keras's ResNet50 and the model's own trees."""

import pytest

from covid_flax.models import MODELS
from covid_flax.pretrained.names import keras_name


def test_every_array_of_the_model_has_its_name_in_keras(keras_resnet50, model_trees, leaves):
    _, params, stats = model_trees("resnet50", num_classes=10, hidden_units=0)
    ours = {
        keras_name(path): leaf.shape
        for tree in (params, stats)
        for path, leaf in leaves(tree).items()
    }
    theirs = {f"{la.name}/{w.name}": w.shape for la in keras_resnet50.layers for w in la.weights}
    assert ours == theirs
    assert len(ours) == 320


def test_batch_norm_s_epsilon_is_keras_s(keras_resnet50):
    """Outputs do not show it where variances are about one."""
    theirs = {layer.epsilon for layer in keras_resnet50.layers if hasattr(layer, "epsilon")}
    assert theirs == {MODELS["resnet50"].epsilon}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("conv1_conv/kernel", "conv1/conv/kernel"),
        ("conv1_bn/moving_mean", "conv1/bn/mean"),
        ("conv2_block1_0_conv/bias", "conv2/block1/unit0/conv/bias"),
        ("conv4_block6_3_bn/gamma", "conv4/block6/unit3/bn/scale"),
        ("conv4_block6_3_bn/beta", "conv4/block6/unit3/bn/bias"),
        ("conv3_block12_2_bn/moving_variance", "conv3/block12/unit2/bn/var"),
        ("hidden/kernel", "head/hidden/kernel"),
        ("predictions/bias", "head/predictions/bias"),
    ],
)
def test_the_table(name, path):
    assert keras_name(tuple(path.split("/"))) == name


@pytest.mark.parametrize("path", ["conv1/conv/scale", "conv2/unit0/conv/kernel", "head/kernel"])
def test_other_paths_are_refused(path):
    with pytest.raises(KeyError):
        keras_name(tuple(path.split("/")))
