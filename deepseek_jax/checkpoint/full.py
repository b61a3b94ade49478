"""Checkpoints of kind `full`: whole tensors in safetensors files, written by one process, for any program.

A tensor is cut into blocks, gathered from its shards block by block and written at once: no host holds more
than a block of it beside its shards. In several processes a tensor, or each layer of a stack, is made whole
on every device in turn, for as long as it is written. Training waits meanwhile.

Plain Orbax reads them, whole or into the shardings that `abstract_state` gives
(tests/checkpoint/test_orbax.py):

    import orbax.checkpoint.experimental.v1 as ocp
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        arrays = ocp.load(f"{workdir}/checkpoints/{step}/state")   # {"params/norm/weight": array, ...}
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepseek_jax.tensorfile import files, header, regions
from deepseek_jax.tensorfile.arrays import TensorSpec, Tree, flatten, spec_of

INDEX = "state.safetensors.index.json"


class FullKind:
    """As kind.Kind. One process writes, the others help to gather."""

    name = "full"
    index_file = INDEX
    each_process = False

    def start(self, folder: epath.PathLike, state: Tree) -> Callable[[], None]:
        """Writes the whole state. Nothing is left to do for what it returns."""
        arrays = flatten(state)
        specs = {name: spec_of(array) for name, array in arrays.items()}
        write(folder, specs, lambda name: blocks(arrays[name]), jax.process_index() == 0)
        return lambda: None

    def merge(self, folder: epath.PathLike) -> None:
        """Nothing: there is one writer."""

    def is_own(self, file: str) -> bool:
        return jax.process_index() == 0

    def open(self, *folders: epath.PathLike) -> "FullTensors":
        (folder,) = folders
        return FullTensors(folder)


def write(
    folder: epath.PathLike,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Iterable[np.ndarray]],
    writer: bool = True,
) -> None:
    """Writes tensors into safetensors files, with an index.

    Args:
      folder: of the files.
      specs: of all tensors, in order.
      read, writer: as tensorfile.files.write.

    Raises:
      OSError: after everything has been read, so that the others need not wait.
    """
    division = files.divide(specs, _file_name, files.FILE_BYTES)
    files.write(folder, division, read, writer)
    if writer:
        (epath.Path(folder) / INDEX).write_bytes(files.index(division))


def _file_name(number: int, count: int) -> str:
    return f"state-{number:05d}-of-{count:05d}.safetensors"


def blocks(array: jax.Array) -> Iterator[np.ndarray]:
    """An array's values, in blocks in row-major order."""
    if array.is_fully_addressable:
        yield from files.blocks(lambda index: _from_shards(array, index), spec_of(array))
        return
    # The layers of a stack one by one, where they are not divided: no device would hold the experts of all.
    first_axis = _named(array).spec[:1]
    layers = array.ndim > 1 and first_axis in ((), (None,)) and array.nbytes > regions.BLOCK
    for part in range(array.shape[0]) if layers else (None,):
        # Process 0's device has all of it, and another copy is gone before the next.
        here = np.asarray(_whole(array, part).addressable_data(0))
        for index in regions.blocks(here.shape, here.dtype.itemsize):
            yield here[index]


def _named(array: jax.Array) -> jax.NamedSharding:
    assert isinstance(array.sharding, jax.NamedSharding)
    return array.sharding


def _whole(array: jax.Array, part: int | None) -> jax.Array:
    everywhere = jax.NamedSharding(_named(array).mesh, jax.P())
    if array.sharding.memory_kind not in (None, "device"):
        array = jax.device_put(array, array.sharding.with_memory_kind("device"))
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
        # np.asarray of a device's array keeps a copy of all of it with the array: cut first. A CPU's array is
        # memory already.
        on_host = (
            shard.data.sharding.memory_kind not in (None, "device")
            or shard.device.platform == "cpu"
        )
        values = np.asarray(shard.data)[local] if on_host else np.asarray(shard.data[local])
        out[regions.within(part, index)] = values
    return out


class FullTensors:
    """As kind.TensorReader."""

    def __init__(self, folder: epath.PathLike):
        """Reads the index and the head of every file.

        Raises:
          BadFile: one of them is not what it must be, or they disagree.
        """
        self._folder = epath.Path(folder)
        index = header.read_index(self._folder / INDEX)
        names = sorted(set(index.values()))
        self._tensors = files.find(self._folder, names, index, INDEX, shown="state/")
        self.shapes = {name: tensor.spec for name, tensor in self._tensors.items()}

    def parts(self, name: str) -> Iterator[regions.Index]:
        spec = self.shapes[name]
        return regions.blocks(spec.shape, spec.dtype.itemsize)

    def read(self, name: str, index: regions.Index) -> np.ndarray:
        return files.read_region(self._folder, self._tensors[name], index)
