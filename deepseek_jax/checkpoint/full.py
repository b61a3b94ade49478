"""Checkpoints of kind `full`: whole tensors in safetensors files, written by one process, read by any program.

A tensor is cut into blocks, gathered from its shards block by block and written at once: no host holds more than a block of it beside its
shards. In several processes a tensor, or each layer of a stack, is made whole on every device in turn, for as long as it is written. Training
waits meanwhile.
"""

import json
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepseek_jax.tensorfile import header, regions
from deepseek_jax.tensorfile.arrays import Shape, Tree, flatten, shape_of
from deepseek_jax.tensorfile.bounded_json import BadFile

INDEX = "state.safetensors.index.json"
EACH = False
FILE_BYTES = 5 << 30  # of one file, about; a larger tensor has one of its own


def start(folder: os.PathLike, state: Tree) -> Callable[[], None]:
    """Writes the whole state into `folder`. Nothing is left to do for what it returns."""
    arrays = flatten(state)
    write(
        folder,
        {name: shape_of(a) for name, a in arrays.items()},
        lambda name: blocks(arrays[name]),
        jax.process_index() == 0,
    )
    return lambda: None


def merge(folder: os.PathLike) -> None:
    """Nothing: there is one writer."""


def is_own(file: str) -> bool:
    """Did this process write that file?"""
    return jax.process_index() == 0


def write(
    folder: os.PathLike,
    shapes: dict[str, Shape],
    read: Callable[[str], Iterator[np.ndarray]],
    writer: bool = True,
) -> None:
    """Writes tensors into safetensors files, with an index.

    Args:
      read: the bytes of one tensor, as contiguous pieces in row-major order. Called for one after another.
      writer: without, everything is read and nothing is written: what other processes do, where reading takes all of them.

    Raises:
      OSError: after everything has been read, so that the others need not wait.
    """
    folder = epath.Path(folder)
    files: list[dict[str, Shape]] = [{}]
    for name, what in shapes.items():
        if files[-1] and sum(w.nbytes for w in files[-1].values()) + what.nbytes > FILE_BYTES:
            files.append({})
        files[-1][name] = what
    index, error = {}, None
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(files, 1):
        file = f"state-{number:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(tensors, file)
        f = None
        try:
            if writer and not error:
                f = (folder / file).open("wb")
                header.write_header(
                    f, tensors, {"format": "pt"}
                )  # without which transformers refuses a file
        except OSError as e:
            error = e
        for name in tensors:
            for block in read(name):
                try:
                    if f and not error:
                        f.write(regions.raw(block))
                except OSError as e:
                    error = e
        try:
            if f:
                f.close()
        except OSError as e:
            error = error or e
    if error:
        raise error
    if writer:
        value = {
            "metadata": {"total_size": sum(what.nbytes for what in shapes.values())},
            "weight_map": index,
        }
        (folder / INDEX).write_bytes(json.dumps(value, indent=0).encode())


def blocks(array: jax.Array) -> Iterator[np.ndarray]:
    """An array's values, in pieces in row-major order."""
    if array.is_fully_addressable:
        for index in regions.blocks(array.shape, array.dtype.itemsize):
            yield _from_shards(array, index)
        return
    # The layers of a stack one by one, where they are not divided: a device would not hold the experts of all.
    layers = (
        array.ndim > 1 and array.sharding.spec[:1] in ((), (None,)) and array.nbytes > regions.BLOCK
    )
    for part in range(array.shape[0]) if layers else (None,):
        # Process 0's device has all of it, and another copy is gone before the next.
        here = np.asarray(_whole(array, part).addressable_data(0))
        for index in regions.blocks(here.shape, here.dtype.itemsize):
            yield here[index]


def _whole(array: jax.Array, part: int | None) -> jax.Array:
    everywhere = jax.NamedSharding(array.sharding.mesh, jax.P())
    array = (
        jax.device_put(array, array.sharding.with_memory_kind("device"))
        if array.sharding.memory_kind not in (None, "device")
        else array
    )
    if part is None:
        return jax.jit(lambda a: a, out_shardings=everywhere)(array)
    return jax.jit(
        lambda a, i: jax.lax.dynamic_index_in_dim(a, i, keepdims=True), out_shardings=everywhere
    )(array, jnp.int32(part))


def _from_shards(array: jax.Array, index: regions.Index) -> np.ndarray:
    out, seen = np.empty(regions.size(index), array.dtype), set()
    for shard in array.addressable_shards:
        place = regions.of(shard.index, array.shape)
        part = regions.common(place, index)
        if part is None or (key := regions.key(part)) in seen:
            continue
        seen.add(key)
        local = regions.within(part, place)
        # np.asarray of a device's array keeps a copy of all of it with the array: cut first. A CPU's array is memory already.
        on_host = (
            shard.data.sharding.memory_kind not in (None, "device")
            or shard.device.platform == "cpu"
        )
        out[regions.within(part, index)] = (
            np.asarray(shard.data)[local] if on_host else np.asarray(shard.data[local])
        )
    return out


class Source:
    """The arrays of a checkpoint."""

    def __init__(self, folder: os.PathLike):
        """Reads the index and the head of every file.

        Raises:
          BadFile: one of them is not what it must be, or they disagree.
        """
        self._folder = epath.Path(folder)
        index = header.read_index(self._folder / INDEX)
        heads = {
            file: header.read(self._folder / file, f"state/{file}")
            for file in sorted(set(index.values()))
        }
        for file, tensors in heads.items():
            if wrong := tensors.keys() ^ {name for name, at in index.items() if at == file}:
                raise BadFile(
                    f"state/{file}", f"{INDEX} and the file disagree about {min(wrong)[:80]!r}"
                )
        self._places = {name: (file, heads[file][name]) for name, file in index.items()}
        self.shapes = {name: tensor.what for name, (_, tensor) in self._places.items()}

    def parts(self, name: str) -> Iterator[regions.Index]:
        """All of an array, in pieces that are read at once."""
        what = self.shapes[name]
        return regions.blocks(what.shape, what.dtype.itemsize)

    def read(self, name: str, index: regions.Index) -> np.ndarray:
        """A part of an array."""
        file, tensor = self._places[name]
        with (self._folder / file).open("rb") as f:
            return regions.read(f, tensor.offset, tensor.what, index)
