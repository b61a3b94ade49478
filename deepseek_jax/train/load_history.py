"""WORKDIR/expert_load.npy: how many tokens each expert of each layer got, at up to 1,000 steps of a run.

One array of NumPy's format, which `numpy.load(path, mmap_mode="r")` reads while it grows: records of `step`,
int64, and `counts`, uint32 [L, E], the assignments of that step's whole batch, dropped ones included. NumPy's
header leaves room for a growing number of records, and a record is there before the header counts it.
"""

import io
import math
import os

import numpy as np
from numpy.lib import format as npy

from deepseek_jax.errors import UserError

NAME = "expert_load.npy"
MOST = 1000  # steps that are kept


def interval(steps: int, every: int) -> int:
    """After how many steps one is kept: every logged one, or of those every 2nd, 4th, ..., so that `MOST` do.

    Args:
      steps: of the whole run.
      every: config.log.every_steps.
    """
    return every * 2 ** max(0, math.ceil(math.log2(max(steps / every / MOST, 1))))


def record(layers: int, experts: int) -> np.dtype:
    """The type of one record."""
    return np.dtype([("step", "<i8"), ("counts", "<u4", (layers, experts))])


class LoadHistory:
    """Writes the file of a run, in process 0. Any method may raise OSError.

    Args:
      path: of the file; what it holds of steps after `step`, or of a model of another shape, goes.
      kind: `record` of the model.
      step: finished steps of the state that the run begins with.
      every: as `interval` has it; other steps are not kept.
    """

    def __init__(self, path: str, kind: np.dtype, step: int, every: int):
        self._path = path
        self._kind = kind
        self._every = every
        self._fd: int | None = None
        self._count = 0
        self._begin(step)

    def add(self, step: int, counts_LE: np.ndarray) -> None:
        """Keeps the counts of a step, if it is one to keep."""
        if step % self._every:
            return
        if self._count >= MOST:  # of a run that was made longer
            self.close()
        if self._fd is None:  # or a disk that was full may have room by now
            self._begin(step - 1)
        made = np.zeros(1, self._kind)
        made["step"], made["counts"] = step, counts_LE
        # What the header does not count is not there: a record cut short is written over.
        self._put(len(_header(self._kind, 0)) + self._count * self._kind.itemsize, made.tobytes())
        self._put(0, _header(self._kind, self._count + 1))
        self._count += 1

    def rewind(self, step: int) -> None:
        """Forgets the steps after `step`."""
        self.close()
        self._begin(step)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _begin(self, step: int) -> None:
        kept = np.zeros(0, self._kind)
        if os.path.exists(self._path):
            found = _records(self._path)
            if found is not None and found.dtype == self._kind:
                kept = np.array(found[found["step"] <= step])
        while len(kept) >= MOST:
            kept = kept[1::2]
        with open(self._path + ".tmp", "wb") as f:
            f.write(_header(self._kind, len(kept)) + kept.tobytes())
        os.replace(self._path + ".tmp", self._path)
        self._count = len(kept)
        self._fd = os.open(self._path, os.O_WRONLY)

    def _put(self, offset: int, data: bytes) -> None:
        assert self._fd is not None
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset, data = offset + written, data[written:]


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps int64 [N], counts uint32 [N, L, E]), on disk, in the order of steps; N = 0 without a file.

    Raises:
      UserError: the file is not what `LoadHistory` writes.
    """
    if not os.path.exists(path):
        return np.zeros(0, np.int64), np.zeros((0, 0, 0), np.uint32)
    found = _records(path)
    if found is None:
        raise UserError(f"{path} is damaged. Delete it: the run goes on without it.")
    return found["step"], found["counts"]


def _header(kind: np.dtype, count: int) -> bytes:
    """As long for any count: NumPy pads it for that."""
    out = io.BytesIO()
    description = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    npy.write_array_header_1_0(out, description)
    return out.getvalue()


def _records(path: str) -> np.ndarray | None:
    """The records of a file, memory-mapped; None if it is none of ours. A record that is being written, or
    that a lost machine has not written, is left out."""
    try:
        with open(path, "rb") as f:
            if npy.read_magic(f) != (1, 0):
                return None
            (count,), _, kind = npy.read_array_header_1_0(f)
            start = f.tell()
            there = (os.fstat(f.fileno()).st_size - start) // kind.itemsize
    except (ValueError, TypeError, EOFError, ZeroDivisionError):
        return None
    if kind.names != ("step", "counts") or kind["counts"].ndim != 2:
        return None
    if not (count := min(count, there)):
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r", start, (count,))
