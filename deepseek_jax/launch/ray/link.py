"""Between the command and the workers: signals one way, output the other. `Link` is an actor of Ray's."""

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

SPEAKER = "deepseek_jax.launch"  # the beginning of our own lines
Lines = list[tuple[bool, str]]  # (of stderr, text)
_MOST = 100_000  # lines that are kept until the command takes them
_LONGEST = 1 << 16  # characters of a line


class Link:
    """What the command and worker 0 tell each other."""

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._lines: deque[tuple[bool, str]] = deque(maxlen=_MOST)
        self._starts = 0

    def signal(self, number: int) -> None:
        """The command has got a signal."""
        self._signals.append(number)

    def signals(self) -> list[int]:
        """All of them so far."""
        return self._signals

    def began(self, workers: int) -> None:
        """Worker 0 is about to start its process, with so many workers."""
        self._starts += 1
        if self._starts > 1:
            plural = "s" * (workers > 1)
            self.put([(True, f"{SPEAKER}: starting again, with {workers} worker{plural}.")])

    def put(self, lines: Lines) -> None:
        """Takes lines for the command."""
        self._lines.extend(lines)

    def take(self) -> Lines:
        """Gives them, once."""
        lines = list(self._lines)
        self._lines.clear()
        return lines


class Output:
    """The lines of one process: written where this worker writes, which Ray keeps, and collected for the
    command, where those of processes other than 0 begin with their number."""

    def __init__(self, rank: int):
        self._prefix = f"[{rank}] " if rank else ""
        self._lines: Lines = []
        self._lock = threading.Lock()
        self.last = ""  # line of stderr

    def add(self, error: bool, line: bytes) -> None:
        """Takes a line, from any thread."""
        stream = sys.stderr if error else sys.stdout
        try:
            stream.buffer.write(line)
            stream.flush()
        except (OSError, ValueError, AttributeError):  # nobody reads any more
            pass
        text = line.decode(errors="replace").rstrip("\r\n")[:_LONGEST]
        with self._lock:
            self._lines.append((error, self._prefix + text))
            if error and text.strip():
                self.last = text.strip()

    def send(self, put: Callable[[Lines], Any]) -> None:
        """Hands over what has come since the last time."""
        with self._lock:
            lines, self._lines = self._lines, []
        if lines:
            put(lines)


def show(lines: Lines) -> None:
    """Prints lines from the workers."""
    for error, text in lines:
        stream = sys.stderr if error else sys.stdout
        try:
            print(text, file=stream, flush=True)
        except OSError:  # nobody reads any more; the processes go on
            pass
