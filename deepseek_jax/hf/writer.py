"""Tensors into the files of a checkpoint: laid out first, then copied from another one or from arrays."""

import concurrent.futures
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from deepseek_jax.hf import reader
from deepseek_jax.hf.tensors import BUFFER, INDEX, SINGLE, HfTensors
from deepseek_jax.tensorfile import files, regions
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.files import fsync
from deepseek_jax.tensorfile.header import StoredTensor


def lay_out(
    folder: str, specs: dict[str, TensorSpec], file_bytes: int, writer: bool = True
) -> dict[str, StoredTensor]:
    """Gives every tensor its place.

    Args:
      folder: of the checkpoint.
      specs: of all tensors, in order.
      file_bytes: of one file, at most.
      writer: whether this process makes the files, with their heads and the index.

    Returns:
      Where each tensor lies.

    Raises:
      OSError: a file cannot be written.
    """
    division = files.divide(specs, _file_name, file_bytes)
    if writer:
        files.begin(folder, division)
        if len(division) > 1:
            with open(os.path.join(folder, INDEX), "wb") as f:
                f.write(files.index(division))
    return files.places(division)


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def copy_tensors(source: HfTensors, places: dict[str, StoredTensor], folder: str) -> None:
    """Copies tensors from a checkpoint to their places in another, in blocks of rows.

    Args:
      source: it holds all of them, in the same shapes and dtypes, or in FP8 where the place is for bfloat16.
      places: by name, in files that are there.
      folder: of these files.

    Raises:
      UserError: numbers are not finite, or a file cannot be read.
      OSError: a file cannot be written.
    """
    opened = {
        file: os.open(os.path.join(folder, file), os.O_WRONLY | os.O_CLOEXEC)
        for file in {place.file for place in places.values()}
    }

    def copy(name: str) -> None:
        file, spec, offset = places[name]
        write_at = files.write_at(opened[file])
        leading, inner = spec.shape[:-2], spec.shape[-2:]
        for at in itertools.product(*map(range, leading)):
            for block in regions.blocks(inner, spec.dtype.itemsize, BUFFER):
                region = (*(slice(i, i + 1) for i in at), *block)
                values = np.empty(regions.size(block), spec.dtype)
                source.read(name, region, values)
                regions.write(write_at, offset, spec, region, values)

    try:
        with concurrent.futures.ThreadPoolExecutor(reader.THREADS) as pool:
            tasks = [pool.submit(copy, name) for name in places]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for descriptor in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor in opened.values():
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
    """Writes files to the disk while the next array is read, so that not all of it waits for the end."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future | None = None

    def flush(self, paths: Iterable[str]) -> None:
        """Begins to write what these files hold, unless an earlier call is still at it.

        Raises:
          OSError: the disk refused what an earlier call began. The system says so once, so that a later fsync
            might not.
        """
        if self._last is None or self._last.done():
            if self._last is not None:
                self._last.result()
            self._last = self._pool.submit(_fsync_all, sorted(paths))

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()


def _fsync_all(paths: list[str]) -> None:
    for path in paths:
        fsync(path)
