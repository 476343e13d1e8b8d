"""What a compiled program is said to cost, against a sum by hand."""

from types import SimpleNamespace

import pytest

from covid_flax.compiler import aot


def test_bounds_are_of_their_own_peaks():
    text = (
        "ENTRY %main (x: f32[1000000]) -> f32[1000000] {\n"
        "  %x = f32[1000000]{0} parameter(0)\n"
        "  ROOT %r = f32[1000000]{0} all-reduce(%x), to_apply=%add\n}\n"
    )
    sizes = dict.fromkeys(f"{k}_size_in_bytes" for k in ("temp", "argument", "output", "alias"))
    compiled = SimpleNamespace(
        as_text=lambda: text,
        memory_analysis=lambda: SimpleNamespace(**sizes),
        cost_analysis=lambda: {"flops": 4e12, "bytes accessed": 8e6},
    )
    got = aot.cost(compiled, None, 256, 4, "v5e")
    # Of 4 MB on 4 chips: read and written once; a ring sends 2 x 3/4 of it.
    want = {"flops": 4e12 / 197e12, "hbm": 8e6 / 819e9, "collectives": 6e6 / 200e9}
    assert got["bound_seconds"] == pytest.approx(want)
    assert got["bound_images_per_second"] == pytest.approx(256 / want["flops"])
    parts = {"temp_bytes_per_device": 1, "flops_per_example": 2}
    whole = {"temp_bytes_per_device": 3, "flops_per_example": 4}
    joined = {"temp_bytes_per_device": 1, "flops_per_example": 4}
    assert aot.of_micro_batches(parts, whole) == joined
