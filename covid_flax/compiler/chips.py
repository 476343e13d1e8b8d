"""What accelerators can do in a second, for the share of it that a program uses."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peak:
    """A device's peaks a second: bfloat16 flops, bytes of HBM, bytes it sends to its neighbours."""

    flops: float
    hbm: float
    links: float


# Google Cloud's TPU documentation, "System architecture" of each generation: peak compute a
# chip (bf16), HBM bandwidth, inter-chip interconnect (one direction: there in bits, or twice as
# many bytes as "bidirectional"). NVIDIA's data sheets of A100, H100 and H200 SXM: dense bf16, HBM,
# NVLink (half of what they give, which is of both directions).
PEAKS = {
    "v4": Peak(275e12, 1200e9, 300e9),
    "v5e": Peak(197e12, 819e9, 200e9),
    "v5p": Peak(459e12, 2765e9, 600e9),
    "v6e": Peak(918e12, 1638e9, 448e9),
    "a100": Peak(312e12, 2039e9, 300e9),
    "h100": Peak(989e12, 3350e9, 450e9),
    "h200": Peak(989e12, 4800e9, 450e9),
}
# Parts of what JAX calls a device, `Device.device_kind`, in lower case.
_KINDS = {
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v6": "v6e",
    "a100": "a100",
    "h100": "h100",
    "h200": "h200",
}


def peak_of(device_kind: str) -> Peak | None:
    """The peaks of a device by JAX's name for its kind, None for one that is not known."""
    return next((PEAKS[k] for part, k in _KINDS.items() if part in device_kind.lower()), None)
