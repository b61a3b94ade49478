"""The head of a safetensors file and the index of several, checked before anything else is read or allocated.

A file is 8 bytes N, little-endian; N bytes of JSON {name: {"dtype", "shape", "data_offsets": [from, to]},
"__metadata__": {str: str}}; then the bytes of the tensors, row-major, without gaps
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from typing import Any, NamedTuple

from etils import epath

from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.arrays import DTYPES, NAMES, TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile, cannot_open, check_name

MAX_HEADER = 1 << 25  # bytes; a file of 100,000 tensors has a head of 10 MB
MAX_DIMENSIONS = 32


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: str  # name in its folder
    spec: TensorSpec
    offset: int  # bytes from the start of the file


def read(path: epath.PathLike, shown: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Nothing but its head is read.

    Args:
      path: of the file, here or remote.
      shown: what messages call it; None: its name.

    Raises:
      BadFile: the file is missing or is not what the format wants, and how.
    """
    file = epath.Path(path)
    shown = shown or file.name
    try:
        size = file.stat().length
        with file.open("rb") as f:
            first = f.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= size - 8:
                raise BadFile(shown, f"its head of {length} bytes does not fit into {size} bytes")
            if length > MAX_HEADER:
                raise BadFile(shown, f"its head of {length} bytes is above {MAX_HEADER}")
            raw = f.read(length)
    except OSError as e:
        raise cannot_open(shown, e) from e
    return parse(raw, size, file.name, shown)


def parse(raw: bytes, size: int, file: str, shown: str | None = None) -> dict[str, StoredTensor]:
    """The tensors that a head tells of.

    Args:
      raw: the JSON of the head.
      size: bytes of the whole file.
      file: its name.
      shown: as `read`.

    Raises:
      BadFile: as `read`.
    """
    shown = shown or file
    value = bounded_json.parse(raw, shown)
    if not isinstance(value, dict):
        raise BadFile(shown, "its head is not a JSON object")
    about = value.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise BadFile(shown, "its __metadata__ is not text by name")
    data, end, out = 8 + len(raw), 0, {}
    entries = [(_entry(name, entry, shown), name) for name, entry in value.items()]
    for (spec, start, stop), name in sorted(entries, key=lambda e: (e[0][1], e[0][2])):
        if start != end:
            raise BadFile(
                shown,
                f"{name[:80]!r} begins at byte {start} and not at {end}: tensors overlap or leave a gap",
            )
        end = stop
        out[name] = StoredTensor(file, spec, data + start)
    if data + end != size:
        raise BadFile(shown, f"it has {size} bytes, and its head tells of {data + end}")
    return out


def _entry(name: str, entry: object, file: str) -> tuple[TensorSpec, int, int]:
    shown = repr(name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFile(file, f"{shown} has not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(
            file, f"{shown} has the dtype {str(dtype)[:40]!r}, which is none of {', '.join(DTYPES)}"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadFile(file, f"{shown} has no shape of at most {MAX_DIMENSIONS} numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise BadFile(file, f"{shown} has no two data_offsets")
    spec = TensorSpec(tuple(shape), DTYPES[dtype])
    # Python's integers do not wrap around. Zeros are left out of the product: one beside huge sizes would
    # pass here and overflow later.
    if math.prod(n for n in shape if n) >= 2**63 or offsets[1] - offsets[0] != spec.nbytes:
        raise BadFile(file, f"{shown}, {spec}, does not have {offsets[1] - offsets[0]} bytes")
    return spec, *offsets


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_index(path: epath.PathLike) -> dict[str, str]:
    """{tensor: file} of a `*.safetensors.index.json`; the files are beside it.

    Raises:
      BadFile: it is not such an index, or names a file elsewhere.
    """
    name = epath.Path(path).name
    value = bounded_json.read(path, name, MAX_HEADER)
    return parse_index(value, name)


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


def encode(tensors: dict[str, TensorSpec]) -> bytes:
    """The head of a file. The tensors' bytes must follow in the same order."""
    # transformers refuses a file that does not say "pt".
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in tensors.items():
        head[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # aligned data can be mapped
    return struct.pack("<Q", len(raw)) + raw
