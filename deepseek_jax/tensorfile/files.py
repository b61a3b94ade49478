"""Tensors in the safetensors files of one folder: divided over them, found in them, read and written.

`divide` says which tensor goes into which file. `write` then writes the files from front to back, on a disk
or remote; `begin` writes their heads only, so that several processes write regions of the tensors where
`places` puts them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from etils import epath

from deepseek_jax.tensorfile import header, regions
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.tensorfile.header import StoredTensor

FILE_BYTES = (
    5_000_000_000  # of one file, as transformers writes them; a larger tensor has one of its own
)

Division = dict[str, dict[str, TensorSpec]]  # {file: {tensor: spec}}, both in order


def divide(
    specs: Mapping[str, TensorSpec], name_of: Callable[[int, int], str], file_bytes: int
) -> Division:
    """Which tensors go into which file.

    Args:
      specs: of all tensors, in the order in which they are written.
      name_of: a file's name from its number, from 1 on, and the number of files.
      file_bytes: of one file, at most, unless a tensor has more.
    """
    parts: list[dict[str, TensorSpec]] = [{}]
    size = 0  # bytes of the last one
    for name, spec in specs.items():
        if parts[-1] and size + spec.nbytes > file_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.nbytes
    return {name_of(i, len(parts)): part for i, part in enumerate(parts, 1)}


def places(division: Division) -> dict[str, StoredTensor]:
    """Where each tensor will lie."""
    out = {}
    for file, specs in division.items():
        at = len(header.encode(specs))
        for name, spec in specs.items():
            out[name] = StoredTensor(file, spec, at)
            at += spec.nbytes
    return out


def index(division: Division) -> bytes:
    """The JSON of a `*.safetensors.index.json`."""
    total = sum(spec.nbytes for specs in division.values() for spec in specs.values())
    weight_map = {name: file for file, specs in division.items() for name in specs}
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def begin(folder: str, division: Division) -> None:
    """Makes the files, with their heads and with room for the tensors, in a local folder.

    Raises:
      OSError: one cannot be written.
    """
    for file, specs in division.items():
        with open(os.path.join(folder, file), "wb") as f:
            f.write(header.encode(specs))
            f.truncate(f.tell() + sum(spec.nbytes for spec in specs.values()))


def write(
    folder: epath.PathLike,
    division: Division,
    read: Callable[[str], Iterable[np.ndarray]],
    writer: bool = True,
) -> None:
    """Writes files from front to back, in a folder here or remote.

    Args:
      folder: it is made if it is not there.
      division: what goes where.
      read: the values of one tensor, as blocks in row-major order. Called for one after another.
      writer: False: everything is read and nothing is written. That is what the other processes do where
        reading takes all of them.

    Raises:
      OSError: after everything has been read, so that the others need not wait.
    """
    top = epath.Path(folder)
    error: OSError | None = None
    if writer:
        top.mkdir(parents=True, exist_ok=True)
    for file, specs in division.items():
        f = None
        try:
            if writer and not error:
                f = (top / file).open("wb")
                f.write(header.encode(specs))
        except OSError as e:
            error = e
        for name in specs:
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


def find(
    folder: epath.PathLike,
    files: Iterable[str],
    in_index: dict[str, str] | None = None,
    index_file: str = "",
    shown: str = "",
) -> dict[str, StoredTensor]:
    """The tensors of several files.

    Args:
      folder: that they are in, here or remote.
      files: their names.
      in_index: {tensor: file} of their index, if they have one.
      index_file: its name.
      shown: what messages put before the names of files.

    Raises:
      BadFile: a file is not what the format wants, or the index says other things than the files.
    """
    out: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in header.read(epath.Path(folder) / file, shown + file).items():
            if in_index is not None and in_index.get(name) != file:
                said = in_index.get(name)
                raise BadFile(
                    shown + index_file, f"{name[:80]!r} is in {file}, and the index says {said}"
                )
            out[name] = tensor
    if missing := sorted((in_index or {}).keys() - out.keys()):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        named = ", ".join(name[:80] for name in missing[:5])
        raise BadFile(
            shown + index_file,
            f"{len(missing)} tensors are not in the files that it names: {named}{more}",
        )
    return out


def read_region(folder: epath.Path, tensor: StoredTensor, part: regions.Index) -> np.ndarray:
    """A part of a tensor.

    Args:
      folder: that its file is in, here or remote.
      tensor: where it lies.
      part: one slice for each axis.

    Raises:
      EOFError: the file has become shorter.
      OSError: it cannot be read.
    """
    # Each request to a remote folder takes longer than reading what lies between two parts.
    gap = regions.BLOCK if "://" in os.fspath(folder) else regions.GAP
    with (folder / tensor.file).open("rb") as f:
        return regions.read(regions.stream(f), tensor.offset, tensor.spec, part, gap)


def blocks(read: Callable[[regions.Index], np.ndarray], spec: TensorSpec) -> Iterator[np.ndarray]:
    """An array as `write` wants it: in blocks in row-major order.

    Args:
      read: any part of the array.
      spec: of the array.
    """
    for part in regions.blocks(spec.shape, spec.dtype.itemsize):
        yield read(part)


def write_at(descriptor: int) -> regions.WriteAt:
    """Writes into a local file that is open; by any number of threads at once."""

    def pwrite(left: memoryview, at: int) -> None:
        while left:
            n = os.pwrite(descriptor, left, at)
            left, at = left[n:], at + n

    return pwrite


def fsync(path: str) -> None:
    """Returns when a local file is on the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
