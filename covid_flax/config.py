"""From the command line to a checked configuration, and to JSON and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from covid_flax.data.decode import INTERPOLATIONS
from covid_flax.data.splits import RULES
from covid_flax.errors import UserError
from covid_flax.models import MODELS, RESNETS, own_share_choices, trainable_choices
from covid_flax.models.preprocess import MODES
from ml_collections_configs import base

_CHOICES = {
    "data.split": RULES,
    "data.interpolation": tuple(INTERPOLATIONS),
    "data.on_bad_image": ("refuse", "skip"),
    "data.on_device": ("auto", "always", "never"),
    "model.name": tuple(MODELS),
    "model.preprocessing": ("", *MODES),
    "model.batch_norm": ("train", "frozen"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block"),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.epsilon_mode": ("keras", "optax"),
    "train.last_batch": ("keep", "drop"),
    "train.monitor": ("val_loss", "val_accuracy"),
    "train.class_weights": ("none", "balanced"),
    "train.on_non_finite": ("stop", "skip"),
    "train.parallel": ("jit", "pmap"),
}
# Least allowed value, greatest, or None.
_RANGES: dict[str, tuple[float, float | None]] = {
    "seed": (0, 2**32 - 1),
    "data.phantoms_per_class": (0, None),
    "repeats": (1, 1000),
    "data.folds": (0, 1000),
    "data.fold": (-1, 999),
    "data.split_seed": (-1, 2**32 - 1),
    "data.val_fraction": (0, 1),
    "data.test_fraction": (0, 1),
    "data.image_size": (32, 4096),
    "data.intermediate_size": (0, 4096),
    "data.num_threads": (0, 1024),
    "data.prefetch": (1, 4096),
    "data.store_gb": (0, None),
    "model.hidden_units": (0, None),
    "model.dropout": (0, 0.999),
    "model.bn_momentum": (0, 1),
    "optimizer.learning_rate": (0, None),
    "optimizer.warmup_epochs": (0, 10_000),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999),  # 0.99999999 is 1 in float32: no update at all
    "optimizer.epsilon": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.stage_decay": (0, 1),
    "optimizer.clip_norm": (0, None),
    "train.epochs": (1, None),
    "train.batch_size": (1, None),
    "train.patience": (0, None),
    "train.min_delta": (0, None),
    "train.label_smoothing": (0, 0.999),
    "train.checkpoint_every_steps": (0, None),
    "train.log_every_steps": (1, None),
    "train.micro_batch": (0, None),
    "train.ema_decay": (0, 0.999999),
    "train.swa_start": (0, None),
    "train.start_share": (0, 0.99),
    "train.teacher_weight": (0, 1),
    "train.teacher_temperature": (0.1, 100),
    "train.recalibrate": (0, None),
    "train.feature_cache_gb": (0, None),
    "train.feature_disk_gb": (0, None),
    "augment.shift": (0, 1),
    "augment.rotate": (0, 180),
    "augment.scale": (0, 0.99),
    "augment.aspect": (0, 1),
    "augment.style": (0, 1),
    "augment.brightness": (0, 1),
    "augment.contrast": (0, 3),
    "augment.gamma": (0, 3),
    "augment.blur": (0, 10),
    "augment.noise": (0, 1),
    "augment.erase": (0, 1),
    "augment.border": (0, 0.45),
    "augment.mixup": (0, 10),
    "augment.cutmix": (0, 10),
    "eval.batch_size": (1, None),
    "eval.aspect": (0, 1),
    "eval.bn_own_share": (0, 1),
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"data.dir": ..., ...}` from nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def changes(before: Any, after: Any, defaults: Any) -> dict[str, str]:
    """By key what differs between nested mappings: `key was 1, now 2`.

    Args:
      defaults: what keys have that `before` lacks.
    """
    was, now = flatten(defaults) | flatten(before), flatten(after)
    return {
        key: f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }


def check_keys(config: Any, file: str) -> None:
    """Refuses what is not built on `base.get_config()`, as another's file may be. UserError."""
    known = flatten(base.get_config())
    try:
        found = flatten(config) if hasattr(config, "items") else {}
    except OSError as e:  # of the file itself, as ml_collections tells it: where the keys are asked
        raise UserError(
            f"--config={file}: {e.filename or e}: {e.strerror or 'cannot be read'}: put the file "
            "that it starts from beside it"
        ) from e
    strange = sorted(known.keys() ^ found.keys())
    if strange or not isinstance(config, ml_collections.ConfigDict):
        what = f" ({strange[0]}, {len(strange):,} keys in all)" if strange else ""
        raise UserError(
            f"--config={file} has not the keys of ml_collections_configs/base.py{what}: let "
            "get_config() begin with base.get_config()"
        )


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that no run could use, naming the key. Raises UserError."""
    flat = flatten(config)
    for key, choices in _CHOICES.items():
        _check_choice(key, flat[key], choices)
    for key, (low, high) in _RANGES.items():
        if not low <= flat[key] <= (sys.float_info.max if high is None else high):
            bound = f"of at least {low}, finite" if high is None else f"from {low} to {high}"
            raise UserError(f"config.{key}={flat[key]!r}: set a value {bound}")
    if 0 < flat["data.intermediate_size"] < 32:
        raise UserError(
            f"config.data.intermediate_size={flat['data.intermediate_size']}: set a side in pixels "
            "of at least 32, or 0"
        )
    if (flat["data.split"] == "file") != bool(flat["data.split_file"]):
        raise UserError(
            "config.data.split=file and config.data.split_file=CSV go together: set both, or "
            "neither"
        )
    if flat["data.folds"] > 1 and flat["data.split"] != "grouped":
        raise UserError(
            f"config.data.folds={flat['data.folds']} needs data.split=grouped: set that"
        )
    if flat["train.swa_start"] and flat["train.ema_decay"]:
        raise UserError(
            "config.train.swa_start and train.ema_decay each say which weights are evaluated: "
            "set one of them to 0"
        )
    if flat["train.swa_start"] >= flat["train.epochs"]:
        raise UserError(
            f"config.train.swa_start={flat['train.swa_start']}: after train.epochs="
            f"{flat['train.epochs']} there is nothing to average: set a smaller one, or 0"
        )
    if flat["train.start_share"] and not keeps_averages(config):
        raise UserError(
            "config.train.start_share is the first weights' share beside an average: set "
            "train.swa_start or train.ema_decay too"
        )
    if flat["data.fold"] >= 0 and flat["data.folds"] < 2:
        raise UserError(
            f"config.data.fold={flat['data.fold']} is one of data.folds={flat['data.folds']}: set "
            "how many there are, or data.fold=-1"
        )
    _check_network(flat["model.name"], flat)


def is_cross_validation(data: Mapping[str, Any]) -> bool:
    """Whether a configuration's `data` asks for a run on every fold."""
    return data["folds"] > 1 and data["fold"] < 0


def is_repeated(config: ml_collections.ConfigDict) -> bool:
    """Whether the configuration asks for more than one run, see `covid_flax.members`."""
    return config.repeats > 1 or is_cross_validation(config.data)


def keeps_averages(config: ml_collections.ConfigDict) -> bool:
    """Whether a run evaluates averages of its weights, and so keeps them beside the weights."""
    return config.train.ema_decay > 0 or config.train.swa_start > 0


def _check_choice(key: str, value: Any, choices: Sequence[Any], of: str = "") -> None:
    if value not in choices:
        known = ", ".join(repr(c) for c in choices if c)
        raise UserError(f"config.{key}={value!r}: choose one of {known}{of}")


def _check_network(name: str, flat: dict[str, Any]) -> None:
    """What depends on which network it is."""
    trainable = trainable_choices(name)
    _check_choice("model.trainable", flat["model.trainable"], trainable, f", of {name}")
    until = own_share_choices(name)
    _check_choice("eval.bn_own_until", flat["eval.bn_own_until"], until, f", of {name}")
    size, smallest = flat["data.image_size"], MODELS[name].smallest
    if size < smallest:
        raise UserError(
            f"config.data.image_size={size}: {name} takes images of {smallest} pixels or more"
        )
    if flat["model.remat"] != "none" and name not in RESNETS:
        raise UserError(
            f"config.model.remat={flat['model.remat']!r}: {name} has no blocks to compute anew: "
            "set none"
        )


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dicts, lists in place of tuples."""
    return json.loads(config.to_json())


def from_json(saved: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration of a saved run. UserError for keys this version lacks, and bad types."""
    config = base.get_config()
    known = flatten(config)
    try:
        flat = flatten(saved)
    except RecursionError:
        raise UserError("config.json is nested too deeply: restore it") from None
    for key, value in flat.items():
        if key not in known:
            raise UserError(f"config.json has the key {key!r}, which this version does not know")
        parts = key.split(".")
        section = config
        for part in parts[:-1]:
            section = section[part]
        try:
            if value is None:
                raise TypeError
            section[parts[-1]] = tuple(value) if isinstance(known[key], tuple) else value
        except (TypeError, ValueError):
            raise UserError(
                f"config.json has {key} = {str(value)[:40]!r}, of another type than "
                f"{known[key]!r}: restore it"
            ) from None
    return config
