"""A file of JSON lines that one process appends to, and that it or the next one goes on with after a kill."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deepseek_jax.errors import UserError

BLOCK = 1 << 20  # bytes read at a time


class RowFile:
    """The file, held by this process alone. A context manager.

    A kill can leave a part of a line at the end: it is cut off when the file is opened again.

    Args:
      path: of the file, which is made where there is none.
      option: that named it, for messages.

    Attributes:
      count: lines that it has.

    Raises:
      UserError: it cannot be written, or another process is at it.
    """

    def __init__(self, path: str, option: str):
        self.path = path
        self._option = option
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise self._not_written(e) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(
                f"{option}: another process is writing {path}. Wait for it, or name another file."
            ) from None
        self.count, end = self._whole_lines()
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def _whole_lines(self) -> tuple[int, int]:
        """How many there are, and the byte where the last one ends."""
        count = end = at = 0
        while block := os.pread(self._file, BLOCK, at):
            if (last := block.rfind(b"\n")) >= 0:
                count, end = count + block.count(b"\n"), at + last + 1
            at += len(block)
        return count, end

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that it has.

        Raises:
          UserError: a line is no object.
        """
        with open(self.path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no object")
                except (ValueError, RecursionError) as e:
                    raise UserError(
                        f"{self._option}: line {number} of {self.path} is not a row ({e}). Remove that line, "
                        f"or name another file."
                    ) from None
                yield row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, which are on the disk when it returns.

        Raises:
          UserError: the disk refused them.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        left = memoryview("".join(lines).encode())
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as e:
            raise self._not_written(e) from None
        self.count += len(lines)

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self._option}: {self.path} cannot be written ({error.strerror}). Make room, or name another "
            f"file; what was written stays."
        )

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
