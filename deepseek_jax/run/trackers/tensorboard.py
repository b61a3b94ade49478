"""Event files for TensorBoard."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run.trackers import names
from deepseek_jax.run.trackers.base import LostRows, Row

NOTHING: Any = ()  # in place of a row


class TensorBoard:
    """Event files for TensorBoard, written by a thread of its own.

    tensorboardX's SummaryWriter is not used: its thread ends with the first error of the disk, and
    its queue, once full, blocks the caller. This thread outlives errors, and rows for which its
    queue has no room are dropped.

    Args:
      folder: of the event files.
      step: finished steps; events of later ones in older files are hidden.
      naming: config.log.names.
    """

    QUEUED = 1000  # rows that may wait for a slow disk
    FLUSH_SECONDS = 10.0
    CLOSE_SECONDS = 60.0

    def __init__(self, folder: str, step: int, warning: LostRows, naming: str = "own"):
        self._folder = folder
        self._warning = warning
        self._naming = naming
        self._begin(step)

    def write(self, row: Row, load: Load | None) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((time.time(), row, load))

    def rewind(self, step: int) -> None:
        self.close()
        self._begin(step)

    def close(self) -> None:
        """Waits until what is queued is written or lost; not for ever, as a file server may not answer."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self.CLOSE_SECONDS)
        self._thread.join(self.CLOSE_SECONDS)

    def _begin(self, step: int) -> None:
        self._queue: queue.Queue = queue.Queue(self.QUEUED)
        self._thread = threading.Thread(
            target=self._work, args=(step,), name="tensorboard", daemon=True
        )
        self._thread.start()

    def _work(self, first_step: int) -> None:
        writer: Any = None
        written = flushed = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=self.FLUSH_SECONDS)
            except queue.Empty:
                item = NOTHING
            with self._warning.about(self._folder):
                if item and writer is None:
                    writer = _open_events(self._folder, first_step)
                if item:
                    for event in _events(*item, self._naming):
                        writer.write_event(event)
                    written = time.monotonic()
                now = time.monotonic()
                if writer and written > flushed and now - flushed >= self.FLUSH_SECONDS:
                    flushed = now
                    writer.flush()
            if item is None:
                break
        if writer is not None:
            with self._warning.about(self._folder):
                writer.close()


def _open_events(folder: str, step: int) -> Any:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    os.makedirs(folder, exist_ok=True)
    writer = EventsWriter(os.path.join(folder, "events"))
    # TensorBoard hides what older files say of steps from here on.
    start = SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
    return writer


def _events(wall_time: float, row: Row, load: Load | None, naming: str) -> Iterator[Any]:
    """The events of a row: one per number, and of every layer what its experts and devices received."""
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event

    def event(made: Any) -> Any:
        return Event(wall_time=wall_time, step=row["step"], summary=made)

    for name, value in names.numbers(row).items():
        yield event(summary.scalar(names.tagged(name, naming), value))
    for layer in range(0 if load is None else len(load.rounds)):
        here = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer], np.float64), load)
        if not here.expert_counts.any():
            continue
        share = here.expert_counts / here.expert_counts.mean()
        for name, value in (
            ("layer_max_violation", share.max() - 1),
            ("layer_rounds", here.rounds),
            ("layer_dropped", here.dropped_counts.sum()),
        ):
            yield event(summary.scalar(f"{name}/{layer:02d}", value))
        for name, values in (
            ("layer_expert_load", share),
            ("layer_device_rows", here.received),
        ):
            yield event(summary.histogram(f"{name}/{layer:02d}", values, "auto"))
