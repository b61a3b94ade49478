"""Hashes and orders: pure functions of integers, the same on every host and with every NumPy version."""

import numpy as np


def mix64(values: np.ndarray | int) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): uint64 hashes, same shape, of integers modulo 2^64."""
    z = np.atleast_1d(
        np.asarray(values if isinstance(values, np.ndarray) else values % 2**64)
    ).astype(np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_seed(seed: int, *path: int) -> int:
    """A seed below 2^32 for one purpose, unrelated to those of other seeds and purposes.

    Grain shuffles epoch e with seed + e: without this, seed 1 would begin with seed 0's second epoch.
    """
    for p in path:
        seed = int(mix64(seed)[0]) ^ p
    return int(mix64(seed)[0]) >> 32


def permutation(n: int, seed: int) -> np.ndarray:
    """A random order of 0 to n - 1, int64 [n]. np.random's orders may change between NumPy
    versions; this one cannot."""
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) + mix64(seed)), kind="stable")
