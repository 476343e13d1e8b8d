import pytest

from covid_flax.compiler.chips import PEAKS, peak_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_jax_s_names_find_their_chip(kind, name):
    assert peak_of(kind) is PEAKS[name]


def test_an_unknown_chip_has_no_peak():
    assert peak_of("cpu") is None
