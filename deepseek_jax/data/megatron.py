"""The index NAME.idx that Megatron-LM's preprocess_data.py writes beside NAME.bin
(megatron/core/datasets/indexed_dataset.py).

Little-endian: magic, version uint64, dtype code uint8, sequences uint64, document indexes uint64; then of
each sequence its length in tokens (int32) and its place in bytes (int64); then the documents' first sequences
and, last, the number of sequences (int64).
"""

import os
from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes
# 6 and 7 are floating point in every version; token ids are none of these.
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class Index(NamedTuple):
    dtype: np.dtype
    offsets: np.ndarray  # int64 [documents + 1], in tokens


def index_path(path: str) -> str:
    return os.path.splitext(path)[0] + ".idx"


def read_index(path: str, where: str) -> Index | None:
    """What the NAME.idx beside NAME.bin says of it; None without one.

    Args:
      path: the .bin file.
      where: `option=value`, for messages.

    Raises:
      UserError: it is another kind of index, of another file, or damaged.
      OSError: it cannot be read.
    """
    place = index_path(path)
    if not path.lower().endswith(".bin") or not os.path.exists(place):
        return None

    def wrong(what):
        return UserError(
            f"{where}: {place} beside {path} {what}. Make both again with "
            f"Megatron-LM's preprocess_data.py, or move the .idx away."
        )

    with open(place, "rb") as f:
        head = f.read(HEADER)
    if len(head) < HEADER or not head.startswith(MAGIC):
        raise wrong("is no index of Megatron-LM (it does not begin with MMIDIDX)")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    if version != 1 or code not in DTYPES:
        raise wrong(
            f"has version {version} and dtype code {code}; read are version 1 and whole numbers, "
            f"codes {', '.join(map(str, DTYPES))}"
        )
    needed, size = HEADER + 12 * sequences + 8 * documents, os.path.getsize(place)
    if size not in (
        needed,
        needed + sequences,
    ):  # the latter: with a mode of each sequence (multimodal)
        raise wrong(
            f"is damaged: it has {size} bytes, and {sequences} sequences and {documents} documents "
            f"need {needed}"
        )

    def part(dtype, count, at):
        return np.fromfile(place, dtype, count, offset=at).astype(np.int64)

    lengths = part("<i4", sequences, HEADER)
    places = part("<i8", sequences, HEADER + 4 * sequences)
    firsts = part("<i8", documents, HEADER + 12 * sequences)
    dtype = np.dtype(DTYPES[code])
    ends = np.cumsum(np.concatenate([[0], lengths]))
    if (lengths < 0).any() or (places != ends[:-1] * dtype.itemsize).any():
        raise wrong("is damaged: its sequences do not follow one another")
    if ends[-1] * dtype.itemsize != os.path.getsize(path):
        raise wrong(
            f"is of another file: it tells of {ends[-1]} tokens of {dtype}, which are "
            f"{ends[-1] * dtype.itemsize} bytes, and there are "
            f"{os.path.getsize(path)}"
        )
    if len(firsts) <= 1:  # writers that never end a document
        return Index(dtype, ends)
    if firsts[0] or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise wrong("is damaged: its documents do not follow one another")
    return Index(dtype, ends[firsts])
