"""GPUs that recipes may name (`cluster.gpu`) and that a job recognises: figures of NVIDIA's data sheets, one way.

Memory is in units of 10^9 bytes, as it is sold. What a GPU has beyond that (an 80 GB one has 79 GiB) goes to its
driver's context and to NCCL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: bytes, dense bf16 FLOP/s, bytes/s."""

    part: str  # of the device's name, in whole words
    memory_bytes: float
    peak_flops: float
    memory_bandwidth: float
    link: float  # to the other GPUs of a node; of cards, to those that a bridge joins
    network: float  # to other nodes, the share of one GPU in NVIDIA's own systems


# The first whose part is in a device's name counts.
GPUS = {
    "gb200": Gpu("GB200", 186e9, 2500e12, 8.0e12, 900e9, 50e9),
    "b200": Gpu("B200", 180e9, 2250e12, 8.0e12, 900e9, 50e9),
    "h200-nvl": Gpu("H200 NVL", 141e9, 835e12, 4.8e12, 450e9, 50e9),
    "h200": Gpu("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
    "h100-nvl": Gpu("H100 NVL", 94e9, 835e12, 3.9e12, 300e9, 50e9),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 756e12, 2.0e12, 300e9, 50e9),
    "h100-80gb": Gpu("H100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h800": Gpu("H800", 80e9, 989e12, 3.35e12, 200e9, 50e9),
    "a100-80gb": Gpu("A100", 80e9, 312e12, 2.0e12, 300e9, 25e9),
    "a100-40gb": Gpu("A100", 40e9, 312e12, 1.55e12, 300e9, 25e9),
    "a800": Gpu("A800", 80e9, 312e12, 2.0e12, 200e9, 25e9),
    "l40s": Gpu("L40S", 48e9, 362e12, 0.864e12, 32e9, 25e9),
}


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that CUDA calls `name`; None for one that is not known."""
    return next((gpu.peak_flops for gpu in GPUS.values() if re.search(rf"\b{gpu.part}\b", name)), None)
