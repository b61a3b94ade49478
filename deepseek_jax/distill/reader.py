"""Reads a cached teacher in training: the records of rows, as fields of a batch.

Shards are memory-mapped. The pages of a row leave this process when it has been read, so that its memory does
not grow with the cache; what the kernel keeps of them is its own affair.
"""

import collections
import concurrent.futures
import mmap
import os
import threading
import zlib

import numpy as np

from deepseek_jax.data.fields import Rows, of_teacher
from deepseek_jax.distill import shards
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.distill.shards import Sums
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.bounded_json import BadFile

OPEN = 64  # shards that are mapped at a time
THREADS = 4  # rows that are read at a time: disks are slow one by one


class CachedTeacher:
    """Adds to rows what a teacher says of them. Threads may share it.

    Args:
      folder: of a complete cache.
      manifest: of it.
      top: words that are read of each record: the first ones.
      temperatures: whose log-sum-exp is read, two, in this order; they are stored.
      here: bool [micro-batch], the sequences of each micro-batch that this process needs; None: all.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        top: int,
        temperatures: tuple[float, ...],
        here: np.ndarray | None = None,
    ):
        self.manifest = manifest
        self._folder = folder
        self._top = top
        self._columns = [manifest.temperatures.index(t) for t in temperatures]
        self._fields = of_teacher(top)
        self._here = np.ones(1, bool) if here is None else here
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "cached teacher")
        self._lock = threading.Lock()  # of `_open`
        self._open: collections.OrderedDict[int, tuple[mmap.mmap, Sums]] = collections.OrderedDict()

    def add_to(self, rows: Rows) -> Rows:
        """The rows with what the teacher says of them, in place of `record`.

        Args:
          rows: of whole micro-batches. Of those that other processes need zeros are said.

        Raises:
          UserError: a row is not in the cache, or its bytes are not those that were written.
        """
        records = rows["record"].tolist()
        length = self.manifest.length
        out = {
            name: np.zeros((len(records), *field.shape(length)), field.dtype)
            for name, field in self._fields.items()
        }

        def read(i: int) -> None:
            for array, of_row in zip(out.values(), self.row(records[i]), strict=True):
                array[i] = of_row

        here = self._here
        wanted = [i for i, r in enumerate(records) if r >= 0 and here[i % len(here)]]
        for _ in self._threads.map(read, wanted):
            pass  # an error of a thread is raised here
        return {name: a for name, a in rows.items() if name != "record"} | out

    def row(self, record: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32 [S, K], logits float16 [S, K], log-sum-exp float32 [S, N]) of a row's tokens.

        Raises:
          UserError: as `add_to`.
        """
        m = self.manifest
        if not 0 <= record < m.rows:
            raise UserError(
                f"config.distill.cache={self._folder} has {m.rows} rows, and no row {record}. Make it again "
                "for these data."
            )
        shard, row = divmod(record, m.rows_per_shard)
        start = row * m.row_bytes
        first = start - start % mmap.PAGESIZE
        with self._lock:
            mapped, sums = self._mapped(shard)
        # NumPy copies without the GIL: nobody waits for the disk but this thread.
        raw = np.frombuffer(mapped, np.uint8, m.row_bytes, start).copy()
        mapped.madvise(mmap.MADV_DONTNEED, first, start + m.row_bytes - first)
        if zlib.crc32(raw) != sums.rows[row]:
            raise damaged(
                self._folder, f"{shards.name_of(shard)}.bin", f"row {row} is not as written"
            )
        ids, values, lse = shards.decoded(raw.reshape(m.length, -1), m, self._top)
        return ids, values, lse[:, self._columns]

    def _mapped(self, shard: int) -> tuple[mmap.mmap, Sums]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        name = f"{shards.name_of(shard)}.bin"
        try:
            sums = shards.read_sums(self._folder, shard, self.manifest)
            with open(os.path.join(self._folder, name), "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size != sums.bytes:
                    raise BadFile(name, f"{size} bytes, was {sums.bytes}")
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except BadFile as e:
            raise damaged(self._folder, e.file, e.what) from e
        except OSError as e:
            raise damaged(self._folder, name, e.strerror or str(e)) from e
        if len(self._open) >= OPEN:
            self._open.popitem(last=False)  # closed when no thread reads it any more
        self._open[shard] = mapped, sums
        return mapped, sums


def damaged(folder: str, file: str, what: str) -> UserError:
    """What to raise where a shard is not what was written."""
    return UserError(
        f"config.distill.cache={folder}: {file} is damaged ({what}). Remove {file.partition('.')[0]}.* and "
        f"run the command that made the cache again (`python -m deepseek_jax.distill show {folder}`)."
    )
