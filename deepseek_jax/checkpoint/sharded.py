"""Checkpoints of kind `sharded`, by Orbax: every process writes its shards while training goes on.

Plain Orbax reads them into shards, or onto the host (tests/checkpoint/test_orbax.py):

    import orbax.checkpoint as ocp
    state = ocp.StandardCheckpointer().restore(f"{workdir}/checkpoints/{step}/state", abstract_state)

where abstract_state is a tree of jax.ShapeDtypeStruct with shardings. Orbax's CheckpointManager finds the
steps of a run, and `state` in each of them.

Of Orbax the handler alone is used, which writes the files, without its checkpointers and managers. Those
could leave room for the manifest (CheckpointManagerOptions(temporary_path_class=) can write one before the
rename), but their processes wait for each other at barriers, where one that failed is missed for twenty
minutes, and their restore holds 1.6 times the state. In a bucket of S3, where that handler does not write,
object_store.py writes the same files.
"""

import asyncio
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from deepseek_jax.checkpoint import object_store
from deepseek_jax.checkpoint.object_store import CHUNK_BYTES, INDEX
from deepseek_jax.tensorfile import bounded_json, regions
from deepseek_jax.tensorfile.arrays import NAMES, TensorSpec, Tree
from deepseek_jax.tensorfile.bounded_json import BadFile

_LIMIT = 1 << 25  # bytes of INDEX


class ShardedKind:
    """As kind.Kind. All processes write one checkpoint together."""

    name = "sharded"
    index_file = INDEX
    each_process = False

    def start(self, folder: epath.PathLike, state: Tree) -> Callable[[], None]:
        """Copies the shards to the host and begins to write them into `folder`."""
        if object_store.is_needed(folder):
            return object_store.start(folder, state)
        _hush()
        handler = _handler()
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        args = ocp.args.PyTreeSave(state, save_args=chunks)
        futures = asyncio.run(handler.async_save(epath.Path(folder), args=args))

        def finish() -> None:
            errors = []
            # All of them: one that still writes would put files into a folder that is being removed.
            for future in futures or []:
                try:
                    future.result()
                except Exception as e:
                    errors.append(e)
            handler.close()
            if errors:
                raise errors[0]

        return finish

    def merge(self, folder: epath.PathLike) -> None:
        if object_store.is_needed(folder):
            object_store.merge(folder, jax.process_count())
            return
        handler = _handler()
        handler.finalize(epath.Path(folder))
        handler.close()

    def is_own(self, file: str) -> bool:
        """Process 0 also wrote the files of all."""
        head = file.partition("/")[0]
        prefix = "ocdbt.process_"
        number = head.removeprefix(prefix) if head.startswith(prefix) else ""
        return jax.process_index() == (int(number) if number.isdigit() else 0)

    def open(self, *folders: epath.PathLike) -> "ShardedTensors":
        (folder,) = folders
        return ShardedTensors(folder)


class ShardedTensors:
    """As kind.TensorReader, by TensorStore."""

    def __init__(self, folder: epath.PathLike):
        """Opens every array: what is read is its description.

        Raises:
          BadFile: a description is missing, or is not what this program writes.
        """
        base = object_store.base(folder)
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        opened = {}
        for name in _names(folder):
            kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
            spec = {"driver": "zarr", "kvstore": kvstore}
            opened[name] = ts.open(spec, open=True, read=True, context=context)
        self._arrays: dict[str, Any] = {}
        for name, future in opened.items():
            try:
                self._arrays[name] = future.result()
            except Exception as e:
                why = " ".join(str(e).split())[:200]
                raise BadFile("state", f"{name[:80]!r} cannot be opened ({why})") from e
        self.shapes = {
            name: TensorSpec(tuple(array.shape), np.dtype(array.dtype.numpy_dtype))
            for name, array in self._arrays.items()
        }
        for name, array in self._arrays.items():
            chunk = array.chunk_layout.read_chunk.shape or ()
            # A chunk is allocated whole, whatever is asked of it.
            too_large = any(c > max(n, 1) for c, n in zip(chunk, array.shape, strict=True))
            if too_large or self.shapes[name].dtype not in NAMES:
                raise BadFile(
                    "state", f"{name[:80]!r}, {self.shapes[name]}, has chunks of {list(chunk)}"
                )

    def parts(self, name: str) -> Iterator[regions.Index]:
        """In chunks: TensorStore reads a whole chunk for any part of it."""
        array = self._arrays[name]
        return _grid(array.shape, array.chunk_layout.read_chunk.shape or ())

    def read(self, name: str, index: regions.Index) -> np.ndarray:
        return self._arrays[name][index].read().result()


def _names(folder: epath.PathLike) -> list[str]:
    """The paths of the arrays, from Orbax's description of the tree.

    Raises:
      BadFile: it is of another tree than nested dicts of arrays.
    """
    file = f"state/{INDEX}"
    value = bounded_json.read(epath.Path(folder) / INDEX, file, _LIMIT)
    value = value if isinstance(value, dict) else {}
    found = value.get("tree_metadata")
    if not isinstance(found, dict) or value.get("use_zarr3"):
        raise BadFile(file, "it describes no tree")
    out = []
    for name, entry in found.items():
        entry = entry if isinstance(entry, dict) else {}
        keys, about = entry.get("key_metadata"), entry.get("value_metadata")
        if (
            not isinstance(keys, list)
            or not keys
            or not all(isinstance(k, dict) and isinstance(k.get("key"), str) for k in keys)
            or not isinstance(about, dict)
        ):
            raise BadFile(file, f"{name[:80]!r} is no path of names")
        parts = [k["key"] for k in keys]
        if about.get("value_type") != "jax.Array" or any(
            "/" in p or p in ("", ".", "..") or not p.isprintable() for p in parts
        ):
            raise BadFile(file, f"{name[:80]!r} is no array with a plain name")
        out.append("/".join(parts))
    if len(set(out)) != len(out):
        raise BadFile(file, "it describes an array twice")
    return out


def write(
    folder: epath.PathLike,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str, regions.Index], np.ndarray],
    shards: int,
) -> None:
    """Writes arrays one chunk at a time, as Orbax would have for `shards` devices.

    Args:
      folder: STEP/state/. It is made.
      specs: of all arrays, by path.
      read: a part of an array.
      shards: parts that the largest axis of an array is divided into.
    """
    top = epath.Path(folder)
    top.mkdir(parents=True, exist_ok=True)
    database = {"driver": "ocdbt", "base": object_store.base(folder)}
    chunks = {name: _chunk(spec, shards) for name, spec in specs.items()}
    for name, spec in specs.items():
        store = object_store.array_spec(database, name, spec.shape, chunks[name])
        array = ts.open(store, create=True, dtype=ts.dtype(spec.dtype)).result()
        for index in _grid(spec.shape, chunks[name]):
            array[index].write(read(name, index)).result()
    (top / INDEX).write_bytes(object_store.index(chunks))


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[regions.Index]:
    for place in itertools.product(*(range(0, n, c) for n, c in zip(shape, chunk, strict=True))):
        yield tuple(slice(at, min(at + c, n)) for at, c, n in zip(place, chunk, shape, strict=True))


def _chunk(spec: TensorSpec, shards: int) -> list[int]:
    """Sizes of a chunk: the largest axis in so many parts, then the first ones cut to fit CHUNK_BYTES."""
    chunk = [max(n, 1) for n in spec.shape]
    if chunk:
        axis = max(range(len(chunk)), key=lambda i: chunk[i])
        chunk[axis] = -(-chunk[axis] // shards)
    for axis in range(len(chunk)):
        while chunk[axis] > 1 and math.prod(chunk) * spec.dtype.itemsize > CHUNK_BYTES:
            chunk[axis] = -(-chunk[axis] // 2)
    return chunk


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.getMessage()


def _hush() -> None:
    """Keeps traces of failed writes off the terminal; `finish` raises the first of them.

    Where one of its writes fails, Orbax closes an event loop that the others still call, and Python prints a
    trace for each. Of several that fail it asks for the first alone, and asyncio logs the others.
    """
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    before = sys.unraisablehook
    if getattr(before, "__module__", "") == __name__:
        return

    def hook(what) -> None:
        if not (
            isinstance(what.exc_value, RuntimeError)
            and "Event loop is closed" in str(what.exc_value)
        ):
            before(what)

    sys.unraisablehook = hook


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Trained float32 numbers hardly become smaller: zstd takes several times the time of writing them and
    # spares 8% (benchmarks checkpoint).
    return ocp.PyTreeCheckpointHandler(use_compression=False)
