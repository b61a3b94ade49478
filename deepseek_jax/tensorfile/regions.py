"""Parts of row-major arrays in files: read and written without holding more than asked for.

An index is one slice(start, stop) for each axis, with numbers.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepseek_jax.tensorfile.arrays import TensorSpec

BLOCK = 1 << 26  # bytes that are read, gathered or written at once
# Bytes between the wanted parts of neighbouring rows that are read and thrown away: a disk reads as much
# anyway.
GAP = 1 << 15

Index = tuple[slice, ...]
ReadAt = Callable[
    [memoryview, int], None
]  # fills a buffer with the bytes of a file from an offset on
WriteAt = Callable[[memoryview, int], None]  # writes the bytes of a buffer at an offset


def of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    """An index as JAX gives it, with numbers for None."""
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))


def whole(shape: tuple[int, ...]) -> Index:
    """The index of everything."""
    return tuple(slice(0, n) for n in shape)


def size(index: Index) -> tuple[int, ...]:
    """The shape of what it selects."""
    return tuple(s.stop - s.start for s in index)


def common(a: Index, b: Index) -> Index | None:
    """What both select, or None."""
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
    """A hashable form; Python 3.11's slices have no hash."""
    return tuple((s.start, s.stop) for s in index)


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in row-major order, copied only if they lie otherwise."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def blocks(shape: tuple[int, ...], itemsize: int, limit: int = BLOCK) -> Iterator[Index]:
    """Indices of contiguous parts that make up an array, in order.

    Args:
      shape: of the array.
      itemsize: bytes of an element.
      limit: bytes of a part, at most, unless one element has more.
    """
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


def stream(f: Any) -> ReadAt:
    """Reads a binary file that is open, by one thread.

    Raises:
      EOFError: by what it returns, where the file ends too early.
    """

    def read_at(left: memoryview, at: int) -> None:
        f.seek(at)
        while len(left):
            n = f.readinto(left)
            if not n:
                raise EOFError(f"the file ends {len(left)} bytes before the end of an array")
            left = left[n:]

    return read_at


def read(
    read_at: ReadAt, offset: int, spec: TensorSpec, index: Index, gap: int = GAP
) -> np.ndarray:
    """A part of an array.

    Args:
      read_at: reads the file.
      offset: bytes from the start of the file to the array.
      spec: of the whole array.
      index: the part.
      gap: as `read_blocks`.

    Returns:
      The part, contiguous.
    """
    out = np.empty(size(index), spec.dtype)
    if out.size:
        _read_into(read_at, offset, spec, index, out, BLOCK, gap)
    return out


def _read_into(
    read_at: ReadAt,
    offset: int,
    spec: TensorSpec,
    index: Index,
    out: np.ndarray,
    limit: int,
    gap: int,
) -> None:
    if _is_contiguous(spec.shape, index):
        first, _ = _span(spec.shape, index, spec.dtype.itemsize)
        read_at(_bytes(out), offset + first)
        return
    for place, block in read_blocks(read_at, offset, spec, index, limit, gap):
        out[place] = block


def read_blocks(
    read_at: ReadAt, offset: int, spec: TensorSpec, index: Index, limit: int, gap: int = GAP
) -> Iterator[tuple[Index, np.ndarray]]:
    """A part of an array, block by block: what is converted on the way need not be held whole.

    Args:
      read_at: reads the file.
      offset: bytes from the start of the file to the array.
      spec: of the whole array.
      index: the part.
      limit: bytes of a block, at most, unless one element has more.
      gap: bytes that may be read and thrown away between two wanted ones; larger gaps are skipped.

    Yields:
      Where a block lies in the part, and the block, whose rows need not be contiguous.
    """
    if 0 in size(index):
        return
    shape, item = spec.shape, spec.dtype.itemsize
    if not shape:
        one = np.empty((), spec.dtype)
        read_at(_bytes(one), offset)
        yield (), one
        return
    first, rest = index[0], index[1:]
    pitch = math.prod(shape[1:]) * item  # bytes of a row, the wanted part of which has `wanted`
    wanted = math.prod(size(rest)) * item
    count, row_spec = first.stop - first.start, TensorSpec(shape[1:], spec.dtype)
    together = not rest or pitch <= limit and _largest_gap(shape, index, item) <= gap
    if not together and (wanted > limit or count == 1):
        for i in range(count):
            row_offset = offset + (first.start + i) * pitch
            for place, block in read_blocks(read_at, row_offset, row_spec, rest, limit, gap):
                yield (slice(i, i + 1), *place), block[None]
        return
    rows = max(1, limit // (pitch if together else wanted))
    for i in range(0, count, rows):
        here = min(rows, count - i)
        start = offset + (first.start + i) * pitch
        if together:
            low, high = _span(shape[1:], rest, item)
            raw_rows = np.empty(here * pitch, np.uint8)
            read_at(raw_rows.data[low : (here - 1) * pitch + high], start + low)
            block = raw_rows.view(spec.dtype).reshape(here, *shape[1:])[(slice(None), *rest)]
        else:
            block = np.empty((here, *size(rest)), spec.dtype)
            for row in range(here):
                _read_into(read_at, start + row * pitch, row_spec, rest, block[row], limit, gap)
        yield (slice(i, i + here), *whole(size(rest))), block


def write(
    write_at: WriteAt, offset: int, spec: TensorSpec, index: Index, values: np.ndarray
) -> None:
    """Writes a part of an array.

    Args:
      write_at: writes the file.
      offset: bytes from the start of the file to the array.
      spec: of the whole array.
      index: the part.
      values: of the part, in the dtype of the array.
    """
    if not values.size:
        return
    if _is_contiguous(spec.shape, index):
        first, _ = _span(spec.shape, index, spec.dtype.itemsize)
        write_at(raw(values), offset + first)
        return
    row_spec = TensorSpec(spec.shape[1:], spec.dtype)
    for i, row in enumerate(values, index[0].start):
        write(write_at, offset + i * row_spec.nbytes, row_spec, index[1:], row)


def _bytes(array: np.ndarray) -> memoryview:
    """Those of a contiguous array, to be written over."""
    return array.reshape(-1).view(np.uint8).data


def _is_contiguous(shape: tuple[int, ...], index: Index) -> bool:
    """Whether a part lies in one piece: all axes after the first with several entries are whole."""
    several = [axis for axis, n in enumerate(size(index)) if n != 1]
    inner = several[0] + 1 if several else len(shape)
    return index[inner:] == whole(shape[inner:])


def _span(shape: tuple[int, ...], index: Index, item: int) -> tuple[int, int]:
    """(first byte, byte after the last) of a part that is not empty, counted from the start of the array."""
    low = last = 0
    for axis, s in enumerate(index):
        pitch = math.prod(shape[axis + 1 :]) * item
        low += s.start * pitch
        last += (s.stop - 1) * pitch
    return low, last + item


def _largest_gap(shape: tuple[int, ...], index: Index, item: int) -> int:
    """The most bytes between two neighbouring bytes of a part."""
    largest = 0
    for axis, n in enumerate(size(index)):
        if n > 1:
            low, high = _span(shape[axis + 1 :], index[axis + 1 :], item)
            largest = max(largest, math.prod(shape[axis + 1 :]) * item - (high - low))
    return largest
