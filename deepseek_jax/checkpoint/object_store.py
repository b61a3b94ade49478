"""Checkpoints of kind `sharded` in a bucket of S3, where Orbax 0.12 writes to disks and gs:// alone.

The files are those that Orbax would write: every process has a database of its own shards,
ocdbt.process_N/, and process 0 merges them into one, which refers to their data. Copied to a disk, plain
Orbax reads them. TensorStore does the work here as it does there.

Credentials and region come from where all tools of AWS take them. AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL
name another server than Amazon's.
"""

import json
import os
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from deepseek_jax.tensorfile import regions
from deepseek_jax.tensorfile.arrays import Tree, flatten

INDEX = "_METADATA"
# What a reader of any part of an array holds, at most: one device may have had gigabytes of it.
CHUNK_BYTES = 1 << 28
_WRITTEN = {
    "config": {
        "max_inline_value_bytes": 1024,  # the descriptions of arrays, not their numbers
        "max_decoded_node_bytes": 100_000_000,
        "manifest_kind": "single",
    },
    "assume_config": True,  # one writer: no empty manifest first
}


def is_needed(folder: epath.PathLike) -> bool:
    """Whether Orbax does not write there."""
    return os.fspath(folder).startswith("s3://")


def base(folder: epath.PathLike, env: Mapping[str, str] = os.environ) -> str | dict[str, Any]:
    """A folder as TensorStore's databases take it.

    Args:
      folder: on a disk, or remote.
      env: names the server of a bucket.
    """
    name = os.fspath(folder)
    if not is_needed(name):
        return (
            name if "://" in name else f"file://{urllib.parse.quote(os.path.abspath(name))}"
        ) + "/"
    bucket, _, path = name.removeprefix("s3://").partition("/")
    out: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{path.rstrip('/')}/"}
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if endpoint := env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"):
        # Servers other than Amazon's may not say which region they are.
        out |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        out["aws_region"] = region
    # Without it all places are looked at, with a line about each that is missing.
    if env.get("AWS_ACCESS_KEY_ID"):
        out["aws_credentials"] = {"type": "environment"}
    return out


def start(folder: epath.PathLike, state: Tree) -> Callable[[], None]:
    """Copies this process's shards to the host. Each part of an array has one process that writes it.

    Args:
      folder: STEP/state/.
      state: sharded jax.Arrays.

    Returns:
      What writes them, and returns when they are there.
    """
    arrays = flatten(state)
    chunks = {name: chunk_of(array) for name, array in arrays.items()}
    pieces: list[tuple[str, regions.Index, np.ndarray]] = []
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                place = regions.of(shard.index, array.shape)
                pieces.append((name, place, np.array(shard.data)))  # the array may be donated
    types = {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    process = jax.process_index()

    def finish() -> None:
        own = base(f"{os.fspath(folder)}/ocdbt.process_{process}")
        database = {"driver": "ocdbt", "base": own, **_WRITTEN}
        # One connection: the arrays' own would write the database's root in turn.
        context = ts.Context()
        opened = {}
        for name in dict.fromkeys(name for name, _, _ in pieces):
            shape, dtype = types[name]
            spec = array_spec(database, name, shape, chunks[name])
            opened[name] = ts.open(spec, create=True, dtype=ts.dtype(dtype), context=context)
        writes = [
            opened[name].result()[place].write(part, can_reference_source_data_indefinitely=True)
            for name, place, part in pieces
        ]
        errors = [error for write in writes if (error := write.exception()) is not None]
        # After all of them: one that still writes would do so into what is being removed.
        if errors:
            raise OSError(" ".join(str(errors[0]).split())[:200])
        if process == 0:
            (epath.Path(folder) / INDEX).write_bytes(index(chunks))

    return finish


def merge(folder: epath.PathLike, processes: int) -> None:
    """Makes one database of those of the processes."""
    context = ts.Context()  # the same for all: data are referred to within one connection alone
    parent = {"driver": "ocdbt", "base": base(folder), **_WRITTEN}
    whole = ts.KvStore.open(parent, context=context).result()
    transaction = ts.Transaction(atomic=True)
    for process in range(processes):
        child = {"driver": "ocdbt", "base": base(f"{os.fspath(folder)}/ocdbt.process_{process}")}
        opened = ts.KvStore.open(child, context=context).result()
        if opened.list().result():  # else this process had no part of any array
            opened.experimental_copy_range_to(whole.with_transaction(transaction)).result()
    transaction.commit_async().result()


def array_spec(
    database: dict[str, Any], name: str, shape: tuple[int, ...], chunk: list[int]
) -> dict[str, Any]:
    """An array in a database, as Orbax has it.

    Args:
      database: a spec of driver ocdbt.
      name: the array's path.
      shape: of the array.
      chunk: the shape of a chunk of it.
    """
    return {
        "driver": "zarr",
        "kvstore": database | {"path": name.replace("/", ".") + "/"},
        "metadata": {"shape": shape, "chunks": chunk, "compressor": None},
        "store_data_equal_to_fill_value": True,
    }


def index(chunks: Mapping[str, list[int]]) -> bytes:
    """Orbax's description of a tree of arrays.

    Args:
      chunks: the shape of a chunk of each array, by path.
    """
    tree = {}
    for name, chunk in chunks.items():
        parts = name.split("/")
        tree[str(tuple(parts))] = {
            "key_metadata": [{"key": part, "key_type": 2} for part in parts],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": chunk,
            },
        }
    value = {
        "tree_metadata": tree,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(value).encode()


def chunk_of(array: jax.Array) -> list[int]:
    """The shape of a chunk: a device's part, in equal parts of at most CHUNK_BYTES. No two processes write
    to the same chunk."""
    chunk = [max(n, 1) for n in array.sharding.shard_shape(array.shape)]
    size = np.dtype(array.dtype).itemsize
    while size * int(np.prod(chunk, dtype=np.int64)) > CHUNK_BYTES:
        axis = next(i for i, n in enumerate(chunk) if n > 1)
        n = chunk[axis]
        chunk[axis] //= next(f for f in range(2, n + 1) if n % f == 0)
    return chunk
