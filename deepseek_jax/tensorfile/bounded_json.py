"""JSON from files that somebody else may have made: refused where it is too long, too deep or ambiguous."""

import collections
import json
from typing import Any

from etils import epath


class BadFile(Exception):
    """A file of a checkpoint is not what it must be.

    Attributes:
      file: its name inside the checkpoint.
      what: what is wrong with it.
    """

    def __init__(self, file: str, what: str):
        super().__init__(f"{file}: {what}")
        self.file = file
        self.what = what


def cannot_open(file: str, error: OSError) -> BadFile:
    """What to raise where a file is missing or cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    return BadFile(file, "missing" if missing else f"cannot be read ({error.strerror or error})")


def parse(raw: bytes, file: str) -> Any:
    """The value of a JSON text.

    A key that occurs twice, NaN, Infinity, a number beyond 64 bits and nesting beyond Python's stack are
    refused.

    Args:
      raw: the text.
      file: what messages call it.

    Raises:
      BadFile: says why.
    """
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
        )
    except (
        ValueError,
        RecursionError,
    ) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadFile(file, f"not the JSON that it must be ({str(e).splitlines()[0][:100]})") from e


def read(path: epath.PathLike, file: str, limit: int) -> Any:
    """As `parse`, from a file of at most `limit` bytes."""
    return parse(read_bytes(path, file, limit), file)


def read_bytes(path: epath.PathLike, file: str, limit: int) -> bytes:
    """A file of at most `limit` bytes, whole.

    Raises:
      BadFile: it is longer, missing or cannot be read.
    """
    try:
        with epath.Path(path).open("rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise cannot_open(file, e) from e
    if len(raw) > limit:
        raise BadFile(file, f"longer than {limit} bytes, which no such file is")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError("a number is beyond 64 bits")
    return int(digits)


def check_name(name: str, file: str) -> None:
    """Refuses a name that leads out of the checkpoint's folder, or that is no plain name.

    Raises:
      BadFile: `file` holds that name.
    """
    parts = name.split("/")
    if (
        not name
        or len(name) > 1024
        or any(p in ("", ".", "..") or len(p) > 255 for p in parts)
        or not name.isprintable()
        or {"\\", ":"} & set(name)
    ):
        raise BadFile(file, f"it names {name[:80]!r}, which is not a file inside the checkpoint")
