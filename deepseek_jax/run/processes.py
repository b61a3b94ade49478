"""A run among processes that something else has joined: Ray, or jax.distributed.initialize."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax

from deepseek_jax.cluster.exchange import exchange
from deepseek_jax.cluster.processes import Cluster, difference
from deepseek_jax.errors import BadNumbers, SaveFailed, UserError
from deepseek_jax.runtime import environment


class JoinedElsewhere:
    """This process among others that something else started, joined, watches and ends.

    It stands where a `Cluster` does. The processes agree over JAX's coordination service, so a
    mistake of one is raised in all of them.
    """

    together = True
    monitor = None

    def __init__(self) -> None:
        self.index = jax.process_index()
        self._ended = False  # all processes know of the mistake

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Compares facts. Every process calls it.

        Args:
          what: the user should make the same.

        Raises:
          UserError: they differ, or another process found a mistake.
        """
        self._tell({"same": {what: facts}})

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """A UserError inside is raised in every process, when it comes to its next `agree`."""
        try:
            yield
        except UserError as e:
            if not self._ended:
                self._tell({"error": str(e)})
            raise

    @contextlib.contextmanager
    def failures(self, *expected: type[Exception]) -> Iterator[None]:
        """An error is raised: whatever joined the processes is to see it."""
        yield

    def close(self) -> None: ...

    def _tell(self, mine: dict[str, Any]) -> None:
        reports = [
            json.loads(text) | {"process": i}
            for i, text in enumerate(exchange("agree", json.dumps(mine)))
        ]
        wrong = [r for r in reports if "error" in r]
        text = difference(reports) if not wrong else None
        if wrong and "error" not in mine:
            text = f"process {wrong[0]['process']}: {wrong[0]['error']}"
        self._ended = bool(wrong or text)
        if text:
            raise UserError(text)


Processes = Cluster | JoinedElsewhere


@contextlib.contextmanager
def ending_together(processes: Processes) -> Iterator[None]:
    """What ends one process inside ends all: a mistake with one line, however many found it."""
    environment.check()
    with (
        contextlib.closing(processes),
        processes.failures(BadNumbers, SaveFailed),
        processes.mistakes(),
        environment.mistakes(),
    ):
        yield


def here() -> Processes:
    """The processes that this one is among already; alone, if it is among none."""
    if jax.distributed.is_initialized():
        return JoinedElsewhere()
    return Cluster(None, 0, "train.py")
