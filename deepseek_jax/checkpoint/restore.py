"""From the arrays of a checkpoint, whatever their files, to the shards of this process."""

import concurrent.futures
import math
from collections.abc import Iterator

import jax
import numpy as np

from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.runtime.libc import trim_memory
from deepseek_jax.tensorfile import regions
from deepseek_jax.tensorfile.arrays import Tree, flatten, like

_THREADS = 4  # file systems over a network answer many requests at once
# Bytes that are read at once: a sixteenth of all, between these.
_LEAST = 1 << 25
_MOST = 1 << 31


def into_shards(reader: TensorReader, abstract: Tree) -> Tree:
    """The arrays of `abstract` in their shards.

    Every device's part is read by its own process, and a few arrays are on the host at once. Orbax's own
    restore holds 1.6 times the state (benchmarks checkpoint): it reads all arrays before it puts any on a
    device.

    Args:
      reader: of the checkpoint.
      abstract: jax.ShapeDtypeStructs with shardings.
    """
    flat = flatten(abstract)
    here = {name: _bytes_here(leaf) for name, leaf in flat.items()}
    limit = min(max(sum(here.values()) // 16, _LEAST), _MOST)
    out: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for group in _groups(here, limit):
            arrays = pool.map(lambda name: _array(reader, name, flat[name]), group)
            out |= zip(group, arrays, strict=True)
            trim_memory()
    return like(abstract, out)


def _groups(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    distinct = {regions.key(regions.of(place, leaf.shape)) for place in places}
    return len(distinct) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _array(reader: TensorReader, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    last: tuple[regions.Index, np.ndarray] | None = None

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        nonlocal last
        asked = regions.of(index or (), wanted.shape)
        if last is None or last[0] != asked:  # replicas ask for the same one after another
            last = (asked, reader.read(name, asked))
        return last[1]

    return jax.block_until_ready(jax.make_array_from_callback(wanted.shape, wanted.sharding, part))
