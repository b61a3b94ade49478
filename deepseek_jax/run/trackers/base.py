"""What every destination of rows has in common."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from deepseek_jax.model.moe_statistics import Load

Row = Mapping[str, Any]  # names (metrics.METRICS) to numbers, all of them finite, or lists


class Tracker(Protocol):
    """Takes rows, in the order of their steps. No method raises OSError or waits for a disk or a network."""

    def write(self, row: Row, load: Load | None) -> None:
        """`load`: of the step on the host, with leaves [L, ...], for figures by layer."""

    def rewind(self, step: int) -> None:
        """Forgets the rows after `step` finished steps, which will be made again."""

    def close(self) -> None: ...


def say(text: str) -> None:
    """A line on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(f"train.py: {text}", file=sys.stderr, flush=True)


class LostRows:
    """Says on stderr, once, that metrics are being lost."""

    def __init__(self) -> None:
        self._said = False

    @contextlib.contextmanager
    def about(self, path: str) -> Iterator[None]:
        """An OSError inside costs what could not be written, and the first one a line."""
        try:
            yield
        except OSError as e:
            self.say(
                f"{path} cannot be written ({e.strerror or e}): metrics are being lost. Training goes on."
            )

    def say(self, text: str) -> None:
        """Says `text`, the first time."""
        if not self._said:
            self._said = True
            say(text)
