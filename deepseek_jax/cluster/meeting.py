"""The processes of a cluster report to process 0 and hear its verdict: a line of JSON each way, over TCP.

It serves before JAX does, because JAX's own service ends a process with a stack trace and exit code 134 when another one does not
come, or leaves, and cannot say which. It listens at the coordinator's address only until all have come; then JAX does.
"""

import json
import random
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0  # seconds that a process which knows of a mistake waits to hear whether the others have it too
ENDED = "it ended before training began"
MAX_LINE = 1 << 22  # bytes of a line: whoever sends more is none of us

# A process's number under "process", how many it was told there are under "count", a mistake that it found under "error".
Report = dict[str, Any]
Judge = Callable[[list[Report]], dict[str, Any]]


class NoAnswer(Exception):
    """Process 0 does not answer, or ended."""


class Peer:
    """Another process, seen from process 0."""

    def __init__(self, s: socket.socket):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket, self.report, self._buffer, self._last = s, None, b"", {}

    def read(self) -> bool:
        """Takes what has come; False if the process is gone or is none of ours."""
        try:
            chunk = self.socket.recv(1 << 16)
            self._buffer += chunk
            if self._buffer.endswith(b"\n"):
                report, self._buffer = dict(json.loads(self._buffer)), b""
                if not isinstance(report["process"], int):
                    return False
                self.report = self._last = report
            return bool(chunk) and len(self._buffer) < MAX_LINE
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def lost(self) -> None:
        """It ended without a report."""
        self.report = self.report or self._last | {"error": ENDED}


class Meeting:
    """The connections. Every process calls `exchange` equally often, or once more with the mistake that ends it.

    Attributes:
      met: all have come once.
    """

    def __init__(
        self,
        host: str,
        port: int,
        count: int,
        index: int,
        bind_host: str = "",
        bind_port: int | None = None,
    ):
        """Process 0 listens from now on, on all interfaces unless told where.

        Args:
          host, port: where the others find process 0.
          count: how many processes there are. index: which one this is.

        Raises:
          OSError: process 0 cannot listen there.
        """
        self._address, self._count, self._index = (host, port), count, index
        self._hub: socket.socket | None = None  # process 0, seen from another one
        self._peers: list[Peer] = []
        self.met = False
        self._listener = listen(bind_host, bind_port or port, count) if index == 0 else None

    def exchange(self, report: Report, judge: Judge, timeout: float) -> dict[str, Any]:
        """Gives in this process's report and returns the verdict, the same in all of them.

        Args:
          judge: makes the verdict, in process 0, of the reports that have come, in the order of their processes: all, unless one
            has an error or time ran out.
          timeout: seconds until all must have come the first time. Later they may take as long as they need.

        Raises:
          NoAnswer: nobody answers in time at process 0's address.
        """
        seconds = PATIENCE if report.get("error") else None if self.met else timeout
        line = json.dumps(report).encode() + b"\n"
        if self._index:
            return self._ask(line, seconds)
        reports = [json.loads(line), *self._hear(seconds)]
        verdict = judge(sorted(reports, key=lambda r: r["process"]))
        for peer in self._peers:
            try:
                peer.socket.settimeout(PATIENCE)
                peer.socket.sendall(json.dumps(verdict).encode() + b"\n")
            except OSError:
                continue  # it is gone, as the next exchange or JAX will see
        return verdict

    def close(self) -> None:
        for s in [p.socket for p in self._peers] + [self._hub, self._listener]:
            if s is not None:
                s.close()
        self._peers, self._hub, self._listener = [], None, None

    def _ask(self, line: bytes, seconds: float | None) -> dict[str, Any]:
        deadline = time.monotonic() + (seconds or 0)
        while True:
            try:
                if self._hub is None:
                    self._hub = socket.create_connection(
                        self._address, timeout=max(deadline - time.monotonic(), 1)
                    )
                    self._hub.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                # Process 0 may have come only now, and gives the others the same time again.
                self._hub.settimeout(seconds and seconds + PATIENCE)
                self._hub.sendall(line)
                with self._hub.makefile("rb") as answer:
                    verdict = dict(json.loads(answer.readline(MAX_LINE)))
                self.met = True
                return verdict
            except (OSError, ValueError, TypeError) as e:
                self.close()
                if self.met or time.monotonic() > deadline:
                    closed = (
                        "timed out" if isinstance(e, TimeoutError) else "the connection was closed"
                    )
                    raise NoAnswer(getattr(e, "strerror", None) or closed) from e
            time.sleep(0.2)

    def _hear(self, seconds: float | None) -> list[Report]:
        """The other processes' reports; those that come within PATIENCE once there is a mistake."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            if self._listener:
                ready.register(self._listener, selectors.EVENT_READ)
            for peer in self._peers:
                peer.report = None
                ready.register(peer.socket, selectors.EVENT_READ, peer)
            while True:
                reports = [p.report for p in self._peers if p.report]
                left = deadline - time.monotonic()
                if len(reports) >= self._count - 1 or left <= 0:
                    break
                for key, _ in ready.select(min(left, 60)):
                    peer = key.data
                    if peer is None:
                        self._peers.append(peer := Peer(self._listener.accept()[0]))
                        ready.register(peer.socket, selectors.EVENT_READ, peer)
                        continue
                    if not peer.read():
                        ready.unregister(peer.socket)
                        if self.met:
                            peer.lost()
                        else:  # a stranger, or one of us that will come again
                            self._peers.remove(peer)
                            peer.socket.close()
                            continue
                    if peer.report and (
                        peer.report.get("error") or peer.report.get("count") != self._count
                    ):
                        deadline = min(deadline, time.monotonic() + PATIENCE)
        if self._listener:
            self._listener.close()
            self._listener = None
            self.met = True
        return reports


def listen(host: str, port: int, backlog: int = 1) -> socket.socket:
    """A listening socket; an empty host means all interfaces. Raises OSError where that cannot be."""
    host = host.strip("[]")
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if both or ":" in host else socket.AF_INET,
        backlog=backlog,
        dualstack_ipv6=both,
    )


def free_port() -> int:
    """A port of this host that nobody listens on, and that the system gives to nobody who asks for any: those come from 32768 on."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        try:
            with listen("127.0.0.1", port):
                return port
        except OSError:
            continue
    with listen("127.0.0.1", 0) as s:
        return s.getsockname()[1]
