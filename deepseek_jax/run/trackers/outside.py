"""A destination in a process of its own, seen from the training process."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run.trackers import base
from deepseek_jax.run.trackers.base import LostRows, Row
from deepseek_jax.run.trackers.destination import FOLDER, Run

CHILD = "deepseek_jax.run.trackers.child"
# With the modules that the training process sees, whatever folder or script it was started from.
PROGRAM = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    f"importlib.import_module('{CHILD}').main()"
)


class Outside:
    """Rows for a process that calls a tool's package (child.py), by a queue and a thread.

    No method waits for the tool but `close`. Whatever goes wrong there costs rows, and one line on stderr.

    Args:
      run: with a workdir that exists.
    """

    QUEUED = 1000  # rows that may wait for the process
    CLOSE_SECONDS = 30.0  # for a tool that works
    FAILING_SECONDS = 5.0  # for one that did not log the last row
    STUCK_SECONDS = 60.0  # one that has taken nothing for so long is waited for no longer

    def __init__(self, run: Run):
        self._run = run
        self._log = os.path.join(run.workdir, FOLDER, f"{run.tool}.log")
        self._warning = LostRows()
        self._queue: queue.Queue = queue.Queue(self.QUEUED)
        self._process: subprocess.Popen | None = None
        self._ending = False
        self._killed = False
        self._counting = threading.Lock()
        self._waiting = 1  # the run, and rows, that the tool has not taken
        self._moved = time.monotonic()  # when it took the last one, or when the first of them came
        self._opened = False
        self._failing = False
        self._thread = threading.Thread(target=self._work, name=run.tool, daemon=True)
        self._thread.start()

    def write(self, row: Row, load: Load | None) -> None:
        try:
            self._queue.put_nowait({"row": row, "time": time.time()})
        except queue.Full:
            return self._lost("it does not keep up")
        with self._counting:
            self._moved = self._moved if self._waiting > 0 else time.monotonic()
            self._waiting += 1

    def rewind(self, step: int) -> None:
        """None of these tools takes rows back: those that are made again stand beside them."""

    def end(self) -> None:
        """Begins to close, and does not wait."""
        self._ending = True
        while True:
            try:
                return self._queue.put_nowait(None)
            except queue.Full:  # of a process that takes nothing
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Waits until the tool has all rows; for so many seconds at most, and then ends its process. One that
        is out of reach, or has stopped taking rows, is not waited for."""
        seconds = min(seconds, self._patience())
        deadline = time.monotonic() + seconds
        if not self._ending:
            self.end()
        self._thread.join(seconds)
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._killed = True
            self._lost("it has not taken all rows in time")
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join(1)

    def _patience(self) -> float:
        if self._failing:
            return self.FAILING_SECONDS if self._opened else 0.0
        stuck = time.monotonic() - self._moved if self._waiting > 0 else 0.0
        return max(self.STUCK_SECONDS - stuck, 0.0)

    def _work(self) -> None:
        try:
            self._process = process = self._start()
        except OSError as e:
            return self._lost(f"its process cannot be started ({e.strerror})")
        self._listener = threading.Thread(
            target=self._listen, args=(process,), name=f"{self._run.tool} answers", daemon=True
        )
        self._listener.start()
        item: dict[str, Any] | None = dataclasses.asdict(self._run)
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # the process is gone: `_listen` says so
            while item is not None:
                process.stdin.write(json.dumps(item).encode() + b"\n")
                process.stdin.flush()
                item = self._queue.get()
            process.stdin.write(b'{"end": true}\n')
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _start(self) -> subprocess.Popen:
        log: Any = subprocess.DEVNULL
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self._log), exist_ok=True)
            log = open(self._log, "ab")
        try:
            return subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which then closes this
            )
        finally:
            if log is not subprocess.DEVNULL:
                log.close()

    def _listen(self, process: subprocess.Popen) -> None:
        """What the process says, until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if "say" in answer:
                    base.say(answer["say"])
                elif "taken" in answer:
                    self._took(answer["taken"])
                else:
                    self._failing = True
                    self._lost(answer["lost"])
        if process.wait() and not self._killed:
            self._lost(f"its process ended with {process.returncode}")

    def _took(self, arrived: bool) -> None:
        with self._counting:
            self._waiting -= 1
            self._moved = time.monotonic()
            if arrived:
                self._opened, self._failing = True, False

    def _lost(self, reason: str) -> None:
        self._warning.say(
            f"log.trackers={self._run.tool}: {reason}: rows are missing there. Training goes on, and "
            f"metrics.jsonl has all of them. More is in {self._log}"
        )
