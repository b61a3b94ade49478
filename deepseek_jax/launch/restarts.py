"""When the launcher starts its processes again, and how many of them. No processes here, only decisions."""

import signal
from typing import NamedTuple

from deepseek_jax.cluster.signals import SIGNALS
from deepseek_jax.errors import ExitCode, stopped_by

# Done; a mistake; bad numbers, which would come again; stopped by a signal.
NEVER = (
    ExitCode.DONE,
    ExitCode.MISTAKE,
    ExitCode.BAD_NUMBERS,
    *(stopped_by(s) for s in SIGNALS),
)
STEADY = 600.0  # seconds: processes that lasted so long begin with a clean record
LONGEST_DELAY = 60.0


class Start(NamedTuple):
    """The next start."""

    places: list[int]  # of the processes, out of the launcher's: each has its own GPUs
    delay: float  # seconds until then
    text: str  # what to say


class Restarts:
    """Decides after every end of the processes.

    A process that fails first twice in a row is given up, with its GPUs, as long as `at_least`
    others are left. Where so few do not fit the mesh (exit code 2), the next fewer are tried.

    Attributes:
      places: in use, in order.
      count: processes to start with.
    """

    def __init__(self, count: int, at_least: int, most: int):
        """
        Args:
          count: processes to start with.
          at_least: the fewest to go on with.
          most: how often to start again.
        """
        self.places = list(range(count))
        self.count = count
        self._at_least = at_least
        self._most = most
        self._made = 0
        self._in_row = 0
        self._last_failed: int | None = None

    @property
    def may_shrink(self) -> bool:
        """Whether it may go on with fewer than all."""
        return self._at_least < self.count

    def after(self, code: int, failed: int | None, lasted: float) -> Start | None:
        """What comes after all processes have ended.

        Args:
          code: their exit code.
          failed: the place that failed first.
          lasted: seconds that they ran.

        Returns:
          None: nothing more.
        """
        if (
            code == ExitCode.MISTAKE
            and len(self.places) < self.count
            and self._last_failed is not None
        ):
            if len(self.places) <= self._at_least:
                return None
            self.places = self.places[:-1]
            return Start(
                self.places,
                0.0,
                f"{len(self.places) + 1} processes do not fit; trying {len(self.places)}.",
            )
        if code in NEVER or self._made >= self._most:
            return None
        if lasted > STEADY:
            self._in_row = 0
            self._last_failed = None
        given_up = ""
        if failed is not None and failed == self._last_failed and len(self.places) > self._at_least:
            self.places = [p for p in self.places if p != failed]
            given_up = f" without place {failed}, which failed twice in a row"
        self._made += 1
        self._in_row += 1
        self._last_failed = failed
        delay = min(2.0 ** (self._in_row - 1), LONGEST_DELAY)
        plural = "es" * (len(self.places) > 1)
        return Start(
            self.places,
            delay,
            f"restart {self._made} of {self._most} in {delay:g} s, with {len(self.places)} "
            f"process{plural}{given_up}.",
        )

    def grow(self) -> Start | None:
        """All places again, by request; None if they are in use already."""
        if len(self.places) == self.count:
            return None
        self.places = list(range(self.count))
        self._last_failed = None
        self._in_row = 0
        return Start(self.places, 0.0, f"starting again with all {self.count} processes.")


def first_failed(ended: list[tuple[int, int, bool]]) -> tuple[int, int | None]:
    """(exit code of all, place that failed first) of processes in the order of their ends.

    Args:
      ended: (place, exit code, whether the launcher had to kill it). A process that had to be
        killed is what the others missed, where they say that one was lost.
    """
    own = [
        (place, code)
        for place, code, killed in ended
        if code and code != ExitCode.LOST and not killed
    ]
    if own:
        return own[0][1], own[0][0]
    lost = any(code == ExitCode.LOST for _, code, _ in ended)
    stuck = [place for place, code, killed in ended if killed]
    if stuck:
        return (ExitCode.LOST if lost else stopped_by(signal.SIGKILL)), stuck[0]
    return (ExitCode.LOST if lost else ExitCode.DONE), None
