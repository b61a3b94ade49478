"""Parts of row-major arrays in files, read and cut without holding more than asked for."""

import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from deepseek_jax.tensorfile.arrays import Shape

BLOCK = 1 << 26  # bytes that are read, gathered or written at once

Index = tuple[slice, ...]  # one slice(start, stop) an axis, with numbers


def of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    """An index as JAX gives it, with numbers for None."""
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))


def whole(shape: tuple[int, ...]) -> Index:
    """Everything."""
    return tuple(slice(0, n) for n in shape)


def size(index: Index) -> tuple[int, ...]:
    """Its shape."""
    return tuple(s.stop - s.start for s in index)


def common(a: Index, b: Index) -> Index | None:
    """What both have, or None."""
    out = tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return out if all(s.start < s.stop for s in out) else None


def within(part: Index, index: Index) -> Index:
    """`part` as counted from where `index` begins."""
    return tuple(
        slice(p.start - s.start, p.stop - s.start) for p, s in zip(part, index, strict=True)
    )


def key(index: Index) -> tuple[tuple[int, int], ...]:
    """What tells it from others in a set."""
    return tuple((s.start, s.stop) for s in index)


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in row-major order, copied only if they lie otherwise."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def blocks(shape: tuple[int, ...], itemsize: int, limit: int = BLOCK) -> Iterator[Index]:
    """Row-major pieces of an array, in order, each of at most `limit` bytes where one row of its last axis is."""
    if 0 in shape:
        return
    row = math.prod(shape[1:]) * itemsize
    if not shape or row * shape[0] <= limit:
        yield whole(shape)
    elif row <= limit or len(shape) == 1:
        rows = max(1, limit // row)
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))
    else:
        for i in range(shape[0]):
            for rest in blocks(shape[1:], itemsize, limit):
                yield (slice(i, i + 1), *rest)


def read(f: BinaryIO, offset: int, what: Shape, index: Index) -> np.ndarray:
    """A part of an array that begins at byte `offset` of a file.

    Raises:
      EOFError: the file ends before.
    """
    out = np.empty(size(index), what.dtype)
    if out.size:
        _read_into(f, offset, what, index, out)
    return out


def _read_into(f: BinaryIO, offset: int, what: Shape, index: Index, out: np.ndarray) -> None:
    shape = what.shape
    if not shape:
        _fill(f, offset, out)
        return
    row = math.prod(shape[1:]) * what.dtype.itemsize
    first, rest = index[0], index[1:]
    if rest == whole(shape[1:]):
        _fill(f, offset + first.start * row, out)
    elif row <= BLOCK:
        rows = max(1, BLOCK // row)
        for start in range(first.start, first.stop, rows):
            stop = min(start + rows, first.stop)
            block = np.empty((stop - start, *shape[1:]), what.dtype)
            _fill(f, offset + start * row, block)
            out[start - first.start : stop - first.start] = block[(slice(None), *rest)]
    else:
        for i in range(first.start, first.stop):
            _read_into(
                f, offset + i * row, Shape(shape[1:], what.dtype), rest, out[i - first.start]
            )


def _fill(f: BinaryIO, offset: int, out: np.ndarray) -> None:
    """Reads the bytes of a contiguous array."""
    f.seek(offset)
    left = memoryview(out.reshape(-1).view(np.uint8))
    while len(left):
        n = f.readinto(left)
        if not n:
            raise EOFError(f"the file ends {len(left)} bytes before the end of an array")
        left = left[n:]
