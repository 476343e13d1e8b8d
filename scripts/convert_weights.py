"""Converts a weight file to npz with Keras's names, checked against a network.

    python scripts/convert_weights.py IN OUT.npz [--model resnet50] [--may_miss conv5]

IN is Keras's .h5 or .weights.h5, or an .npz, of a ResNet (docs/weights.md). Only what fits the
network is written; OUT is never written over.
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
from flax import nnx

from covid_flax.errors import UserError
from covid_flax.files import write_atomically
from covid_flax.models import RESNETS, ResNet
from covid_flax.models.resnet import STAGES
from covid_flax.pretrained.fetch import sha256
from covid_flax.pretrained.load import LoadReport, array_names, as_named_today, load_weights
from covid_flax.pretrained.names import tree_path
from covid_flax.pretrained.read import read_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, metavar="IN", help=".h5, .weights.h5 or .npz")
    parser.add_argument("output", type=Path, metavar="OUT.npz")
    parser.add_argument("--model", choices=RESNETS, default="resnet50")
    parser.add_argument(
        "--may_miss",
        action="append",
        default=[],
        metavar="STAGE",
        help="stage of which arrays may be absent, e.g. conv5; may be repeated",
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
    arrays, report = check(read_weights(source), source=str(source), model=model, may_miss=may_miss)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(output, buffer.getvalue())
    print_table(arrays)
    print(report.summary())
    print(f"{sha256(source)}  {source}")
    print(f"{sha256(output)}  {output}")


def check(
    arrays: Mapping[str, np.ndarray], *, source: str, model: str, may_miss: Sequence[str]
) -> tuple[dict[str, Any], LoadReport]:
    """What of the arrays fits the network, whose head is as wide as theirs. Computes nothing."""

    def width(name: str, default: int) -> int:
        return arrays[name].shape[-1] if name in arrays and arrays[name].ndim else default

    network = nnx.eval_shape(
        lambda: ResNet(
            RESNETS[model],
            num_classes=width("predictions/bias", 1000),
            hidden_units=width("hidden/bias", 0),
            rngs=nnx.Rngs(0),
        )
    )
    trees = [nnx.to_pure_dict(nnx.state(network, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    arrays = as_named_today(arrays, array_names(*trees), source)
    _, _, report = load_weights(arrays, *trees, source=source, may_miss=may_miss)
    return {name: arrays[name] for name in report.loaded}, report


def print_table(arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays and numbers by stage."""
    print(f"{'stage':<8}{'arrays':>8}{'numbers':>14}")
    for stage in STAGES:
        shapes = [arrays[n].shape for n in arrays if tree_path(n)[0] == stage]
        if shapes:
            print(f"{stage:<8}{len(shapes):>8}{sum(map(math.prod, shapes)):>14,}")


if __name__ == "__main__":
    sys.exit(main())
