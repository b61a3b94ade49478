"""Bytes into the files of a checkpoint: tensors copied from another one, and the disk at work meanwhile."""

import concurrent.futures
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.hf import reader
from deepseek_jax.hf.tensors import BUFFER, Source


class Place(NamedTuple):
    """Where a tensor's bytes go."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def copy_tensors(source: Source, places: dict[str, Place], folder: str) -> None:
    """Copies tensors from a checkpoint to their places in another, of the same shapes and dtypes, or bfloat16 for FP8, in blocks of rows.

    Raises:
      UserError: numbers are not finite, or a file cannot be read. OSError: one cannot be written.
    """
    files = {
        file: os.open(os.path.join(folder, file), os.O_WRONLY | os.O_CLOEXEC)
        for file in {p.file for p in places.values()}
    }

    def one(name: str) -> None:
        place = places[name]
        *experts, rows, columns = place.shape if len(place.shape) > 1 else (1, *place.shape)
        step = max(1, BUFFER // (columns * place.dtype.itemsize))
        for matrix in range(math.prod(experts)):
            for row in range(0, rows, step):
                part = slice(row, min(row + step, rows))
                region = (
                    (*(slice(matrix, matrix + 1) for _ in experts), part, slice(0, columns))
                    if len(place.shape) > 1
                    else (slice(0, columns),)
                )
                block = np.empty((part.stop - part.start, columns), place.dtype)
                source.read(name, region, block if len(place.shape) > 1 else block[0])
                pwrite(
                    files[place.file],
                    block,
                    place.offset + (matrix * rows + row) * columns * place.dtype.itemsize,
                )

    try:
        with concurrent.futures.ThreadPoolExecutor(reader.THREADS) as pool:
            tasks = [pool.submit(one, name) for name in places]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for descriptor in files.values():
            os.fsync(descriptor)
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def ahead(parts: Iterable[Any]) -> Iterator[Any]:
    """The same, each made while the one before is used: two are in memory."""
    rest = iter(parts)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, rest, None)
        while (part := coming.result()) is not None:
            coming = pool.submit(next, rest, None)
            yield part


class Flusher:
    """Has the disk write while the next array is read: without it all of a checkpoint would wait for the fsync at the end."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future | None = None

    def flush(self, paths: Iterable[str]) -> None:
        """Begins to write what these files hold, unless an earlier call is still at it.

        Raises:
          OSError: the disk refused what an earlier call began. The system says so once, so that a later fsync might not.
        """
        if self._last is None or self._last.done():
            if self._last is not None:
                self._last.result()
            self._last = self._pool.submit(lambda: [fsync(path) for path in sorted(paths)])

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()


def fsync(path: str) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def pwrite(descriptor: int, data: np.ndarray, at: int) -> None:
    left = memoryview(data.reshape(-1).view(np.uint8))
    while left:
        n = os.pwrite(descriptor, left, at)
        left, at = left[n:], at + n
