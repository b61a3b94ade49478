"""train.py as a child of a Ray worker: started in the project's folder, told to stop, watched to its end.

A process of its own, as a worker runs its function in a thread: there are no signal handlers there, the
folder and the arguments are Ray's, and a program that leaves by os._exit would take the worker with it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from deepseek_jax.launch.ray.link import Output
from deepseek_jax.runtime import libc


class Process:
    """One process, in a session of its own. The kernel kills it when the worker ends (on Linux)."""

    def __init__(self, command: list[str], folder: str, env: dict[str, str], output: Output):
        """Starts it.

        Args:
          command: as for Python.
          folder: where it works.
          env: all of its environment.
          output: takes its lines.

        Raises:
          OSError: the folder is not there.
        """
        self._output = output
        self._code: int | None = None
        # Of the thread that starts it the kernel says that it is the parent: the one that calls `end`.
        self._popen = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=libc.die_with(os.getpid()),
        )
        self._readers = [
            threading.Thread(target=self._pass_on, args=(error, stream), daemon=True)
            for error, stream in ((False, self._popen.stdout), (True, self._popen.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """Its exit code, 128 + N for signal N; None while it runs. What it left in its session is killed."""
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if self._code is None and os.waitid(os.P_PID, self.pid, ended) is not None:
            self._kill_session()  # before wait(), which lets another process have its number
            code = self._popen.wait()
            self._code = 128 - code if code < 0 else code
        return self._code

    @property
    def said(self) -> str:
        """Its last line on stderr so far."""
        return self._output.last

    def signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.code is None:
            # Popen.send_signal would reap a process that has ended, before `code` sees it.
            os.kill(self.pid, number)

    def end(self, grace: float) -> int:
        """Waits for its end and its last lines, kills it after `grace` seconds."""
        until = time.monotonic() + grace
        while (code := self.code) is None:
            if time.monotonic() >= until:
                self._kill_session()
            time.sleep(0.02)
        for reader in self._readers:
            reader.join(timeout=5)
        return code

    def _kill_session(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nothing is left (macOS: the latter)
            pass

    def _pass_on(self, error: bool, stream: IO[bytes]) -> None:
        for line in stream:
            self._output.add(error, line)
