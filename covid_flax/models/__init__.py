"""The networks, by the names that `model.name` takes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from covid_flax.models.alexnet import ALEXNET, ALEXNET_SMALL, AlexNet, AlexNetSpec
from covid_flax.models.densenet import DENSENETS, DenseNet, DenseNetSpec
from covid_flax.models.efficientnet import EFFICIENTNETS, EfficientNet, EfficientNetSpec
from covid_flax.models.lenet import LENET5, LeNet, LeNetSpec
from covid_flax.models.mobilenet import MOBILENETS, MobileNet, MobileNetSpec
from covid_flax.models.resnet import RESNETS, ResNet, ResNetSpec

# Every spec says its network's `stages` in order of computation, the `preprocessing` it is
# meant for, and the sides of the images it was designed for (`native_size`) and of the
# `smallest` it takes.
MODELS: dict[
    str, ResNetSpec | LeNetSpec | AlexNetSpec | EfficientNetSpec | MobileNetSpec | DenseNetSpec
] = {
    **RESNETS,
    **EFFICIENTNETS,
    **MOBILENETS,
    **DENSENETS,
    "lenet5": LENET5,
    "alexnet": ALEXNET,
    "alexnet_small": ALEXNET_SMALL,
}

# Families that are made alike.
_LIGHT: dict[type, Any] = {
    EfficientNetSpec: EfficientNet,
    MobileNetSpec: MobileNet,
    DenseNetSpec: DenseNet,
}

__all__ = [
    "MODELS",
    "RESNETS",
    "AlexNet",
    "DenseNet",
    "EfficientNet",
    "LeNet",
    "MobileNet",
    "ResNet",
    "batch_stats_stages",
    "beginning_of",
    "create_model",
    "own_share_choices",
    "own_shares",
    "preprocessing_of",
    "stage_before",
    "trainable_choices",
    "trained_stages",
]


def create_model(config: Any, num_classes: int, seed: int) -> tuple[nnx.GraphDef, dict, dict]:
    """The configuration's `model` with random weights.

    Returns:
      The graph definition, the parameters and the batch statistics: nested dicts of
      arrays, by stage first. `nnx.merge` puts them together again.
    """
    spec = MODELS[config.name]
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "dropout_rate": config.dropout,
        "dtype": jnp.dtype(config.dtype),
        "rngs": nnx.Rngs(params=seed),
    }
    model: nnx.Module
    if isinstance(spec, LeNetSpec):
        model = LeNet(spec, **common)
    elif isinstance(spec, AlexNetSpec):
        model = AlexNet(spec, **common)
    else:
        common |= {"hidden_units": config.hidden_units, "momentum": config.bn_momentum}
        if isinstance(spec, ResNetSpec):
            model = ResNet(spec, remat=config.remat == "block", **common)
        else:
            model = _LIGHT[type(spec)](spec, **common)
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def beginning_of(config: Any) -> Any | None:
    """The configuration's `model` for the network whose first layers its own are; None: none."""
    whole = getattr(MODELS[config.name], "beginning_of", "")
    if not whole:
        return None
    other = config.copy_and_resolve_references()
    other.name = whole
    return other


def preprocessing_of(config: Any) -> str:
    """The configuration's preprocessing, or what the network's weights were trained with."""
    return config.preprocessing or MODELS[config.name].preprocessing


def stage_before(config: Any, stage: str) -> str | None:
    """The stage of the configuration's network whose output `stage` takes; None: images."""
    stages = MODELS[config.name].stages
    return stages[stages.index(stage) - 1] if stage != stages[0] else None


def trainable_choices(name: str) -> tuple[str, ...]:
    """What `model.trainable` may be for a network: `all`, or a stage that has parameters."""
    return ("all", *(stage for stage in MODELS[name].stages[1:] if stage != "pool"))


def trained_stages(config: Any) -> tuple[str, ...]:
    """The stages that `model.trainable` trains, in order; the others are frozen."""
    stages = MODELS[config.name].stages
    return stages if config.trainable == "all" else stages[stages.index(config.trainable) :]


def batch_stats_stages(config: Any) -> frozenset[str]:
    """The stages of the configuration's `model` whose batch norm uses and updates the batch's.

    Frozen ones run as in inference, as Keras's `trainable=False` layers do.
    """
    return frozenset(trained_stages(config) if config.batch_norm == "train" else ())


def own_share_choices(name: str) -> tuple[str, ...]:
    """What `eval.bn_own_until` may be for a network: empty, or a stage before pooling."""
    return ("", *(stage for stage in MODELS[name].stages if stage not in ("pool", "head")))


def own_shares(config: Any) -> dict[str, float]:
    """By stage, the share of an image's own moments in batch norm's when an image is scored.

    Args:
      config: the whole of it: `eval` says how much and until which stage.
    """
    if not config.eval.bn_own_share:
        return {}
    _, *stages = own_share_choices(config.model.name)
    until = config.eval.bn_own_until
    last = stages.index(until) if until else len(stages) - 1
    return dict.fromkeys(stages[: last + 1], config.eval.bn_own_share)
