"""A process of the launcher's, and how its output is passed on."""

import os
import signal
import subprocess
from typing import IO

from deepseek_jax.runtime import libc


class Child:
    """One process, in a session of its own: Ctrl-C reaches it only through the launcher, and what
    it leaves behind can be found.

    Attributes:
      number: JAX_PROCESS_ID.
      place: of --nproc_per_node.
      code: its exit code, 128 + N for signal N; None while it runs.
    """

    def __init__(self, command: list[str], env: dict[str, str], place: int = 0):
        """`env`: besides the launcher's own environment. The output of process 0 goes where the
        launcher's goes."""
        self.number = int(env["JAX_PROCESS_ID"])
        self.place = place
        self.code: int | None = None
        self.killed = False  # by the launcher
        pipe = subprocess.PIPE if self.number else None
        self.popen = subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            preexec_fn=libc.die_with(os.getpid()),
        )

    def ended(self) -> bool:
        """True once, when it has; what it started and left in its session is killed then."""
        if (
            self.code is not None
            or os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            return False
        self._kill_session()  # before wait(), which lets another process have its number
        code = self.popen.wait()
        self.code = 128 - code if code < 0 else code
        return True

    def signal(self, number: int) -> None:
        if self.code is None:
            # Popen.send_signal would reap a process that has ended, before `ended` sees it.
            os.kill(self.popen.pid, number)

    def kill(self) -> None:
        """Works on stopped processes too."""
        if self.code is None:
            self.killed = True
            self._kill_session()

    def _kill_session(self) -> None:
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nothing is left (macOS: the latter)
            pass


class Relay:
    """Passes on the lines of a process, each with its number."""

    def __init__(self, prefix: bytes, out: int):
        """`out`: the file descriptor to write to."""
        self._prefix = prefix
        self._out = out
        self._rest = b""

    def read(self, stream: IO[bytes]) -> bool:
        """Passes on what has come; False at the end."""
        chunk = os.read(stream.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if self._rest and (not chunk or len(self._rest) > 1 << 16):
            lines, self._rest = [*lines, self._rest], b""
        text = b"".join(self._prefix + line + b"\n" for line in lines)
        while text:
            try:
                text = text[os.write(self._out, text) :]
            except OSError:  # nobody reads any more; the processes go on
                break
        return bool(chunk)
