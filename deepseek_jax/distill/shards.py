"""The bytes of a cached teacher: shard-00000.bin, shard-00001.bin, ..., and of each a .json that vouches.

A shard holds the records of some rows, token after token, each of the same size and all little-endian:

    ids      K of 2 bytes, or 3 where the vocabulary is above 65,536
    values   K of float16, the logits of these words
    lse      float32 for each temperature

The .json, which is written when the .bin is on the disk, has its size, its SHA-256 and the CRC-32 of each
row: a row is checked as it is read, without the others.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.manifest import sync_folder
from deepseek_jax.data.fields import Rows
from deepseek_jax.distill.manifest import LIMIT, Manifest
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

_BLOCK = 1 << 20  # bytes that are hashed at a time


class Sums(NamedTuple):
    """What vouches for a shard."""

    bytes: int
    sha256: str
    rows: list[int]  # CRC-32 of each


class InUse(Exception):
    """Another process is making the shard."""


def name_of(shard: int) -> str:
    """Without an ending."""
    return f"shard-{shard:05}"


def encoded(rows: Rows, manifest: Manifest) -> np.ndarray:
    """Records [n, S, ...] (data/fields.py of_teacher) as bytes, uint8 [n, S, bytes of a token]."""
    ids, values, lse = (rows[f"teacher_{name}"] for name in ("ids", "values", "lse"))
    n, s, k = ids.shape
    raw = np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(n, s, k, 4)
    parts = [
        raw[..., : manifest.id_bytes].reshape(n, s, -1),
        np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(n, s, -1),
        np.ascontiguousarray(lse, "<f4").view(np.uint8).reshape(n, s, -1),
    ]
    return np.concatenate(parts, axis=2)


def decoded(raw_SB: np.ndarray, manifest: Manifest, top: int) -> tuple[np.ndarray, ...]:
    """The first `top` words of a row's records: int32 [S, top], float16 [S, top], float32 [S, N]."""
    s, k, width = len(raw_SB), manifest.top, manifest.id_bytes
    ids = np.zeros((s, top, 4), np.uint8)
    given = raw_SB[:, : top * width].reshape(s, top, width)
    for byte in range(width):  # NumPy copies one byte of each faster than three
        ids[..., byte] = given[..., byte]
    values_at, lse_at = k * width, k * (width + 2)
    values = np.ascontiguousarray(raw_SB[:, values_at : values_at + 2 * top])
    lse = np.ascontiguousarray(raw_SB[:, lse_at:])
    return ids.view("<i4")[..., 0], values.view("<f2"), lse.view("<f4")


def read_sums(folder: str, shard: int, manifest: Manifest) -> Sums:
    """What vouches for a shard.

    Raises:
      BadFile: it is missing, damaged or not of this shard.
    """
    name = f"{name_of(shard)}.json"
    value = bounded_json.read(os.path.join(folder, name), name, LIMIT)
    try:
        sums = Sums(**value)
        count = len(manifest.rows_of(shard))
        fits = (
            sums.bytes == count * manifest.row_bytes
            and isinstance(sums.sha256, str)
            and len(sums.rows) == count
            and all(type(crc) is int for crc in sums.rows)
        )
    except TypeError:
        fits = False
    if not fits:
        raise BadFile(name, "not of this shard")
    return sums


def is_complete(folder: str, shard: int, manifest: Manifest) -> bool:
    """Whether a shard was written to its end. Its bytes are not read: `verify` does."""
    with contextlib.suppress(BadFile, OSError):
        sums = read_sums(folder, shard, manifest)
        return os.stat(os.path.join(folder, f"{name_of(shard)}.bin")).st_size == sums.bytes
    return False


def missing(folder: str, manifest: Manifest) -> list[int]:
    """The shards that are not there, by the names in the folder and their sizes."""
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Another worker gives a file its name, and the one that it had is gone.
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat().st_size
    return [
        i
        for i in range(manifest.shards)
        if f"{name_of(i)}.json" not in sizes
        or sizes.get(f"{name_of(i)}.bin") != len(manifest.rows_of(i)) * manifest.row_bytes
    ]


class Writer:
    """Writes one shard, row after row. A context manager; nothing stands in the folder under the shard's
    names before `finish`.

    Raises:
      InUse: another process writes it. OSError: it cannot be written.
    """

    def __init__(self, folder: str, shard: int, manifest: Manifest):
        self._folder = folder
        self._name = name_of(shard)
        self._hash = hashlib.sha256()
        self._rows: list[int] = []
        self._bytes = 0
        # One name for all who may make this shard: what a killed one has left is overwritten.
        self._part = os.path.join(folder, f"{self._name}.bin.tmp")
        self._file: IO[bytes]

    def __enter__(self) -> "Writer":
        self._file = open(self._part, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._file.close()
            raise InUse from e
        except OSError:
            pass  # no locks here: two would write the same bytes
        if not self._is_ours():  # it has been finished, and is another's whole shard by now
            self._file.close()
            raise InUse
        self._file.truncate(0)
        return self

    def _is_ours(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._part))
        return False

    def write(self, raw: np.ndarray) -> None:
        """Rows of bytes, uint8 [n, S, bytes of a token]."""
        for row in raw:
            data = memoryview(np.ascontiguousarray(row)).cast("B")
            self._file.write(data)
            self._hash.update(data)
            self._rows.append(zlib.crc32(data))
            self._bytes += len(data)

    def finish(self) -> None:
        """The shard appears, and then what vouches for it."""
        sums = Sums(self._bytes, self._hash.hexdigest(), self._rows)
        path = os.path.join(self._folder, self._name)
        with open(f"{path}.json.tmp", "wb") as f:
            f.write((json.dumps(sums._asdict(), separators=(",", ":")) + "\n").encode())
            for file in (self._file, f):
                file.flush()
                os.fsync(file.fileno())
        for ending in (".bin", ".json"):
            os.replace(f"{path}{ending}.tmp", f"{path}{ending}")
            sync_folder(self._folder)

    def __exit__(self, *_: object) -> None:
        if self._is_ours():
            os.unlink(self._part)
        with contextlib.suppress(OSError):  # on a full disk closing fails too
            self._file.close()


def verify(
    folder: str, manifest: Manifest, shards: Iterable[int]
) -> Iterator[tuple[int, str, str]]:
    """Reads shards whole: (bytes read, the file that something is wrong with or "", what is) of each."""
    for shard in shards:
        name = f"{name_of(shard)}.bin"
        try:
            sums = read_sums(folder, shard, manifest)
            size = os.stat(os.path.join(folder, name)).st_size
            if size != sums.bytes:
                yield 0, name, f"{size} bytes, was {sums.bytes}"
            elif _sha256(os.path.join(folder, name)) != sums.sha256:
                yield sums.bytes, name, "its bytes are not those that were written"
            elif damaged := _rows_of(os.path.join(folder, name), sums, manifest):
                yield sums.bytes, f"{name_of(shard)}.json", f"row {damaged[0]} has another checksum"
            else:
                yield sums.bytes, "", ""
        except BadFile as e:
            yield 0, e.file, e.what
        except OSError as e:
            yield 0, name, e.strerror or str(e)


def _sha256(path: str) -> str:
    out = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            out.update(block)
    return out.hexdigest()


def _rows_of(path: str, sums: Sums, manifest: Manifest) -> list[int]:
    """Rows whose checksum is not theirs, of a file that is whole: its .json is damaged."""
    with open(path, "rb") as f:
        found = [zlib.crc32(f.read(manifest.row_bytes)) for _ in sums.rows]
    return [i for i, (a, b) in enumerate(zip(found, sums.rows, strict=True)) if a != b]
