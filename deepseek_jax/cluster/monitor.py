"""Watches the processes of a job: names the one that was lost, ends the others, and lets all stop
after the same step.

Every process has a connection to process 0, beside JAX's own. JAX's service notices a lost process
late (after a heartbeat timeout) and ends the others with a stack trace and exit code 134;
collectives raise at once or wait for ever, by kind and by backend. Here a killed process is known
as soon as its connection closes, a stopped one (SIGSTOP, a host without power) when it has been
silent for `timeout` seconds.

Messages from process 0: ask, stop_after + number (CommonStop), end (why), bye, beat. To process 0:
stop, at + training (CommonStop), hung + seconds, failed + code, bye, beat.
"""

import contextlib
import dataclasses
import faulthandler
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from deepseek_jax.cluster import ports, wire
from deepseek_jax.cluster.common_stop import CommonStop
from deepseek_jax.cluster.end import End
from deepseek_jax.cluster.signals import leave
from deepseek_jax.errors import ExitCode, stopped_by
from deepseek_jax.runtime.libc import delay_abort

GRACE = 6.0  # seconds that a failed process waits to hear whether another one, lost, is the reason
CONNECT_TIMEOUT = 30.0  # seconds
ARRIVAL_TIMEOUT = 60.0  # seconds, beside `timeout`, until all must have connected


@dataclasses.dataclass
class Watched:
    """Another process, seen from process 0."""

    connection: wire.Connection
    heard: float  # when it last gave a sign of life, of time.monotonic()
    step: int = -1
    left: bool = False  # it has said that it ends

    @property
    def index(self) -> int:
        assert self.connection.process is not None  # it has proved which one it is
        return self.connection.process


def leave_for_signal(number: int) -> None:
    leave(stopped_by(number))


class Monitor:
    """This process's part. Ends the process, from a thread, when another one is lost.

    Attributes:
      stop: the step after which all processes stop.
      leave_now: ends process 0, and says so, for a signal that comes before training has begun anywhere.
    """

    def __init__(self, program: str, index: int, count: int, timeout: float, token: bytes):
        """
        Args:
          program: begins every line it prints.
          index: number of this process.
          count: of all processes.
          timeout: seconds of silence after which a process counts as lost.
          token: of the job.
        """
        self.stop = CommonStop(self._send_all, self._present, self._leave_for_signal)
        self.leave_now: Callable[[int], None] = leave_for_signal
        self._program = program
        self._index = index
        self._count = count
        self._timeout = timeout
        self._token = token
        self._host = socket.gethostname()
        self._host_of_0 = ""
        self._closed = False
        self._to_first: wire.Connection | None = None  # in processes other than 0
        self._hub: wire.Hub | None = None  # in process 0
        self._watched: list[Watched] = []  # in process 0

    # Start and end

    def serve(self, bind_host: str) -> dict[str, Any]:
        """Process 0 listens on a free port of its own.

        Returns:
          What the others need for `connect`. With the salt every start of a job has a key of its
          own, so that a process of an earlier start cannot come in.
        """
        salt = wire.new_token()
        listener = ports.listen(bind_host, 0, self._count)
        self._hub = wire.Hub(listener, wire.derived(self._token, salt), self._count)
        return {"port": self._hub.port, "salt": salt, "host": self._host}

    def connect(self, host: str, where: dict[str, Any]) -> None:
        """Starts the thread; in processes other than 0 connects first.

        Args:
          host: of process 0.
          where: as `serve` returned it there.

        Raises:
          OSError: process 0 cannot be reached at that port.
        """
        delay_abort()
        self._host_of_0 = where["host"]
        if self._index:
            key = wire.derived(self._token, where["salt"])
            address = (host, where["port"])
            self._to_first = wire.connect(
                address, key, self._index, CONNECT_TIMEOUT, CONNECT_TIMEOUT
            )
        work = self._watch_first if self._index else self._watch_others
        threading.Thread(target=work, name="monitor", daemon=True).start()

    def close(self, failed: str = "", code: int = 0) -> None:
        """This process ends as it should, or because of a mistake or a crash that it has said itself.

        Args:
          failed: what the others are told of it; empty: nothing is wrong.
          code: their exit code then.
        """
        self._closed = True
        self.stop.cancel()
        why = {"failed": failed, "code": code} if failed else {}
        if self._index == 0 and failed:
            self._end_others(End(failed, code, 0, self._host))
        self._send_all(bye=self._index, **why)

    def _send_all(self, **message: Any) -> None:
        """To process 0; from there to all others."""
        if self._to_first:
            self._to_first.send(**message)
        for other in self._watched:
            other.connection.send(**message)

    # Stopping after a step

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, or None. Every process calls it after every step."""
        return self.stop.after(step)

    def request_stop(self, number: int) -> None:
        """Asks all processes to stop for a signal, after the same step."""
        if self._to_first:
            self._to_first.send(stop=number)
        else:
            self.stop.ask(number)

    def _present(self) -> set[int]:
        return {0, *(w.index for w in self._watched if not w.left)}

    def _leave_for_signal(self, number: int) -> None:
        if self._index == 0:
            self.leave_now(number)
        leave_for_signal(number)

    # Losses and hangs

    def failed(self, text: str) -> None:
        """The main thread raised. Waits for a lost process that explains it, which ends this one;
        otherwise tells the others and returns."""
        time.sleep(0 if self._closed else GRACE)
        self.close(f"it ended with {text}", ExitCode.LOST)

    def hung(self, step: int, seconds: float) -> None:
        """No step has ended here for so many seconds after `step` of them: ends all processes, each
        with its stacks."""
        if self._to_first:
            self._to_first.send(hung=step, seconds=seconds)
        else:
            self._end_hung(0, step, seconds)
        time.sleep(GRACE)  # process 0 ends this one, unless it hangs itself
        self._end(
            End(f"no step ended for {seconds:.0f} s after step {step}", ExitCode.HUNG, stacks=True)
        )

    def _end_hung(self, process: int, step: int, seconds: float) -> None:
        steps = {0: self.stop.step} | {w.index: w.step for w in self._watched}
        behind = min(steps.values())
        slow = [str(i) for i, s in sorted(steps.items()) if s == behind]
        where = ""
        if len(slow) < len(steps):
            where = f"; process {', '.join(slow)} is the furthest behind, at step {behind}"
        saw = f"process {process} saw no step end for {seconds:.0f} s after step {step}{where}"
        self._end_all(End(saw, ExitCode.HUNG, stacks=True))

    def _end_all(self, end: End) -> None:
        self._end_others(end)
        self._end(end)

    def _end_others(self, end: End) -> None:
        for other in self._watched:
            other.connection.send(end=dataclasses.asdict(end))
        # If this process ended at once, with beats unread, its system might take back what was sent last.
        time.sleep(0.5 if self._watched else 0)

    def _lost(
        self, other: Watched, why: str, stacks: bool = False, code: int = ExitCode.LOST
    ) -> None:
        self._end_all(End(why, code, other.index, other.connection.host, stacks))

    def _end(self, end: End, say: bool | None = None) -> None:
        """Ends this process. Process 0 says why; the others do where process 0 is the one that was lost."""
        if self._closed:
            return
        hung = end.code == ExitCode.HUNG
        if say is None:
            say = self._index == 0 or end.process == 0 or (hung and not self._to_first)
        text = end.text(self.stop.step)
        if say and text:
            print(f"{self._program}: {text}", file=sys.stderr, flush=True)
        if end.stacks:
            heading = f"{self._program}: stacks of process {self._index} ({self._host}):"
            print(heading, file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                faulthandler.dump_traceback(all_threads=True)
        leave(end.code)

    # Threads

    def _silence(self) -> str:
        return (
            f"it gave no sign of life for {self._timeout:g} s (config.watchdog.heartbeat_timeout)"
        )

    @property
    def _beat(self) -> float:
        """Seconds between signs of life."""
        return min(max(self._timeout / 10, 0.1), 5.0)

    def _watch_first(self) -> None:
        """In processes other than 0."""
        first, beat = self._to_first, self._beat
        assert first is not None  # of processes other than 0
        heard = sent = time.monotonic()
        with selectors.DefaultSelector() as ready:
            ready.register(first.socket, selectors.EVENT_READ)
            while not self._closed:
                before = time.monotonic()
                events = ready.select(beat)
                now = time.monotonic()
                heard += max(now - before - 2 * beat, 0)  # this process was not running itself
                if events:
                    heard = now
                    messages = first.read()
                    if messages is None:
                        return self._end(
                            End("its connection closed", ExitCode.LOST, 0, self._host_of_0)
                        )
                    for message in messages:
                        self._told(message)
                elif now - heard > self._timeout:
                    self._end(End(self._silence(), ExitCode.LOST, 0, self._host_of_0, stacks=True))
                if now - sent >= beat:
                    sent = now
                    first.send(beat=self.stop.step)

    def _told(self, m: wire.Message) -> None:
        """Takes a message from process 0."""
        if "ask" in m:
            assert self._to_first is not None
            self._to_first.send(**self.stop.hold(m["ask"]))
        elif "stop_after" in m:
            self.stop.decided(m["stop_after"], m["number"])
        elif "end" in m:
            self._end(End(**m["end"]), say=False)
        elif "bye" in m:  # process 0 is done: JAX's own exit waits for the rest
            self._closed = True
            self.stop.cancel()

    def _watch_others(self) -> None:
        """In process 0."""
        hub, beat = self._hub, self._beat
        assert hub is not None  # of process 0
        started = sent = time.monotonic()
        while not self._closed:
            before = time.monotonic()
            events = hub.wait(beat)
            now = time.monotonic()
            for connection, messages in events:
                self._take(connection, messages, now)
            own_delay = max(now - before - 2 * beat, 0)  # this process was not running itself
            for other in self._watched:
                other.heard += own_delay
                if not other.left and now - other.heard > self._timeout:
                    self._lost(other, self._silence(), stacks=True)
            if now - started > self._timeout + ARRIVAL_TIMEOUT:
                self._check_arrival()
            if now - sent >= beat:
                sent = now
                self._send_all(beat=self.stop.step)

    def _check_arrival(self) -> None:
        missing = set(range(1, self._count)) - {w.index for w in self._watched}
        if missing:
            why = "it did not come to process 0's monitor"
            self._end_all(End(why, ExitCode.LOST, min(missing), "unknown host"))

    def _take(
        self, connection: wire.Connection, messages: list[wire.Message] | None, now: float
    ) -> None:
        """In process 0: what has come over a connection."""
        other = next((w for w in self._watched if w.connection is connection), None)
        if other is None:
            other = Watched(connection, now)
            self._watched.append(other)
        if messages is None:
            if not other.left:
                self._lost(other, "its connection closed (killed, or its host is gone)")
            return
        other.heard = now
        for message in messages:
            self._heard(other, message)

    def _heard(self, other: Watched, m: wire.Message) -> None:
        """In process 0: takes one message."""
        if "beat" in m:
            other.step = m["beat"]
        elif "stop" in m:
            self.stop.ask(m["stop"])
        elif "at" in m:
            self.stop.answer(other.index, m["at"], m["training"])
        elif "hung" in m:
            self._end_hung(other.index, m["hung"], m["seconds"])
        elif "failed" in m:
            other.left = True
            self._lost(other, m["failed"], code=m["code"])
        elif "bye" in m:
            other.left = True
            self.stop.decide()
