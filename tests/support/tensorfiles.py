"""Safetensors files made by hand, good and bad."""

import json
import struct


def head(entries: dict | bytes, data: int = 0, length: int | None = None) -> bytes:
    """A head with its entries, raw or as JSON, and `data` zero bytes; `length` is what it claims."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + b"\0" * data


def tensor(shape=(2,), offsets=(0, 8), dtype="F32", **more) -> dict:
    """One entry of a head."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more
