"""Checkpoints of kind `local`: each process's shards on its own disk, for a restart on the same hosts.

LOCAL_DIR/RUN/process_00003/STEP/state/ holds pieces.safetensors, the distinct shards of this process, and pieces.json, which array each
is a piece of and where. One process alone, or one that sees the folders of all, can read them on any mesh.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from deepseek_jax.tensorfile import bounded_json, header, regions
from deepseek_jax.tensorfile.arrays import DTYPES, NAMES, Shape, Tree, flatten, shape_of
from deepseek_jax.tensorfile.bounded_json import BadFile

INDEX = "pieces.json"
EACH = True  # every process writes a checkpoint of its own
_DATA = "pieces.safetensors"


def start(folder: os.PathLike, state: Tree) -> Callable[[], None]:
    """Copies this process's shards to the host.

    Returns:
      What writes them.
    """
    pieces: dict[str, tuple[Shape, list[tuple[regions.Index, np.ndarray]]]] = {}
    for name, array in flatten(state).items():
        found: dict[tuple, tuple[regions.Index, np.ndarray]] = {}
        for shard in array.addressable_shards:
            place = regions.of(shard.index, array.shape)
            key = regions.key(place)
            if key not in found:
                found[key] = (
                    place,
                    np.array(shard.data),
                )  # a copy: the step that comes next writes over it
        pieces[name] = (shape_of(array), list(found.values()))
    return lambda: write(folder, pieces)


def write(
    folder: os.PathLike, pieces: dict[str, tuple[Shape, list[tuple[regions.Index, np.ndarray]]]]
) -> None:
    """Writes pieces of arrays."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"{name}#{i}": data
        for name, (_, parts) in pieces.items()
        for i, (_, data) in enumerate(parts)
    }
    with (folder / _DATA).open("wb") as f:
        header.write_header(
            f, {name: shape_of(data) for name, data in named.items()}, {"format": "pt"}
        )
        for data in named.values():
            f.write(regions.raw(data))
    places = {
        name: {
            "dtype": NAMES[what.dtype],
            "shape": what.shape,
            "pieces": [regions.key(place) for place, _ in parts],
        }
        for name, (what, parts) in pieces.items()
    }
    (folder / INDEX).write_bytes(json.dumps(places).encode())


def merge(folder: os.PathLike) -> None:
    """Nothing: each process's checkpoint is its own."""


def is_own(file: str) -> bool:
    """Did this process write that file?"""
    return True


class Source:
    """The arrays of a checkpoint, from the pieces in one or more processes' folders."""

    def __init__(self, *folders: os.PathLike):
        """Reads what is where.

        Raises:
          BadFile: a file is not what it must be, or the folders disagree.
        """
        self.shapes: dict[str, Shape] = {}
        self._pieces: dict[str, list[tuple[regions.Index, epath.Path, header.Tensor]]] = {}
        for folder in map(epath.Path, folders):
            tensors = header.read(folder / _DATA, f"state/{_DATA}")
            value = bounded_json.read(folder / INDEX, f"state/{INDEX}", header.MAX_HEADER)
            for name, (what, places) in parse(value).items():
                if self.shapes.setdefault(name, what) != what:
                    raise BadFile(
                        f"state/{INDEX}",
                        f"{name[:80]!r} is {what} and elsewhere {self.shapes[name]}",
                    )
                for i, place in enumerate(places):
                    tensor = tensors.get(f"{name}#{i}")
                    if tensor is None or tensor.what != Shape(regions.size(place), what.dtype):
                        raise BadFile(
                            f"state/{_DATA}",
                            f"{name[:80]!r} has no piece {i} of {regions.size(place)}",
                        )
                    self._pieces.setdefault(name, []).append((place, folder / _DATA, tensor))

    def parts(self, name: str) -> Iterator[regions.Index]:
        """All of an array, in pieces that are read at once."""
        what, seen = self.shapes[name], set()
        for place, *_ in self._pieces.get(name, ()):
            if (key := regions.key(place)) not in seen:
                seen.add(key)
                for block in regions.blocks(regions.size(place), what.dtype.itemsize):
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
        if not _covers([regions.size(part) for part, *_ in parts], regions.size(index)):
            raise BadFile("state", f"a piece of {name[:80]!r} is with another process")
        for part, place, path, tensor in parts:
            with path.open("rb") as f:
                data = regions.read(f, tensor.offset, tensor.what, regions.within(part, place))
            if len(parts) == 1:
                return data
            if part is parts[0][0]:
                out = np.empty(regions.size(index), tensor.what.dtype)
            out[regions.within(part, index)] = data
        return out if parts else np.empty(regions.size(index), self.shapes[name].dtype)

    def has(self, name: str, index: regions.Index) -> bool:
        """Is all of this part here?"""
        return name in self.shapes and _covers(
            [regions.size(part) for part, *_ in self._parts(name, index)], regions.size(index)
        )

    def _parts(
        self, name: str, index: regions.Index
    ) -> Iterator[tuple[regions.Index, regions.Index, epath.Path, header.Tensor]]:
        seen = []
        for place, path, tensor in self._pieces.get(name, []):
            part = regions.common(place, index)
            if part is not None and part not in seen:
                seen.append(part)
                yield part, place, path, tensor


def _covers(parts: Sequence[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    # Shards of one sharding do not overlap, so counting is enough.
    return sum(int(np.prod(p, dtype=object)) for p in parts) == int(np.prod(wanted, dtype=object))


def parse(value: object) -> dict[str, tuple[Shape, list[regions.Index]]]:
    """The arrays of a pieces.json and where their pieces lie.

    Raises:
      BadFile: it is not what it must be.
    """
    file, out = f"state/{INDEX}", {}
    if not isinstance(value, dict):
        raise BadFile(file, "not a JSON object")
    number = lambda n: type(n) is int and 0 <= n < 2**48
    for name, entry in value.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"dtype", "shape", "pieces"}
            or entry["dtype"] not in list(DTYPES)
        ):
            raise BadFile(file, f"{name[:80]!r} has not dtype, shape and pieces")
        shape, pieces = entry["shape"], entry["pieces"]
        if (
            not isinstance(shape, list)
            or len(shape) > header.MAX_DIMENSIONS
            or not all(map(number, shape))
        ):
            raise BadFile(file, f"{name[:80]!r} has no shape")
        fits = lambda place: (
            isinstance(place, list)
            and len(place) == len(shape)
            and all(
                isinstance(s, list) and len(s) == 2 and all(map(number, s)) and s[0] <= s[1] <= n
                for s, n in zip(place, shape)
            )
        )
        if not isinstance(pieces, list) or not all(map(fits, pieces)):
            raise BadFile(file, f"{name[:80]!r} has a piece outside its shape {shape}"[:200])
        places = [tuple(slice(*s) for s in place) for place in pieces]
        disjoint = (
            len(places) < 2
            or len(places) <= 256
            and not any(regions.common(a, b) for i, a in enumerate(places) for b in places[:i])
        )
        if not disjoint:
            raise BadFile(file, f"{name[:80]!r} has pieces that overlap")
        out[name] = (Shape(tuple(shape), DTYPES[entry["dtype"]]), places)
    return out


def covers(folder: os.PathLike, wanted: Tree) -> bool:
    """Has this process's folder all that its devices hold of `wanted`? Arrays of other shapes are not looked at."""
    source = Source(folder)
    for name, leaf in flatten(wanted).items():
        if source.shapes.get(name) == shape_of(leaf):
            places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            if not all(source.has(name, regions.of(place, leaf.shape)) for place in places):
                return False
    return True
