"""Where the rows of a run go: metrics.jsonl and TensorBoard; another destination is one more class.

A disk that is full, or gone, costs rows and one warning, never the run.
"""

import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.model.moe_statistics import Load

Row = Mapping[str, Any]  # names (metrics.METRICS) to numbers, all of them finite, or lists


class Tracker(Protocol):
    """Takes rows, in the order of their steps. No method raises OSError or waits for a disk or a network."""

    def write(self, row: Row, load: Load | None) -> None:
        """`load`: of the step on the host, with leaves [L, ...], for figures by layer."""

    def rewind(self, step: int) -> None:
        """Forgets the rows after `step` finished steps, which will be made again."""

    def close(self) -> None: ...


class LostRows:
    """Says on stderr, once, that metrics are being lost."""

    def __init__(self) -> None:
        self._said = False

    @contextlib.contextmanager
    def about(self, path: str) -> Iterator[None]:
        """An OSError inside costs what could not be written, and the first one a line."""
        try:
            yield
        except OSError as e:
            if self._said:
                return
            self._said = True
            text = f"{path} cannot be written ({e.strerror or e}): metrics are being lost."
            with contextlib.suppress(OSError):
                print(f"train.py: {text} Training goes on.", file=sys.stderr)


class Trackers:
    """All destinations of a run; none in processes other than 0.

    Args:
      workdir: gets metrics.jsonl and, with config.log.tensorboard, tensorboard/.
      step: finished steps of the state that the run begins with. Rows of later steps are dropped.
    """

    def __init__(self, workdir: str, config: Config, step: int):
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._trackers: list[Tracker] = []
        if jax.process_index() != 0:
            return
        warning = LostRows()
        self._trackers.append(JsonLines(self._path, step, warning))
        if config.log.tensorboard:
            self._trackers.append(TensorBoard(os.path.join(workdir, "tensorboard"), step, warning))

    def write(self, values: Row, load: Load | None = None) -> None:
        """Writes one row, without what is not finite; `load` as in `Tracker.write`."""
        finite = {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        for tracker in self._trackers:
            tracker.write(finite, load)

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def losses(self, most: int) -> list[float]:
        """The losses of the last rows, at most so many, oldest first; [] in processes other than 0."""
        if not self._trackers:
            return []
        try:
            with open(self._path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
        except (OSError, ValueError):
            return []
        return [row["loss"] for row in rows if "loss" in row][-most:]


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


class TensorBoard:
    """Event files for TensorBoard, written by a thread of its own.

    tensorboardX's SummaryWriter is not used: its thread ends with the first error of the disk, and
    its queue, once full, blocks the caller. This thread outlives errors, and rows for which its
    queue has no room are dropped.

    Args:
      folder: of the event files.
      step: finished steps; events of later ones in older files are hidden.
    """

    QUEUED = 1000  # rows that may wait for a slow disk
    FLUSH_SECONDS = 10.0
    CLOSE_SECONDS = 60.0

    def __init__(self, folder: str, step: int, warning: LostRows):
        self._folder = folder
        self._warning = warning
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
                item = ()
            with self._warning.about(self._folder):
                if item and writer is None:
                    writer = _open_events(self._folder, first_step)
                if item:
                    for event in _events(*item):
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


def _events(wall_time: float, row: Row, load: Load | None) -> Iterator[Any]:
    """The events of a row: one per number, and of every layer what its experts and devices received."""
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event

    def event(made: Any) -> Any:
        return Event(wall_time=wall_time, step=row["step"], summary=made)

    for name, value in row.items():
        if name != "step" and isinstance(value, (int, float)):
            yield event(summary.scalar(name, value))
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
