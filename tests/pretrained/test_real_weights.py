"""Real ImageNet weights on natural photographs. Needs the files of COVID_FLAX_SHARED."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from covid_flax.errors import UserError
from covid_flax.models.preprocess import preprocess
from covid_flax.pretrained.load import load_weights
from covid_flax.pretrained.read import read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Photographs inside the scikit-image wheel, and ImageNet's classes (by index) for them.
PHOTOGRAPHS = {
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {967, 968, 504},  # espresso, cup, coffee mug
    "rocket.jpg": {657, 744},  # missile, projectile
}


def photograph(name, side=224):
    """Short side to 8/7 of `side` (256), the middle `side` pixels: ImageNet's usual evaluation."""
    import skimage
    from PIL import Image

    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    scale = side * 8 / 7 / min(image.size)
    image = image.resize([round(s * scale) for s in image.size], Image.Resampling.BILINEAR)
    left, top = ((s - side) // 2 for s in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def test_complete_v1_5_recognises_photographs(shared_weights, model_trees):
    path = shared_weights("resnet50_torchvision_v15_PQF_large_imagenet.npz")
    graph, *trees = model_trees("resnet50_v1_5", num_classes=1000, hidden_units=0)
    params, stats, report = load_weights(read_weights(path), *trees, source=str(path))
    assert len(report.loaded) == 267
    assert report.initialised == report.set_aside == ()

    @jax.jit
    def forward(params, stats, images):
        return nnx.merge(graph, params, stats)(preprocess(images, "torch"))

    images = np.stack([photograph(n) for n in PHOTOGRAPHS])
    logits = np.asarray(forward(params, stats, images))
    for name, row in zip(PHOTOGRAPHS, logits, strict=True):
        assert int(row.argmax()) in PHOTOGRAPHS[name], (name, row.argsort()[::-1][:5])


def test_partial_keras_weights_with_and_without_opt_in(shared_weights, model_trees):
    path = shared_weights("resnet50_v1_keras_caffe_PARTIAL_no_conv5.npz")
    arrays = read_weights(path)
    _, *trees = model_trees("resnet50", num_classes=4)
    with pytest.raises(
        UserError, match=r"9 missing \(conv5_block1_0_conv/kernel, .*may_miss.: conv5$"
    ):
        load_weights(arrays, *trees, source=str(path))
    params, stats, report = load_weights(arrays, *trees, source=str(path), may_miss=("conv5",))
    first = [n for n in report.initialised if n.startswith("conv5")]
    assert len(first) == 9 and all(n.endswith("_conv/kernel") for n in first)
    assert "conv5_block1_1_conv/kernel" not in first  # the tenth, which the file has
    assert len([n for n in report.initialised if not n.startswith("conv5")]) == 4  # the head
    assert report.set_aside == ("predictions/bias",)
    with np.load(path) as npz:
        np.testing.assert_array_equal(params["conv1"]["conv"]["kernel"], npz["conv1_conv/kernel"])
        np.testing.assert_array_equal(
            stats["conv5"]["block3"]["unit3"]["bn"]["var"], npz["conv5_block3_3_bn/moving_variance"]
        )
    with pytest.raises(UserError, match="these look like resnet50 weights"):
        _, *other = model_trees("resnet50_v1_5", num_classes=4)
        load_weights(arrays, *other, source=str(path), may_miss=("conv5",))
