"""The head of a safetensors file and the index of several, parsed with bounds before anything is read or allocated.

A file is 8 bytes N, little-endian; N bytes of JSON {name: {"dtype", "shape", "data_offsets": [from, to]}, "__metadata__": {str: str}};
then the bytes of the tensors, row-major, without gaps (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from typing import BinaryIO, NamedTuple

from etils import epath

from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.arrays import DTYPES, NAMES, Shape
from deepseek_jax.tensorfile.bounded_json import BadFile, check_name

MAX_HEADER = 1 << 25  # bytes; a file of 100,000 tensors has a head of 10 MB
MAX_DIMENSIONS = 32


class Tensor(NamedTuple):
    """Where a tensor lies in its file."""

    what: Shape
    offset: int  # bytes from the start of the file


def read(path: os.PathLike, file: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Nothing but its head is read.

    Args:
      file: what messages call it; its name by default.

    Raises:
      BadFile: the file is missing or is not what the format wants, and how.
    """
    path = epath.Path(path)
    file = file or path.name
    try:
        size = path.stat().length
        with path.open("rb") as f:
            first = f.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= size - 8:
                raise BadFile(file, f"its head of {length} bytes does not fit into {size} bytes")
            if length > MAX_HEADER:
                raise BadFile(file, f"its head of {length} bytes is above {MAX_HEADER}")
            raw = f.read(length)
    except OSError as e:
        raise BadFile(
            file,
            "missing"
            if isinstance(e, FileNotFoundError)
            else f"cannot be read ({e.strerror or e})",
        ) from e
    return parse(raw, size, file)


def parse(raw: bytes, size: int, file: str) -> dict[str, Tensor]:
    """The tensors that a head of `len(raw)` bytes tells of, in a file of `size` bytes.

    Raises:
      BadFile: as `read`.
    """
    value = bounded_json.parse(raw, file)
    if not isinstance(value, dict):
        raise BadFile(file, "its head is not a JSON object")
    about = value.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise BadFile(file, "its __metadata__ is not text by name")
    data, end, out = 8 + len(raw), 0, {}
    entries = [(_entry(name, entry, file), name) for name, entry in value.items()]
    for (what, start, stop), name in sorted(entries, key=lambda e: (e[0][1], e[0][2])):
        if start != end:
            raise BadFile(
                file,
                f"{name[:80]!r} begins at byte {start} and not at {end}: tensors overlap or leave a gap",
            )
        end = stop
        out[name] = Tensor(what, data + start)
    if data + end != size:
        raise BadFile(file, f"it has {size} bytes, and its head tells of {data + end}")
    return out


def _entry(name: str, entry: object, file: str) -> tuple[Shape, int, int]:
    shown = repr(name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFile(file, f"{shown} has not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(
            file, f"{shown} has the dtype {str(dtype)[:40]!r}, which is none of {', '.join(DTYPES)}"
        )
    whole = lambda numbers: (
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
    )
    if not whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadFile(file, f"{shown} has no shape of at most {MAX_DIMENSIONS} numbers")
    if not whole(offsets) or len(offsets) != 2:
        raise BadFile(file, f"{shown} has no two data_offsets")
    what = Shape(tuple(shape), DTYPES[dtype])
    # Of Python's integers, which do not wrap around. A zero beside huge sizes would pass here and overflow later.
    if math.prod(n for n in shape if n) >= 2**63 or offsets[1] - offsets[0] != what.nbytes:
        raise BadFile(file, f"{shown}, {what}, does not have {offsets[1] - offsets[0]} bytes")
    return what, *offsets


def read_index(path: os.PathLike) -> dict[str, str]:
    """{tensor: file} of a `*.safetensors.index.json`; the files are beside it.

    Raises:
      BadFile: it is not such an index, or names a file elsewhere.
    """
    path = epath.Path(path)
    value = bounded_json.read(path, path.name, MAX_HEADER)
    return parse_index(value, path.name)


def parse_index(value: object, file: str) -> dict[str, str]:
    """As `read_index`, of its JSON."""
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise BadFile(file, "it has no weight_map")
    for name in set(found.values()):
        check_name(name, file)
        if "/" in name or not name.endswith(".safetensors"):
            raise BadFile(
                file, f"it names {name[:80]!r}, which is not a safetensors file beside it"
            )
    return found


def write_header(f: BinaryIO, tensors: dict[str, Shape], about: dict[str, str]) -> None:
    """Writes the head of a file. The tensors' bytes must follow in the same order."""
    head, at = {"__metadata__": about}, 0
    for name, what in tensors.items():
        head[name] = {
            "dtype": NAMES[what.dtype],
            "shape": list(what.shape),
            "data_offsets": [at, at + what.nbytes],
        }
        at += what.nbytes
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # aligned data can be mapped
    f.write(struct.pack("<Q", len(raw)) + raw)
