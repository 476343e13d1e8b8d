"""Every layout, from Keras's own file to our logits, against Keras's logits.

The `_0_` and `_3_` arrays of a stage's first block have equal shapes, so only the numbers
can tell them apart. The last tests show that these numbers do.
"""

import h5py
import jax
import numpy as np
import pytest
from flax import nnx

from covid_flax.pretrained.load import load_weights
from covid_flax.pretrained.read import read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A colour image: its channels differ, so their order counts.
IMAGE = np.random.default_rng(3).normal([1, 0, -1], 1, (1, 64, 64, 3)).astype(np.float32)
FIRST_BLOCKS = ["conv2_block1", "conv3_block1", "conv4_block1", "conv5_block1"]


@pytest.fixture(scope="module")
def expected(keras_resnet50):
    return keras_resnet50.predict(IMAGE, verbose=0)


@pytest.fixture(scope="module")
def arrays(keras_resnet50):
    return {
        f"{la.name}/{w.name}": np.asarray(w) for la in keras_resnet50.layers for w in la.weights
    }


@pytest.fixture(scope="module")
def logits(model_trees):
    graph, *trees = model_trees("resnet50", num_classes=10, hidden_units=0)

    @jax.jit
    def forward(params, stats):
        return nnx.merge(graph, params, stats)(IMAGE)

    def run(arrays):
        params, stats, report = load_weights(arrays, *trees, source="test")
        assert len(report.loaded) == 320
        return np.asarray(forward(params, stats))

    return run


def relative_error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("layout", ["keras3", "keras_legacy", "official", "npz"])
def test_logits_equal_keras(
    keras_resnet50, arrays, expected, logits, write_official_h5, tmp_path, layout
):
    path = tmp_path / ("net.weights.h5" if layout == "keras3" else "net")
    if layout == "keras3":
        keras_resnet50.save_weights(path)
    elif layout == "keras_legacy":
        from keras.src.legacy.saving import legacy_h5_format

        with h5py.File(path, "w") as f:
            legacy_h5_format.save_weights_to_hdf5_group(f, keras_resnet50)
    elif layout == "official":
        write_official_h5(path, arrays)
    else:
        with path.open("wb") as f:
            np.savez(f, **arrays)
    assert relative_error(logits(read_weights(path)), expected) < 1e-5


@pytest.mark.parametrize("block", FIRST_BLOCKS)
@pytest.mark.parametrize("layer", ["conv", "bn"])
def test_a_swap_of_equal_shapes_is_caught(arrays, expected, logits, block, layer):
    """It loads without complaint, and the comparison above would fail a thousandfold.

    Swapping the two betas alone changes nothing, since the block adds them.
    """
    swapped = dict(arrays)
    for name in [n for n in arrays if n.startswith(f"{block}_0_{layer}/")]:
        other = name.replace(f"{block}_0_", f"{block}_3_")
        # Beyond conv2 the kernels differ in shape, so a swap of them is refused; biases remain.
        if arrays[name].shape == arrays[other].shape:
            swapped[name], swapped[other] = arrays[other], arrays[name]
    assert relative_error(logits(swapped), expected) > 1e-2
