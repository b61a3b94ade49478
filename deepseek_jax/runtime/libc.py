"""What only the C library can do for this process, on Linux. Imports nothing heavy.

Each function names what it waits for; tests/runtime/test_libc.py fails where one is no longer needed.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def delay_abort() -> None:
    """A thread that calls abort() sleeps for 6 s first: time for the monitor to say in one line
    what happened, and to end the process.

    JAX's coordination service aborts every process when process 0 is lost ("Terminating process
    because the JAX distributed service detected fatal errors", xla/pjrt/distributed/client.h), also
    with jax_enable_recoverability. No longer needed when jax.distributed.initialize takes a
    callback for that.

    The handler is libc's sleep(), which takes the signal's number, 6, for its seconds and may be
    called in a handler (POSIX).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def trim_memory() -> None:
    """Returns freed memory to the system: glibc keeps it, and nothing of JAX's gives it back
    (openxla/xla issue 2265).

    No longer needed when arrays that pass through a restore leave no memory behind: a tenth of the
    state without this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def die_with(parent: int) -> Callable[[], None] | None:
    """For subprocess' preexec_fn: the kernel kills the new process when its parent ends, however that comes.

    Args:
      parent: number of the process that starts the new one.

    Returns:
      None where the system cannot do that.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return prepare
