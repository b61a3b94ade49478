"""stdout and stderr of a command.

Any encoding takes any text, and a reader that goes away ends no work. Imports nothing heavy.
"""

import codecs
import errno
import io
import os
import sys
from typing import Literal

Output = Literal["log", "report", "result"]  # what stdout is to a command, see `set_up`
ESCAPE = "deepseek_jax.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Characters that the encoding lacks, as JSON spells them.

    So a line of JSON stays one, and a reader sees which character it was.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


codecs.register_error(ESCAPE, _escape)


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written any more, or raises OSError.

    Args:
      drop_closed: drop what is for a closed pipe.
      drop_all: drop after any error.
    """

    def __init__(self, fd: int, drop_closed: bool, drop_all: bool):
        super().__init__(fd, "wb", closefd=False)
        self.drop_closed = drop_closed
        self.drop_all = drop_all
        self.failed: OSError | None = None  # the last error

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += super().write(view[done:]) or 0
            except OSError as e:
                first, self.failed = self.failed is None, e
                closed = e.errno == errno.EPIPE
                if not (self.drop_all or closed and self.drop_closed):
                    raise
                if first and not closed and self.fileno() == 1:
                    print(
                        f"stdout cannot be written ({e.strerror}). The work goes on; what was said is lost.",
                        file=sys.stderr,
                    )
                break
        return len(view)


_streams: dict[str, _Stream] = {}


def set_up(output: Output = "report") -> None:
    """Lets this process's stdout and stderr take any text in any encoding.

    Replaced streams (a test's) are left alone. A second call changes `output`.

    Args:
      output: what stdout is to the command. It decides what happens after its reader went away (as
        `head` does) or where it cannot be written (a full disk).
        "log": the text is dropped and the work goes on, as its results are elsewhere.
        "report": the same after a closed pipe; another error is raised.
        "result": both are raised, BrokenPipeError and OSError: nothing else would come of the work.
    """
    for fd in (0, 1, 2):  # a closed one (`>&-`) would be the number of the next file that is opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, fd, drops in (
        ("stdout", 1, (output != "result", output == "log")),
        ("stderr", 2, (True, True)),
    ):
        old = getattr(sys, name)
        if name in _streams:
            _streams[name].drop_closed, _streams[name].drop_all = drops
            continue
        if old is None:
            old = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif old is not getattr(sys, f"__{name}__"):
            continue
        old.flush()
        raw = _Stream(fd, *drops)
        unbuffered = old.write_through and isinstance(old.buffer, io.RawIOBase)  # python -u
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                raw if unbuffered else io.BufferedWriter(raw),
                encoding=old.encoding,
                errors=ESCAPE,
                line_buffering=old.line_buffering,
                write_through=old.write_through,
            ),
        )
        _streams[name] = raw


def raised(error: OSError) -> bool:
    """Whether it came from writing to stdout."""
    return "stdout" in _streams and _streams["stdout"].failed is error


def finish() -> OSError | None:
    """Writes what is left; from here on nothing is raised.

    Returns:
      Why stdout could not be written, if a command is to fail for it.
    """
    stream = _streams.get("stdout")
    if stream is None:
        return None
    try:
        sys.stdout.flush()
    except OSError:
        pass
    failed = (
        None
        if stream.drop_all or getattr(stream.failed, "errno", None) == errno.EPIPE
        else stream.failed
    )
    stream.drop_closed = stream.drop_all = True
    return failed
