"""The process of one tool: rows in, the tool's calls out. It imports the tool's package, and no JAX.

    stdin    JSON lines: a `Run`; {"row": ..., "time": ...} each; {"end": true} where the run ends in order
    stdout   JSON lines: {"say": text}; {"lost": reason} where rows are being lost; {"taken": true} when the
             run is open and for each row that is logged, {"taken": false} for one that is not

It outlives the signals that stop the training process, and ends soon after that process, whatever its tool
does.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from deepseek_jax.run.trackers.destination import Destination, Run, Say

QUEUED = 1000  # rows that may wait for a tool
AGAIN_SECONDS = 60.0  # until a tool that could not be opened is asked again
END_SECONDS = 60.0  # after the training process
GIT_SECONDS = 10.0
CLASSES = {  # imported when it is named
    "wandb": ("deepseek_jax.run.trackers.wandb_run", "WandbRun"),
    "mlflow": ("deepseek_jax.run.trackers.mlflow_run", "MlflowRun"),
    "trackio": ("deepseek_jax.run.trackers.trackio_run", "TrackioRun"),
    "clearml": ("deepseek_jax.run.trackers.clearml_task", "ClearmlTask"),
}
VERSIONS = ("deepseek_jax", "jax", "jaxlib", "flax", "optax")


class Sender:
    """Gives rows to a destination.

    What cannot be opened is opened again later, and gets the rows that came meanwhile; a row that cannot be
    logged is lost.

    Args:
      lost: takes the reason why rows are being lost.
      taken: is called when the run is open, and for each row with whether it has arrived.
    """

    def __init__(self, destination: Destination, lost: Say, taken: Callable[[bool], None]):
        self._destination = destination
        self._lost = lost
        self._taken = taken
        self._rows: collections.deque[dict[str, Any]] = collections.deque(maxlen=QUEUED)
        self._opened = False
        self._again = 0.0

    def open(self) -> None:
        if self._opened or time.monotonic() < self._again:
            return
        try:
            self._destination.open()
            self._opened = True
            self._taken(True)
        except Exception as e:
            self._lost(explained(e))
            self._again = time.monotonic() + AGAIN_SECONDS

    def send(self, row: dict[str, Any]) -> None:
        if len(self._rows) == QUEUED:
            self._taken(False)  # the oldest, which has to go
        self._rows.append(row)
        self.open()
        while self._opened and self._rows:
            item = self._rows.popleft()
            try:
                self._destination.log(item["row"], item["time"])
                self._taken(True)
            except Exception as e:
                self._lost(explained(e))
                self._taken(False)

    def close(self, failed: bool) -> None:
        if not self._opened:
            return
        try:
            self._destination.close(failed)
        except Exception as e:
            self._lost(explained(e))


def serve(
    lines: Iterable[bytes],
    make: Callable[[Run, Say], Destination],
    say: Say,
    lost: Say,
    taken: Callable[[bool], None],
    at_end: Callable[[], None],
) -> None:
    """Everything from the first line to the end of `lines`, where `at_end` is called, in another thread."""
    items: queue.Queue = queue.Queue(QUEUED)

    def read() -> None:
        for line in lines:  # as they come: the process that writes them must never wait
            try:
                items.put_nowait(json.loads(line))
            except queue.Full:
                lost("it does not keep up")
                taken(False)
            except ValueError:  # cut short: the training process was killed
                continue
        at_end()
        items.put(None)

    threading.Thread(target=read, name="rows", daemon=True).start()
    if (first := items.get()) is None:
        return
    run = Run(**first)
    sender = Sender(make(run, say), lost, taken)
    sender.open()
    failed = True
    while (item := items.get()) is not None:
        if "end" in item:
            failed = False
        else:
            sender.send(item)
    sender.close(failed)


def explained(error: Exception) -> str:
    """One line."""
    first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def facts() -> dict[str, Any]:
    """The commit of the folder that the run was started in, where that is a checkout, and versions."""
    out: dict[str, Any] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out["git/commit"] = _git("rev-parse", "HEAD")
        out["git/changed"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    out["versions/python"] = sys.version.split()[0]
    for package in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[f"versions/{package}"] = metadata.version(package)
    return out


def _git(*arguments: str) -> str:
    p = subprocess.run(
        ["git", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=GIT_SECONDS,
        check=True,
    )
    return p.stdout.strip()


def make(run: Run, say: Say) -> Destination:
    """The destination of a tool, with what this process knows of the run besides."""
    module, name = CLASSES[run.tool]
    cls = getattr(importlib.import_module(module), name)
    return cls(dataclasses.replace(run, facts={**run.facts, **facts()}), say)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # schedulers send them to every process of a job
    with contextlib.suppress(OSError):
        os.nice(10)  # importing MLflow takes a core for seconds
    lines = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a tool that asks for a password gets none
    os.dup2(2, 1)  # what tools print goes to the log, with their errors

    writing = threading.Lock()

    def answer(value: dict[str, Any]) -> None:
        with writing, contextlib.suppress(OSError, ValueError):
            answers.write(json.dumps(value) + "\n")
            answers.flush()

    serve(
        lines,
        make,
        lambda text: answer({"say": text}),
        lambda text: answer({"lost": text}),
        lambda arrived: answer({"taken": arrived}),
        _end_soon,
    )


def _end_soon() -> None:
    timer = threading.Timer(END_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
