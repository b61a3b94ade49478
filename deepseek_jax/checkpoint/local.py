"""Checkpoints of kind `local`: each process's shards on its own disk, for a restart on the same hosts.

LOCAL_DIR/RUN/process_00003/STEP/state/ holds pieces.safetensors, the distinct shards of this process, and
pieces.json, which array each is a piece of and where. One process alone, or one that sees the folders of all,
can read them on any mesh. Other programs, Orbax among them, do not know what the pieces belong to: `python -m
deepseek_jax.checkpoint reshard` makes a checkpoint of kind `sharded` or `full` of them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from deepseek_jax.tensorfile import bounded_json, files, header, regions
from deepseek_jax.tensorfile.arrays import DTYPES, NAMES, TensorSpec, Tree, flatten, spec_of
from deepseek_jax.tensorfile.bounded_json import BadFile

INDEX = "pieces.json"
_DATA = "pieces.safetensors"

Pieces = list[tuple[regions.Index, np.ndarray]]  # where each lies in its array, and its values


class LocalKind:
    """As kind.Kind. Every process writes a checkpoint of its own."""

    name = "local"
    index_file = INDEX
    each_process = True

    def start(self, folder: epath.PathLike, state: Tree) -> Callable[[], None]:
        """Copies this process's shards to the host.

        Returns:
          What writes them.
        """
        arrays: dict[str, tuple[TensorSpec, Pieces]] = {}
        for name, array in flatten(state).items():
            found: dict[tuple, tuple[regions.Index, np.ndarray]] = {}
            for shard in array.addressable_shards:
                place = regions.of(shard.index, array.shape)
                key = regions.key(place)
                if key not in found:
                    # A copy: the step that comes next writes over the shard.
                    found[key] = (place, np.array(shard.data))
            arrays[name] = (spec_of(array), list(found.values()))
        return lambda: write(folder, arrays)

    def merge(self, folder: epath.PathLike) -> None:
        """Nothing: each process's checkpoint is its own."""

    def is_own(self, file: str) -> bool:
        return True

    def open(self, *folders: epath.PathLike) -> "LocalTensors":
        return LocalTensors(*folders)


def write(folder: epath.PathLike, arrays: dict[str, tuple[TensorSpec, Pieces]]) -> None:
    """Writes pieces of arrays."""
    pieces = {
        f"{name}#{i}": values
        for name, (_, parts) in arrays.items()
        for i, (_, values) in enumerate(parts)
    }
    division = {_DATA: {name: spec_of(values) for name, values in pieces.items()}}
    files.write(folder, division, lambda name: [pieces[name]])
    places = {
        name: {
            "dtype": NAMES[spec.dtype],
            "shape": spec.shape,
            "pieces": [regions.key(place) for place, _ in parts],
        }
        for name, (spec, parts) in arrays.items()
    }
    (epath.Path(folder) / INDEX).write_bytes(json.dumps(places).encode())


class StoredPiece(NamedTuple):
    """A piece of an array in a process's folder."""

    place: regions.Index  # in the array
    folder: epath.Path
    tensor: header.StoredTensor


class LocalTensors:
    """As kind.TensorReader, from the pieces in one or more processes' folders."""

    def __init__(self, *folders: epath.PathLike):
        """Reads what is where.

        Raises:
          BadFile: a file is not what it must be, or the folders disagree.
        """
        self.shapes: dict[str, TensorSpec] = {}
        self._pieces: dict[str, list[StoredPiece]] = {}
        for folder in map(epath.Path, folders):
            tensors = header.read(folder / _DATA, f"state/{_DATA}")
            value = bounded_json.read(folder / INDEX, f"state/{INDEX}", header.MAX_HEADER)
            for name, (spec, places) in parse(value).items():
                if self.shapes.setdefault(name, spec) != spec:
                    raise BadFile(
                        f"state/{INDEX}",
                        f"{name[:80]!r} is {spec} and elsewhere {self.shapes[name]}",
                    )
                for i, place in enumerate(places):
                    tensor = tensors.get(f"{name}#{i}")
                    size = regions.size(place)
                    if tensor is None or tensor.spec != TensorSpec(size, spec.dtype):
                        raise BadFile(f"state/{_DATA}", f"{name[:80]!r} has no piece {i} of {size}")
                    self._pieces.setdefault(name, []).append(StoredPiece(place, folder, tensor))

    def parts(self, name: str) -> Iterator[regions.Index]:
        spec, seen = self.shapes[name], set()
        for place, *_ in self._pieces.get(name, ()):
            if (key := regions.key(place)) not in seen:
                seen.add(key)
                for block in regions.blocks(regions.size(place), spec.dtype.itemsize):
                    yield tuple(
                        slice(b.start + p.start, b.stop + p.start)
                        for b, p in zip(block, place, strict=True)
                    )

    def read(self, name: str, index: regions.Index) -> np.ndarray:
        """A part of an array.

        Raises:
          BadFile: other processes have a piece of it.
        """
        parts = list(self._parts(name, index))
        if not _covers([regions.size(part) for part, _ in parts], regions.size(index)):
            raise BadFile("state", f"a piece of {name[:80]!r} is with another process")
        out = None
        for part, piece in parts:
            inside = regions.within(part, piece.place)
            values = files.read_region(piece.folder, piece.tensor, inside)
            if len(parts) == 1:
                return values
            if out is None:
                out = np.empty(regions.size(index), values.dtype)
            out[regions.within(part, index)] = values
        return np.empty(regions.size(index), self.shapes[name].dtype) if out is None else out

    def has(self, name: str, index: regions.Index) -> bool:
        """Whether all of this part is here."""
        parts = [regions.size(part) for part, _ in self._parts(name, index)]
        return name in self.shapes and _covers(parts, regions.size(index))

    def _parts(
        self, name: str, index: regions.Index
    ) -> Iterator[tuple[regions.Index, StoredPiece]]:
        seen = []
        for piece in self._pieces.get(name, []):
            part = regions.common(piece.place, index)
            if part is not None and part not in seen:
                seen.append(part)
                yield part, piece


def _covers(parts: Sequence[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    # Shards of one sharding do not overlap, so counting is enough.
    return sum(int(np.prod(p, dtype=object)) for p in parts) == int(np.prod(wanted, dtype=object))


def parse(value: object) -> dict[str, tuple[TensorSpec, list[regions.Index]]]:
    """The arrays of a pieces.json and where their pieces lie.

    Raises:
      BadFile: it is not what it must be.
    """
    if not isinstance(value, dict):
        raise BadFile(f"state/{INDEX}", "not a JSON object")
    return {name: _parse_entry(name, entry) for name, entry in value.items()}


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, list[regions.Index]]:
    file, shown = f"state/{INDEX}", repr(name[:80])
    if (
        not isinstance(entry, dict)
        or entry.keys() != {"dtype", "shape", "pieces"}
        or entry["dtype"] not in list(DTYPES)
    ):
        raise BadFile(file, f"{shown} has not dtype, shape and pieces")
    shape, pieces = entry["shape"], entry["pieces"]
    if (
        not isinstance(shape, list)
        or len(shape) > header.MAX_DIMENSIONS
        or not all(map(_is_size, shape))
    ):
        raise BadFile(file, f"{shown} has no shape")
    if not isinstance(pieces, list) or not all(_fits(place, shape) for place in pieces):
        raise BadFile(file, f"{shown} has a piece outside its shape {shape}"[:200])
    places = [tuple(slice(*s) for s in place) for place in pieces]
    if len(places) > 256 or any(
        regions.common(a, b) for i, a in enumerate(places) for b in places[:i]
    ):
        raise BadFile(file, f"{shown} has pieces that overlap")
    return TensorSpec(tuple(shape), DTYPES[entry["dtype"]]), places


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**48


def _fits(place: object, shape: list[int]) -> bool:
    """Whether a list of [start, stop] is a region of an array of this shape."""
    if not isinstance(place, list) or len(place) != len(shape):
        return False
    return all(
        isinstance(s, list) and len(s) == 2 and all(map(_is_size, s)) and s[0] <= s[1] <= n
        for s, n in zip(place, shape, strict=True)
    )


def covers(folder: epath.PathLike, wanted: Tree) -> bool:
    """Whether this process's folder has all that its devices hold of `wanted`.

    Arrays of other shapes are not looked at.
    """
    reader = LocalTensors(folder)
    for name, leaf in flatten(wanted).items():
        if reader.shapes.get(name) == spec_of(leaf):
            places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            if not all(reader.has(name, regions.of(place, leaf.shape)) for place in places):
                return False
    return True
