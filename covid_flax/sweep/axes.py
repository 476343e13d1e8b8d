"""What one --set may be: a list of a key's values, or a range to draw them from."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from covid_flax.errors import UserError

_RANGE = re.compile(r"(log|uniform)\(([^,()]+),([^,()]+)\)")
# Keys by which other images are held out.
_IMAGES = tuple(
    f"data.{key}"
    for key in (
        "dir",
        "phantoms_per_class",
        "split",
        "split_file",
        "split_seed",
        "val_fraction",
        "test_fraction",
        "nested_test",
        "groups_file",
        "group_column",
    )
)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What one key may be: a list of values, or a range to draw from.

    Attributes:
      key: of the configuration, without `config.`.
      text: what the user gave.
      values: of the list; empty for a range.
      scale: `log` or `uniform` of a range, else empty.
      low, high: of the range.
      whole: whether the key takes whole numbers.
    """

    key: str
    text: str
    values: tuple[Any, ...] = ()
    scale: str = ""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def draw(self, rng: np.random.Generator) -> Any:
        """One value: of the list, or of the range."""
        if not self.scale:
            return self.values[int(rng.integers(len(self.values)))]
        if self.scale == "uniform":
            value = float(rng.uniform(self.low, self.high))
        else:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        if self.whole:
            return round(value)
        # Four digits are what a reader wants, and what the folder's name shows.
        return min(max(float(f"{value:.4g}"), self.low), self.high)


def parse_axis(text: str, known: Mapping[str, Any]) -> Axis:
    """`KEY=V1,V2,...`, `KEY=log(A,B)` or `KEY=uniform(A,B)`. Raises UserError.

    Args:
      text: as given to --set.
      known: the configuration's keys and values, flat.
    """
    key, equals, given = text.partition("=")
    key, given = key.strip().removeprefix("config."), given.strip()
    if not equals or not given:
        raise UserError(f"--set={text}: give a key and its values, like train.label_smoothing=0,.1")
    if key not in known:
        raise UserError(f"unknown config key {key!r}: the nearest known one is {_near(key, known)}")
    if key == "seed":
        raise UserError("--set=seed: give the seeds as --seeds=0,1,2")
    if key in ("data.folds", "data.fold"):
        raise UserError(
            f"--set={key}: give --config.data.folds=N: a setting is trained on each fold"
        )
    if key in _IMAGES:
        raise UserError(f"--set={key}: trials would be judged by other images: set --config.{key}")
    if key == "train.monitor":
        raise UserError("--set=train.monitor: trials are judged by it: set --config.train.monitor")
    like = known[key]
    match = _RANGE.fullmatch(given.replace(" ", ""))
    if match is None and re.match(r"\w+\(", given):
        raise UserError(f"--set={text}: a range is log(LOW,HIGH) or uniform(LOW,HIGH)")
    if match is None:
        values = tuple(_value(key, part, like) for part in _split(given))
        for i, value in enumerate(values):
            if value in values[:i]:
                raise UserError(f"--set={text}: {value!r} is there twice: leave one out")
        return Axis(key, given, values)
    if isinstance(like, bool) or not isinstance(like, int | float):
        raise UserError(f"--set={text}: {key} is no number: give its values, with commas")
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError:
        raise UserError(f"--set={text}: the ends of a range are numbers") from None
    least = 0.0 if match[1] == "log" else -math.inf
    if not (least < low < high < math.inf):
        above = ", the low one above 0" if match[1] == "log" else ""
        raise UserError(f"--set={text}: give the low end, then the high one{above}")
    return Axis(key, given, (), match[1], low, high, isinstance(like, int))


def _near(key: str, known: Mapping[str, Any]) -> str:
    """The known key most like this one, by its whole name or by its last part."""
    last = key.rpartition(".")[2]
    named = {name.rpartition(".")[2]: name for name in known}

    def alike(name: str) -> float:
        parts = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return difflib.SequenceMatcher(None, key, name).ratio() + parts

    return named[last] if last in named else max(known, key=alike)


def _split(text: str) -> list[str]:
    """At the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (not quote) * ((c in "([") - (c in ")]"))
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _value(key: str, text: str, like: Any) -> Any:
    """The text as a value of the type that the key has."""
    if text == "" and not isinstance(like, str):
        raise UserError(f"--set={key}: an empty value: see its commas")
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(like, int):
            return int(text)
        if isinstance(like, float):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        if isinstance(like, tuple):
            value = ast.literal_eval(text)
            return value if isinstance(value, tuple) else (value,)
    except (ValueError, KeyError, SyntaxError):
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        kind = kinds.get(type(like), "a tuple, like ('conv5',)")
        raise UserError(f"--set={key}: {text!r} is not {kind}") from None
    return text.strip("'\"")
