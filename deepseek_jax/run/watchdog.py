"""Ends a run whose step does not end.

It prints the stacks of all threads, and leaves with an exit code that the launcher restarts after.
"""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from deepseek_jax.cluster.signals import leave
from deepseek_jax.errors import ExitCode

# A time limit that is chosen here is at least this, for slow file systems and clocks that stall, in
# seconds ...
LEAST = 600.0
# ... and at least this many times the median of the last steps.
FACTOR = 20.0


def end_alone(step: int, seconds: float) -> None:
    """What a process without others does about a step that does not end."""
    print(
        f"train.py: a step does not end: none ended for {seconds:.0f} s after step {step}. "
        f"The stacks follow.",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    leave(ExitCode.HUNG)


class Watchdog:
    """A thread that is told of progress by `beat`.

    Seconds in which this process did not run at all (Ctrl-Z, a suspended laptop) do not count.

    Args:
      timeout: `config.watchdog.step_timeout`: seconds without progress. 0: never, no thread is
        started. Below 0: chosen, 20 times the median step and at least 600 s.
      hung: called from the thread with (the last finished step, seconds since then) to end the
      process.
      poll: seconds between looks.
    """

    def __init__(
        self, timeout: float, hung: Callable[[int, float], None] = end_alone, poll: float = 1.0
    ):
        self._timeout = timeout
        self._hung = hung
        self._poll = min(poll, timeout / 4) if timeout > 0 else poll
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._paused = 1  # until the first beat: what comes before it compiles
        self._step = -1
        self._waited = 0.0  # seconds since the last beat, pauses left out
        self._last = time.monotonic()
        self._times: deque[float] = deque(maxlen=100)  # seconds per step
        if timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Something ended: a step, or a batch of an evaluation after `step` steps.

        The first beat starts the watch.
        """
        with self._lock:
            now = time.monotonic()
            if self._step < 0:
                self._paused -= 1
            elif step > self._step and not self._paused:
                self._times.append(now - self._last)
            self._last = now
            self._step = step
            self._waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is inside may take any time: compilation, waiting for a disk."""
        with self._lock:
            self._paused += 1
        try:
            yield
        finally:
            with self._lock:
                self._paused -= 1
                self._waited = 0.0
                self._last = time.monotonic()

    def limit(self) -> float:
        """Seconds without progress after which the run counts as hung."""
        if self._timeout > 0:
            return self._timeout
        return max(LEAST, FACTOR * statistics.median(self._times)) if self._times else LEAST

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            with self._lock:
                # A longer gap than two polls: the process itself did not run.
                self._waited += min(now - before, 2 * self._poll)
                if self._paused:
                    self._waited = 0.0
                step = self._step
                waited = self._waited
                expired = waited > self.limit()
            before = now
            if expired:
                self._hung(step, waited)
                return
