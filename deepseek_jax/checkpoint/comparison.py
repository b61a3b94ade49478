"""Two checkpoints' arrays, compared bit for bit without holding one whole."""

from typing import Any

import numpy as np

from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.tensorfile import regions

_BLOCK = 1 << 24  # bytes that are compared at once


def differences(first: TensorReader, second: TensorReader, most: int) -> tuple[list[dict], int]:
    """The first arrays that differ, by name.

    Args:
      first, second: the checkpoints.
      most: arrays to tell of.

    Returns:
      What differs in each, and how many arrays are the same.
    """
    rows: list[dict[str, Any]] = []
    same = 0
    for name in sorted(first.shapes.keys() | second.shapes.keys()):
        here, there = first.shapes.get(name), second.shapes.get(name)
        if here is None or here != there:
            shown = {"first": str(here) if here else None, "second": str(there) if there else None}
            rows.append({"name": name} | shown)
        elif found := _difference(first, second, name):
            rows.append({"name": name, "dtype": str(here.dtype), "shape": list(here.shape)} | found)
        else:
            same += 1
        if len(rows) == most:
            break
    return rows, same


def _difference(first: TensorReader, second: TensorReader, name: str) -> dict[str, Any] | None:
    spec = first.shapes[name]
    count, largest, where = 0, 0.0, None
    for index in regions.blocks(spec.shape, spec.dtype.itemsize, _BLOCK):
        a, b = first.read(name, index), second.read(name, index)
        unequal = (_bytes(a) != _bytes(b)).any(axis=1)
        if not unequal.any():
            continue
        count += int(unequal.sum())
        x, y = (values.reshape(-1)[unequal].astype(np.float64) for values in (a, b))
        with np.errstate(invalid="ignore"):
            gap = np.abs(x - y)
        largest = max(largest, float(np.max(np.where(np.isnan(gap), np.inf, gap))))
        if where is None:
            inside = np.unravel_index(int(np.argmax(unequal)), a.shape)
            where = [int(i) + s.start for i, s in zip(inside, index, strict=True)]
    if not count:
        return None
    return {
        "elements": count,
        "of": int(np.prod(spec.shape, dtype=object)),
        "max_abs_difference": largest,
        "first_at": where,
    }


def _bytes(array: np.ndarray) -> np.ndarray:
    """uint8 [elements, bytes of one]."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, -1)
