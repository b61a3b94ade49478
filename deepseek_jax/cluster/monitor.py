"""Watches the processes of a cluster over TCP: names the one that was lost, ends the others, and lets all stop after the same step.

Every process has a connection to process 0, beside JAX's own. JAX's service notices a lost process late (after a heartbeat timeout) and
ends the others with a stack trace and exit code 134; collectives raise at once or wait for ever, by kind and by backend. Here a killed process
is known as soon as its connection closes, a stopped one (SIGSTOP, a host without power) when it has been silent for `timeout` seconds.
Messages are lines of JSON.
"""

import contextlib
import ctypes
import faulthandler
import json
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any

from deepseek_jax.cluster.meeting import listen
from deepseek_jax.cluster.signals import leave
from deepseek_jax.errors import ExitCode

LOST = ExitCode.LOST
HUNG = ExitCode.HUNG
MAX_LINE = 1 << 16  # bytes of a line: whoever sends more is none of us
GRACE = 6.0  # seconds that a failed process waits to hear whether another one, lost, is the reason


def delay_abort() -> None:
    """Lets a thread that calls abort() sleep 6 s first: JAX's service aborts the process when process 0 is lost, before we can say so.

    The handler is libc's sleep(), which takes the signal's number, 6, for its seconds, and may be called in a handler (POSIX).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


class Line:
    """One end of a connection: messages out, whole from any thread, and in."""

    def __init__(self, s: socket.socket):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.settimeout(10.0)
        self.socket, self._buffer, self._lock = s, b"", threading.Lock()

    def send(self, **message: Any) -> None:
        """A lost partner is noticed by reading, not here."""
        with contextlib.suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What has come; None if the connection is closed or the partner is none of us."""
        try:
            chunk = self.socket.recv(1 << 16)
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            return (
                [dict(json.loads(line)) for line in lines]
                if chunk and len(self._buffer) < MAX_LINE
                else None
            )
        except (OSError, ValueError, TypeError):
            return None


class Peer:
    """Another process, seen from process 0."""

    def __init__(self, s: socket.socket):
        self.line, self.heard = Line(s), time.monotonic()
        self.index: int | None = None  # not known before its first message
        self.host, self.step, self.left = "", -1, False


class Monitor:
    """This process's part. Ends the process, from a thread, when another one is lost.

    Args:
      program: begins every line it prints. index, count: this process and how many there are.
      timeout: seconds of silence after which a process counts as lost.
    """

    def __init__(self, program: str, index: int, count: int, timeout: float):
        self._program, self._index, self._count, self._timeout = program, index, count, timeout
        self._host, self._changed = socket.gethostname(), threading.Condition()
        self._step, self._training = (
            -1,
            False,
        )  # steps begun when `after` was last called; whether it ever was
        self._asked, self._stop_after, self._number = False, None, None
        self._closed = False
        self._hub: Line | None = None  # process 0, seen from another one
        self._peers: list[Peer] = []  # seen from process 0
        self._answers: dict[int, tuple[int, bool]] | None = (
            None  # to the question when to stop: (step, is training) by process
        )
        self.leave_now = lambda number: leave(
            128 + number
        )  # what ends this process for a signal before training

    # ------------------------------------------------------------------------------------------------------------------ start

    def serve(self, bind_host: str) -> dict[str, Any]:
        """Process 0 listens on a free port of its own. Returns what the others need for `connect`."""
        self._listener = listen(bind_host, 0, self._count)
        self._token = secrets.token_hex(16)
        return {"port": self._listener.getsockname()[1], "token": self._token, "host": self._host}

    def connect(self, host: str, where: dict[str, Any]) -> None:
        """Starts the thread; in processes other than 0 connects first.

        Raises:
          OSError: process 0 cannot be reached at that port.
        """
        delay_abort()
        self._host_of_0 = where["host"]
        if self._index:
            self._hub = Line(socket.create_connection((host, where["port"]), timeout=30))
            self._hub.send(process=self._index, token=where["token"], host=self._host)
        work = self._watch_hub if self._index else self._watch_peers
        threading.Thread(target=work, name="monitor", daemon=True).start()

    def close(self, **why: Any) -> None:
        """This process ends as it should, or, with `failed` and `code`, because of a mistake or a crash that it has said itself."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        message = {"bye": self._index} | why
        if self._index == 0 and "failed" in why:
            self._end_others(
                {"process": 0, "host": self._host, "why": why["failed"], "code": why["code"]}
            )
        for line in [self._hub] if self._hub else [p.line for p in self._peers]:
            line.send(**message)

    # --------------------------------------------------------------------------------------------------- stopping after a step

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, the same in every process, or None. Every process calls it after every step."""
        with self._changed:
            if self._asked:
                self._changed.wait_for(lambda: self._stop_after is not None)
            self._step, self._training = step, True
            return self._number if self._asked and step == self._stop_after else None

    def request_stop(self, number: int) -> None:
        """Asks all processes to stop for a signal. They stop after the step that follows the last one that any has begun."""
        if self._hub:
            self._hub.send(stop=number)
        else:
            self._ask(number)

    def _ask(self, number: int) -> None:
        with self._changed:
            if self._answers is not None or self._closed:
                return
            self._answers = {}
        held = self._hold(number)
        for peer in self._peers:
            peer.line.send(ask=number)
        self._answer(0, *held)

    def _hold(self, number: int) -> tuple[int, bool]:
        """From here on `after` waits for the verdict."""
        with self._changed:
            self._asked, self._number = True, number
            return self._step, self._training

    def _answer(self, process: int, step: int, training: bool) -> None:
        with self._changed:
            self._answers[process] = (step, training)
        self._decide()

    def _decide(self) -> None:
        """The verdict, once all have answered that have not left."""
        with self._changed:
            if self._answers is None or self._stop_after is not None:
                return
            if {
                0,
                *(p.index for p in self._peers if not p.left),
            } - self._answers.keys():  # the others may answer before process 0 itself
                return
            steps = [step for step, training in self._answers.values() if training]
            self._stop_after = max(steps) + 1 if steps else -1
            verdict = {"stop_after": self._stop_after, "number": self._number}
        for peer in self._peers:
            peer.line.send(**verdict)
        self._decided(**verdict)

    def _decided(self, stop_after: int, number: int) -> None:
        if stop_after < 0:  # nobody has begun
            self.leave_now(number) if self._index == 0 else leave(128 + number)
        with self._changed:
            self._stop_after, self._number = stop_after, number
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------------------- losses, hangs

    def failed(self, text: str) -> None:
        """The main thread raised. Waits for a lost process that explains it, which ends this one; otherwise tells the others and returns."""
        time.sleep(GRACE if not self._closed else 0)
        self.close(failed=f"it ended with {text}", code=LOST)

    def hung(self, step: int, seconds: float) -> None:
        """No progress here for so many seconds after `step` finished steps: ends all processes, each with its stacks."""
        if self._hub:
            self._hub.send(hung=step, seconds=seconds)
        else:
            self._end_hung(0, step, seconds)
        time.sleep(GRACE)  # process 0 ends this one; or it hangs itself
        self._end(
            {
                "hung": True,
                "why": f"no step ended for {seconds:.0f} s after step {step}",
                "stacks": True,
                "code": HUNG,
            }
        )

    def _end_hung(self, process: int, step: int, seconds: float) -> None:
        steps = {0: self._step, **{p.index: p.step for p in self._peers if p.index is not None}}
        behind = min(steps.values())
        slow = [str(i) for i, s in sorted(steps.items()) if s == behind]
        where = (
            f"; process {', '.join(slow)} is the furthest behind, at step {behind}"
            if len(slow) < len(steps)
            else ""
        )
        info = {
            "hung": True,
            "why": f"process {process} saw no step end for {seconds:.0f} s after step {step}{where}",
            "stacks": True,
            "code": HUNG,
        }
        self._end_others(info)
        self._end(info)

    def _end_others(self, info: dict[str, Any]) -> None:
        for peer in self._peers:
            peer.line.send(end=info)
        time.sleep(
            0.5 if self._peers else 0
        )  # closed at once, with beats unread, a connection may take back what was sent last

    def _lost(self, peer: Peer, why: str, stacks: bool = False, code: int = LOST) -> None:
        info = {
            "process": peer.index,
            "host": peer.host,
            "why": why,
            "stacks": stacks,
            "code": code,
        }
        self._end_others(info)
        self._end(info)

    def _end(self, info: dict[str, Any], say: bool | None = None) -> None:
        """Ends this process. Process 0 says why; the others do where process 0 is the one that was lost."""
        if self._closed:
            return
        say = (
            self._index == 0 or info.get("process") == 0 or "hung" in info and not self._hub
            if say is None
            else say
        )
        text = ""
        if "hung" in info:
            text = f"{self._program}: a step does not end: {info['why']}. The stacks of all processes follow."
        elif info["code"] == LOST:
            text = (
                f"{self._program}: process {info['process']} ({info['host']}) was lost after step {max(self._step, 0)}: {info['why']}. "
                f"The same command goes on from the newest checkpoint."
            )
        if say and text:
            print(text, file=sys.stderr, flush=True)
        if info.get("stacks"):
            print(
                f"{self._program}: stacks of process {self._index} ({self._host}):",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(Exception):
                faulthandler.dump_traceback(all_threads=True)
        leave(info["code"])

    # ----------------------------------------------------------------------------------------------------------------- threads

    def _silence(self) -> str:
        return (
            f"it gave no sign of life for {self._timeout:g} s (config.watchdog.heartbeat_timeout)"
        )

    @property
    def _beat(self) -> float:
        return min(max(self._timeout / 10, 0.1), 5.0)

    def _watch_hub(self) -> None:
        """In processes other than 0."""
        heard = sent = time.monotonic()
        self._hub.socket.settimeout(None)
        with selectors.DefaultSelector() as ready:
            ready.register(self._hub.socket, selectors.EVENT_READ)
            while not self._closed:
                before = time.monotonic()
                events = ready.select(self._beat)
                now = time.monotonic()
                heard += max(
                    now - before - 2 * self._beat, 0
                )  # this process was not running itself
                if events:
                    heard, messages = now, self._hub.read()
                    if messages is None:
                        return self._end(
                            {
                                "process": 0,
                                "host": self._host_of_0,
                                "why": "its connection closed",
                                "code": LOST,
                            }
                        )
                    for m in messages:
                        self._told(m)
                elif now - heard > self._timeout:
                    self._end(
                        {
                            "process": 0,
                            "host": self._host_of_0,
                            "why": self._silence(),
                            "stacks": True,
                            "code": LOST,
                        }
                    )
                if now - sent >= self._beat:
                    sent = now
                    self._hub.send(beat=self._step)

    def _told(self, m: dict[str, Any]) -> None:
        if "ask" in m:
            step, training = self._hold(m["ask"])
            self._hub.send(at=step, training=training)
        elif "stop_after" in m:
            self._decided(m["stop_after"], m["number"])
        elif "end" in m:
            self._end(m["end"], say=False)
        elif "bye" in m:  # process 0 is done: JAX's own exit waits for the rest
            with self._changed:
                self._closed = True

    def _watch_peers(self) -> None:
        """In process 0."""
        started = sent = time.monotonic()
        with selectors.DefaultSelector() as ready:
            ready.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                before = time.monotonic()
                events = ready.select(self._beat)
                now = time.monotonic()
                own_delay = max(now - before - 2 * self._beat, 0)
                for key, _ in events:
                    peer = key.data
                    if peer is None:
                        peer = Peer(self._listener.accept()[0])
                        ready.register(peer.line.socket, selectors.EVENT_READ, peer)
                        continue
                    messages = peer.line.read()
                    if messages is None or not all(self._heard(peer, m) for m in messages):
                        ready.unregister(peer.line.socket)
                        if peer.index is not None and not peer.left:
                            self._lost(peer, "its connection closed (killed, or its host is gone)")
                for peer in self._peers:
                    peer.heard += own_delay
                    if not peer.left and now - peer.heard > self._timeout:
                        self._lost(peer, self._silence(), stacks=True)
                if len(self._peers) < self._count - 1 and now - started > self._timeout + 60:
                    known = {p.index for p in self._peers}
                    missing = Peer(socket.socket())
                    missing.index, missing.host = (
                        next(i for i in range(1, self._count) if i not in known),
                        "unknown host",
                    )
                    self._lost(missing, "it did not come to process 0's monitor")
                if now - sent >= self._beat:
                    sent = now
                    for peer in self._peers:
                        peer.line.send(beat=self._step)

    def _heard(self, peer: Peer, m: dict[str, Any]) -> bool:
        """Takes one message; False if its sender is none of us."""
        peer.heard = time.monotonic()
        if peer.index is None:
            if m.get("token") != self._token or not isinstance(m.get("process"), int):
                return False
            peer.index, peer.host = m["process"], str(m["host"])
            self._peers.append(peer)
            return True
        if "beat" in m:
            peer.step = m["beat"]
        elif "stop" in m:
            self._ask(m["stop"])
        elif "at" in m:
            self._answer(peer.index, m["at"], m["training"])
        elif "hung" in m:
            self._end_hung(peer.index, m["hung"], m["seconds"])
        elif "failed" in m:
            peer.left = True
            self._lost(peer, m["failed"], code=m["code"])
        elif "bye" in m:
            peer.left = True
            self._decide()
        return True
