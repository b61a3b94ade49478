"""The step after which all processes stop, when a signal has asked one of them to."""

import threading
from collections.abc import Callable
from typing import Any


class CommonStop:
    """This process's part. Process 0 asks all where they are, and decides when all have answered.

    From the question on `after` holds a process until the decision: nobody can go past the step
    that is chosen.

    Attributes:
      step: steps begun when `after` was last called, -1 before.
      leave_now: ends this process for a signal that comes before training has begun anywhere.
    """

    def __init__(
        self,
        send: Callable[..., None],
        voters: Callable[[], set[int]],
        leave_now: Callable[[int], None],
    ):
        """
        Args:
          send: in process 0 a message to every other process.
          voters: in process 0 the processes that have not left, itself included.
          leave_now: called with the signal's number.
        """
        self.step = -1
        self.leave_now = leave_now
        self._send = send
        self._voters = voters
        self._changed = threading.Condition()
        self._training = False  # whether `after` was ever called
        self._asked = False
        self._cancelled = False
        self._number: int | None = None  # of the signal
        self._stop_after: int | None = None
        self._answers: dict[int, tuple[int, bool]] | None = None  # (step, training) by process

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, the same in every process, or None. Called after
        every step."""
        with self._changed:
            if self._asked:
                self._changed.wait_for(lambda: self._stop_after is not None)
            self.step = step
            self._training = True
            return self._number if self._asked and step == self._stop_after else None

    def ask(self, number: int) -> None:
        """In process 0: asks everybody, once. They stop after the step that follows the last one
        that any has begun."""
        with self._changed:
            if self._answers is not None or self._cancelled:
                return
            self._answers = {}
        mine = self.hold(number)
        self._send(ask=number)
        self.answer(0, **mine)

    def hold(self, number: int) -> dict[str, Any]:
        """From here on `after` waits for the decision. Returns this process's answer."""
        with self._changed:
            self._asked = True
            self._number = number
            return {"at": self.step, "training": self._training}

    def answer(self, process: int, at: int, training: bool) -> None:
        """In process 0: the answer of a process."""
        with self._changed:
            if self._answers is None:
                return
            self._answers[process] = (at, training)
        self.decide()

    def decide(self) -> None:
        """In process 0: decides if all voters have answered. The others may do so before process 0 itself."""
        with self._changed:
            if self._answers is None or self._stop_after is not None:
                return
            if self._voters() - self._answers.keys():
                return
            steps = [step for step, training in self._answers.values() if training]
            stop_after = max(steps) + 1 if steps else -1
            number = self._number
            assert number is not None  # `ask` sets it before process 0, a voter too, has answered
            self._stop_after = stop_after
        self._send(stop_after=stop_after, number=number)
        self.decided(stop_after, number)

    def decided(self, stop_after: int, number: int) -> None:
        """Takes the decision; -1: no process has begun to train, and all end now."""
        if stop_after < 0:
            self.leave_now(number)
        with self._changed:
            self._stop_after = stop_after
            self._number = number
            self._changed.notify_all()

    def cancel(self) -> None:
        """This process ends: it asks nobody any more."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
