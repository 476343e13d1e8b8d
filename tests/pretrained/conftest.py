"""The judge: Keras's own ResNet50 with random weights, and files as Keras writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest
from flax import nnx

from covid_flax.models import MODELS, ResNet


def random_like(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A value for the Keras array `name` under which activations stay near one.

    If they grew from block to block, as with gammas near one everywhere, a wrong bias would
    drown in them: its trace in the logits would be below rounding.
    """
    layer, array = name.split("/")
    if array == "kernel":
        fan_in = np.prod(shape[:-1])
        return rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
    if array in ("gamma", "moving_variance"):
        residual = 0.3 if array == "gamma" and layer.endswith("_3_bn") else 1.0
        return (residual * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    return rng.normal(0, 0.3, shape).astype(np.float32)


@pytest.fixture(scope="session")
def keras_resnet50() -> Any:
    """`keras.applications.ResNet50`, 10 classes, 64 px, logits, everything random."""
    from keras_judge import keras

    network = keras.applications.ResNet50(
        weights=None, classes=10, input_shape=(64, 64, 3), classifier_activation=None
    )
    rng = np.random.default_rng(0)
    for layer in network.layers:
        layer.set_weights(
            [random_like(f"{layer.name}/{w.name}", w.shape, rng) for w in layer.weights]
        )
    return network


@pytest.fixture(scope="session")
def write_official_h5() -> Callable[[Path, dict[str, np.ndarray]], None]:
    """Writes the layout of Keras's published files: `layer/layer/array:0` and its attributes."""

    def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
        layers = list(dict.fromkeys(name.rpartition("/")[0] for name in arrays))
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = [layer.encode() for layer in layers]
            file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.2.4"
            for layer in layers:
                names = [f"{n}:0" for n in arrays if n.rpartition("/")[0] == layer]
                group = file.require_group(layer)
                group.attrs["weight_names"] = [n.encode() for n in names]
                for n in names:
                    group[n] = arrays[n.removesuffix(":0")]

    return write


@pytest.fixture(scope="session")
def model_trees() -> Callable[..., tuple[Any, dict, dict]]:
    """Graph and trees of a network, whose leaves are shapes alone: they cost nothing."""

    def make(name: str, **kw: Any) -> tuple[Any, dict, dict]:
        model = nnx.eval_shape(lambda: ResNet(MODELS[name], rngs=nnx.Rngs(0), **kw))
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    return make


@pytest.fixture(scope="session")
def shared_weights() -> Callable[[str], Path]:
    """Path of a real weight file, or a skip."""
    root = Path(__file__).parents[2]
    folder = root / os.environ.get("COVID_FLAX_SHARED", "../shared") / "weights"

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"real weights {name} are not in COVID_FLAX_SHARED")
        return folder / name

    return find


@pytest.fixture(scope="session")
def leaves() -> Callable[[dict], dict[tuple[str, ...], Any]]:
    """Flat view of a tree, by path."""

    def flat(tree: dict) -> dict[tuple[str, ...], Any]:
        return {
            tuple(k.key for k in path): v
            for path, v in jax.tree_util.tree_flatten_with_path(tree)[0]
        }

    return flat
