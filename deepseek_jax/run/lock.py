"""One run per folder: the locks of its workdir and of its checkpoints."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.train.workdir import checkpoints


@contextlib.contextmanager
def all_locked(workdir: str, config: Config, wait: float = 5.0) -> Iterator[None]:
    """Keeps a second run out of the workdir and out of the folder of its checkpoints.

    Remote folders (gs://, s3://) have no locks.

    Args:
      wait: as `locked`.

    Raises:
      UserError: another run has one of them, or the folder of the checkpoints cannot be made.
    """
    folder = checkpoints(workdir, config)
    with locked(workdir, wait), contextlib.ExitStack() as held:
        if "://" not in folder:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as e:
                raise UserError(
                    f"config.checkpoint.dir={folder} cannot be written ({e.strerror}). Name a "
                    "folder that you may write to."
                ) from e
            if (place := _place(folder)) != os.path.realpath(workdir):
                held.enter_context(locked(place, wait, option="config.checkpoint.dir"))
        yield


def _place(folder: str) -> str:
    """Where the lock of a folder of checkpoints is: that of a workdir's own one is the workdir's."""
    folder = os.path.realpath(folder)
    parent, name = os.path.split(folder)
    return parent if name == "checkpoints" and os.access(parent, os.W_OK) else folder


@contextlib.contextmanager
def locked(workdir: str, wait: float = 5.0, option: str = "--workdir") -> Iterator[None]:
    """Keeps a second run out of the folder, which must exist.

    Process 0 of a run takes the lock; readers need none.

    The lock is flock's on WORKDIR/lock: the kernel releases it when this process ends, killed or
    not. What the file says is for people. On NFS since Linux 2.6.12 it holds between hosts. On
    mounts where it is of one host only (Lustre's `localflock`, NFS's `local_lock`), and on other
    remote file systems, a run on another host is not noticed. Where there is no flock at all
    nothing is locked.

    Args:
      wait: seconds in which a killed process may still be ending.
      option: that names the folder, for messages.

    Raises:
      UserError: another run has it.
    """
    path = os.path.join(workdir, "lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise UserError(
            f"{path} cannot be opened ({e.strerror}). Make it writable, or name another {option}."
        ) from e
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break  # no locks here
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{option}={workdir} is in use by another run ({_holder(fd)}). Wait for "
                        "it, stop it, or name another "
                        f"{option}."
                    ) from e
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk
            if (before := os.pread(fd, 5, 0)) and before != b"host ":
                raise UserError(
                    f"{path} is not the lock of a run. Name another {option}, or move that file away."
                )
            os.ftruncate(fd, 0)
            os.pwrite(
                fd,
                f"host {socket.gethostname()}, process {os.getpid()}, since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(),
                0,
            )
        yield
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode(errors="replace").split("\n")[0]
    return "".join(c for c in text if c.isprintable()) or "its process is not known"
