"""Starts the processes, passes on signals and output, ends all when one fails, and starts them again."""

import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, cast

from deepseek_jax.cluster.signals import SIGNALS, URGENT
from deepseek_jax.errors import ExitCode, stopped_by
from deepseek_jax.launch.child import Child, Relay
from deepseek_jax.launch.restarts import Restarts, first_failed


def _say(text: str) -> None:
    print(f"deepseek_jax.launch: {text}", file=sys.stderr, flush=True)


class Launcher:
    """Starts, watches, ends and restarts the processes, in one thread."""

    def __init__(
        self,
        command: list[str],
        environments: Callable[[list[int]], list[dict[str, str]]],
        grace: float,
        restarts: Restarts,
    ):
        """
        Args:
          command: what each process runs.
          environments: makes, for a list of places, what each process has in its environment
            besides this one's.
          grace: seconds from SIGTERM to SIGKILL.
          restarts: decides when to start again, and how many.
        """
        self._command = command
        self._environments = environments
        self._grace = grace
        self._restarts = restarts
        self._kill_at = float("inf")  # of time.monotonic()
        self._first_failed: Child | None = None
        self._stopped: int | None = None  # the signal that asked for it
        self._urgent = 0  # how many of URGENT have come
        self._grow = False
        self._ready = selectors.DefaultSelector()
        self._signals, self._sender = socket.socketpair()  # a signal wakes select()
        for end in (self._signals, self._sender):
            end.setblocking(False)
        self._ready.register(self._signals, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._sender.fileno())
        for number in (*SIGNALS, signal.SIGCHLD):
            ignored = signal.getsignal(number) is signal.SIG_IGN  # SIGHUP, under nohup
            if number == signal.SIGCHLD or not ignored:
                signal.signal(number, lambda *_: None)
        self._children: list[Child] = []

    def run(self) -> int:
        """Returns the exit code when all processes have ended for good."""
        while True:
            began = time.monotonic()
            code, failed = self._attempt()
            if self._stopped is not None:
                return code
            start = (
                self._restarts.grow()
                if self._grow
                else self._restarts.after(code, failed, time.monotonic() - began)
            )
            self._grow = False
            if start is None:
                return code
            _say(start.text)
            until = time.monotonic() + start.delay
            while self._stopped is None and (left := until - time.monotonic()) > 0:
                self._read(left)
            if self._stopped is not None:
                return stopped_by(self._stopped)

    def _attempt(self) -> tuple[int, int | None]:
        """Starts the processes once. Returns their exit code and the place that failed first, when
        all have ended."""
        self._kill_at = float("inf")
        self._first_failed = None
        ended: list[tuple[int, int, bool]] = []
        places = self._restarts.places
        self._children = [
            Child(self._command, env, place)
            for env, place in zip(self._environments(places), places, strict=True)
        ]
        for child in self._children:
            for stream, out in ((child.popen.stdout, 1), (child.popen.stderr, 2)):
                if stream:
                    self._ready.register(
                        stream, selectors.EVENT_READ, Relay(f"[{child.number}] ".encode(), out)
                    )
        while any(c.code is None for c in self._children):
            self._read(min(max(self._kill_at - time.monotonic(), 0), 60))
            for child in self._children:
                if child.ended():
                    assert child.code is not None  # `ended` has just set it
                    ended.append((child.place, child.code, child.killed))
                    self._after(child)
            if time.monotonic() >= self._kill_at:
                self._kill_at = float("inf")
                for child in self._children:
                    child.kill()
        while len(self._ready.get_map()) > 1 and self._read(0.2):
            continue  # what is left in the pipes
        # Pipes that are still open belong to something that the processes left behind.
        for key in [k for k in self._ready.get_map().values() if k.data is not None]:
            self._forget(key)
        return first_failed(ended)

    def _read(self, wait: float) -> bool:
        """Waits for output, signals and ends of processes; False if none came."""
        events = self._ready.select(wait)
        for key, _ in events:
            if key.data is None:
                for number in self._signals.recv(1 << 10):
                    self._signalled(number)
            elif not key.data.read(key.fileobj):
                self._forget(key)
        return bool(events)

    def _forget(self, key: selectors.SelectorKey) -> None:
        """A pipe that nobody writes to any more."""
        self._ready.unregister(key.fileobj)
        cast(IO[bytes], key.fileobj).close()

    def _signalled(self, number: int) -> None:
        if number == signal.SIGUSR2 and self._restarts.may_shrink:
            if len(self._children) < self._restarts.count and not self._grow:
                self._grow = True
                self._pass_on(signal.SIGTERM)
        elif number in SIGNALS:
            self._stop(number)

    def _stop(self, number: int) -> None:
        """Which signals count as a second one is as in cluster/signals.py."""
        self._urgent += number in URGENT
        if self._urgent > 1 and number in URGENT:
            for child in self._children:
                child.kill()
        elif self._stopped is None:
            self._stopped = number
            if not self._grow:  # else they are stopping
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for child in self._children:
            child.signal(number)

    def _after(self, child: Child) -> None:
        asked = self._stopped is not None or self._grow
        if child.code and not self._first_failed:
            self._first_failed = child
            if not asked:
                why = " (another was lost)" if child.code == ExitCode.LOST else ""
                _say(
                    f"process {child.number} ended with exit code {child.code}{why}; stopping the others."
                )
                self._pass_on(signal.SIGTERM)
        if child.code or asked:
            # Without one of them the others cannot save: where one was lost, there is less to wait for.
            grace = min(self._grace, 5.0) if child.code == ExitCode.LOST else self._grace
            self._kill_at = min(self._kill_at, time.monotonic() + grace)
