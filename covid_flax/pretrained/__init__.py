"""ImageNet weights: names, reading, strict loading, download."""

from covid_flax.pretrained.fetch import fetch_imagenet_weights, resolve, sha256
from covid_flax.pretrained.load import LoadReport, load_weights
from covid_flax.pretrained.read import read_weights

__all__ = [
    "LoadReport",
    "fetch_imagenet_weights",
    "load_weights",
    "read_weights",
    "resolve",
    "sha256",
]
