"""Signals that stop a run: before the first step they end the process in one line, later they stop
the run after its step, with a checkpoint. A second SIGINT or SIGTERM ends it at once.

The other signals stop a run but never end it at once: a closed terminal sends SIGHUP twice, systemd
sends it after SIGTERM, and SLURM's --signal=USR1@120 announces the SIGTERM that follows.

Imports nothing heavy, so that train.py can install it before anything else. A thread acts on the
signals: the main thread may be inside the compiler or wait for a device, where Python calls no
handler.
"""

import os
import signal
import socket
import sys
import threading
from typing import Any, NoReturn

from deepseek_jax.errors import stopped_by

URGENT = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def leave(code: int, text: str = "") -> NoReturn:
    """Ends the process at once, from any thread: no exit handler runs. JAX's would wait for other
    processes, which may be gone."""
    try:
        if text:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Stopper:
    """What a run is told about signals. Without `install` it hears of none."""

    def __init__(self, program: str = "train.py"):
        """`program` begins every line it prints."""
        self._program = program
        self._lock = threading.Lock()
        self._number: int | None = None  # the first signal
        self._urgent = 0  # how many of URGENT have come
        self._training = False
        self._saved = False
        self._before: dict[int, object] = {}  # handlers that `install` has replaced, by signal
        self._monitor: Any = None

    def install(self) -> "Stopper":
        """Takes over SIGNALS, except those that are ignored (nohup, a shell's background job). Call
        it in the main thread."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        self._sockets = ours, theirs

        def listen() -> None:
            while numbers := theirs.recv(64):
                for number in numbers:
                    if number in self._before:
                        self._received(number)

        threading.Thread(target=listen, name="signals", daemon=True).start()
        return self

    def _received(self, number: int) -> None:
        with self._lock:
            first, self._number = self._number is None, self._number or number
            self._urgent += number in URGENT
        if self._urgent > 1 and number in URGENT:
            leave(
                stopped_by(number), f"{self._program}: ended at once by a second signal, {number}."
            )
        elif not first:
            return
        elif self._monitor:
            self._monitor.request_stop(number)
        elif not self._training:
            self.leave_now(number)

    def leave_now(self, number: int) -> NoReturn:
        """Ends this process, which has nothing to save."""
        when = (
            "after the last checkpoint"
            if self._saved
            else "before the first step; there was nothing to save"
        )
        leave(stopped_by(number), f"{self._program}: stopped by signal {number} {when}.")

    def end(self) -> None:
        """The last step is done and saved: a signal ends the process at once again."""
        with self._lock:
            self._training = False
            self._saved = True

    def join(self, monitor: Any) -> None:
        """From now on all processes stop together, as a `cluster.monitor.Monitor` lets them agree."""
        monitor.leave_now = self.leave_now
        self._monitor = monitor

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, or None. From the first call on a signal stops
        the run after its step."""
        if self._monitor:
            return self._monitor.after(step)
        with self._lock:
            self._training = True
            return self._number
