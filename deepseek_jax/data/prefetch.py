"""Rows read ahead of the training loop by a background thread."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from deepseek_jax.data.fields import Rows


class TrainRows(Protocol):
    def train_rows(self, start: int, count: int) -> Rows: ...


class Prefetcher:
    """Iterates over `source.train_rows(start, count)` for each request, at most `depth` results ahead.

    A context manager: leaving it stops the thread, at the end of the read it is in. An exception of a read
    comes out of the iteration where its rows would have.
    """

    def __init__(self, source: TrainRows, requests: Iterable[tuple[int, int]], depth: int = 2):
        self._source = source
        self._requests = requests
        self._depth = depth
        self._ready: deque[Rows] = deque()
        self._changed = threading.Condition()
        self._closed = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        error = None
        try:
            for start, count in self._requests:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                rows = self._source.train_rows(start, count)
                with self._changed:
                    self._ready.append(rows)
                    self._changed.notify_all()
        except BaseException as e:  # handed to the reader, which would wait for ever otherwise
            error = e
        finally:
            with self._changed:
                self._error, self._done = error, True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or self._done)
            if self._ready and not self._closed:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None and not self._closed:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        """Stops the thread and waits for it. Idempotent."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()
