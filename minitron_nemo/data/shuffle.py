"""Orders that are functions of a seed: the same with every NumPy version, machine and process.

NumPy promises no stable random streams between versions, and sample ids must outlive them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def shuffled(keys: NDArray[np.uint64], *seeds: int | str) -> NDArray[np.int64]:
    """Indices that order `keys` by their hash under `seeds`: an order of the keys, not of their positions.

    The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), twice; equal keys stay in their order.
    """
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:8], "big")
    mixed = _finalise(_finalise(keys + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed))
    return np.argsort(mixed, kind="stable")


def permutation(count: int, *seeds: int | str) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on `seeds` alone."""
    return shuffled(np.arange(count, dtype=np.uint64), *seeds)


def _finalise(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
