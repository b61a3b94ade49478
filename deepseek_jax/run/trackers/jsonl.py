"""metrics.jsonl."""

import json
import os

from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run.trackers.base import LostRows, Row


class JsonLines:
    """A file with a JSON object per row. A row is in it whole or not at all, before `write` returns."""

    def __init__(self, path: str, step: int, warning: LostRows):
        self._path = path
        self._step = step
        self._warning = warning
        self._fd: int | None = None
        with warning.about(path):
            self._fd = self._open()

    def write(self, row: Row, load: Load | None) -> None:
        with self._warning.about(self._path):
            if self._fd is None:  # the disk may have room by now
                self._fd = self._open()
            _append(self._fd, json.dumps(row).encode() + b"\n")

    def rewind(self, step: int) -> None:
        self.close()
        self._step = step
        with self._warning.about(self._path):
            self._fd = self._open()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        if os.path.exists(self._path):
            _drop_rows_after(self._path, self._step)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def _append(fd: int, line: bytes) -> None:
    """The whole line or nothing: the next row must not join a torn one."""
    size = os.fstat(fd).st_size
    try:
        if (written := os.write(fd, line)) != len(line):
            os.write(fd, line[written:])  # raises the reason
    except OSError:
        os.ftruncate(fd, size)
        raise


def _drop_rows_after(path: str, step: int) -> None:
    kept = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a row cut short by a kill
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)
