"""Copies between a tensor's bytes and an array, transposed and in another dtype.

A few times as quick as NumPy's own assignment.
"""

import math

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Bytes: on CPUs JAX takes over NumPy arrays that begin at such addresses, and copies others.
_ALIGNMENT = 64
# Rows that are transposed at once, by bytes per item: their columns stay in the nearest cache.
_TILE = {2: 32, 4: 64}


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty, aligned for JAX."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def into(target: np.ndarray, block: np.ndarray) -> None:
    """target[...] = block, both [rows, columns].

    Args:
      target: of any strides; one axis should be contiguous.
      block: in the dtype of a file.
    """
    if _by_columns(target):
        target, block = target.T, transposed(block)
    if block.dtype == BFLOAT16 and target.dtype == np.float32 and target.strides[1] == 4:
        np.left_shift(block.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = block


def out_of(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A matrix of any strides, made contiguous and cast. What is too large for the dtype becomes infinite."""
    with np.errstate(over="ignore"):
        if _by_columns(values):
            return transposed(values.T.astype(dtype, copy=False))
        return np.ascontiguousarray(values.astype(dtype, copy=False))


def _by_columns(a: np.ndarray) -> bool:
    return len(a) > 1 and a.strides[0] < a.strides[1]


def transposed(a: np.ndarray) -> np.ndarray:
    """The transpose of a matrix, contiguous."""
    rows, columns = a.shape
    out = np.empty((columns, rows), a.dtype)
    tile = _TILE.get(a.itemsize, 64)
    if a.strides[-1] == a.itemsize:  # NumPy has no quick copies of dtypes that are not its own
        source, target = a.view(f"u{a.itemsize}"), out.view(f"u{a.itemsize}")
    else:
        source, target = a, out
    for i in range(0, rows, tile):
        target[:, i : i + tile] = source[i : i + tile].T
    return out
