"""The processes of a job agree before JAX starts: each reports to process 0, which judges and
answers all of them.

JAX's own service would end a process with a stack trace and exit code 134 when another one does not
come, or leaves, and cannot say which. Process 0 listens at the coordinator's address, which JAX
uses too, only until all have come.
"""

import time
from collections.abc import Callable
from typing import Any

from deepseek_jax.cluster.ports import listen
from deepseek_jax.cluster.wire import Connection, Hub, Refused, connect

# seconds that a process which knows of a mistake waits to hear whether the others have it too
PATIENCE = 10.0
ENDED = "it ended before training began"

# A process's number under "process", how many it was told there are under "count", a mistake that
# it found under "error".
Report = dict[str, Any]
Judge = Callable[[list[Report]], dict[str, Any]]


class NoAnswer(Exception):
    """Process 0 does not answer, or ended.

    Attributes:
      refused: something answers, which does not accept this job's token.
    """

    def __init__(self, reason: str, refused: bool = False):
        super().__init__(reason)
        self.refused = refused


class _Member:
    """Another process, seen from process 0."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.report: Report | None = None  # of this exchange
        self.gone = False
        self._last: Report = {"process": connection.process, "host": connection.host}

    def reported(self, report: Report) -> None:
        self.report = self._last = report

    def ended(self) -> None:
        """It has closed its connection: that is its report, unless it has given one."""
        self.gone = True
        self.report = self.report or self._last | {"error": ENDED}


class Agreement:
    """Exchanges of reports for verdicts. Every process calls `exchange` equally often, or once more
    with the mistake that ends it.

    Attributes:
      met: all have come once.
    """

    def __init__(
        self,
        address: tuple[str, int],
        count: int,
        index: int,
        token: bytes,
        bind: tuple[str, int] | None = None,
    ):
        """Process 0 listens from now on.

        Args:
          address: host and port at which the others find process 0.
          count: how many processes there are.
          index: which one this is.
          token: of the job.
          bind: where process 0 listens; None: at that port on all interfaces.

        Raises:
          OSError: process 0 cannot listen there.
        """
        self.met = False
        self._address = address
        self._count = count
        self._index = index
        self._token = token
        self._members: list[_Member] = []
        self._hub: Hub | None = None
        self._to_first: Connection | None = None  # in processes other than 0
        if index == 0:
            self._hub = Hub(listen(*(bind or ("", address[1])), count), token, count)

    @property
    def refused(self) -> set[str]:
        """Addresses from which somebody came with another token."""
        return self._hub.refused if self._hub else set()

    def exchange(self, report: Report, judge: Judge, timeout: float) -> dict[str, Any]:
        """Gives in this process's report and returns the verdict, the same in all of them.

        Args:
          report: of this process.
          judge: makes the verdict, in process 0, of the reports that have come, in the order of
            their processes: all, unless one has an error or time ran out.
          timeout: seconds until all must have come the first time. Later they may take as long as they need.

        Raises:
          NoAnswer: nobody answers in time at process 0's address.
        """
        seconds: float | None = None if self.met else timeout
        if report.get("error"):
            seconds = PATIENCE
        if self._hub is None:
            return self._ask(report, seconds)
        reports = [report, *self._hear(self._hub, seconds)]
        verdict = judge(sorted(reports, key=lambda r: r["process"]))
        for member in self._members:
            member.connection.send(**verdict)  # one that is gone is noticed in the next exchange
        return verdict

    def close(self) -> None:
        for end in (self._hub, self._to_first):
            if end is not None:
                end.close()
        self._to_first = None

    def _ask(self, report: Report, seconds: float | None) -> dict[str, Any]:
        """In processes other than 0."""
        deadline = time.monotonic() + (seconds or 0)
        # Process 0 may have come only now, and then gives the others the same time again.
        patience = None if seconds is None else seconds + PATIENCE
        refused_since: float | None = None
        while True:
            try:
                if self._to_first is None:
                    left = max(deadline - time.monotonic(), 1)
                    self._to_first = connect(
                        self._address, self._token, self._index, left, patience or PATIENCE
                    )
                self._to_first.send(**report)
                verdict = self._to_first.receive(patience)
                self.met = True
                return verdict
            except OSError as e:
                self.close()
                now = time.monotonic()
                refused = isinstance(e, Refused)
                refused_since = (refused_since or now) if refused else None
                # A process 0 of another job may be about to end, and leave its port to ours.
                given_up = refused_since is not None and now - refused_since >= PATIENCE
                if self.met or now > deadline or given_up:
                    timed_out = "timed out" if isinstance(e, TimeoutError) else str(e)
                    raise NoAnswer(e.strerror or timed_out, refused) from e
            time.sleep(0.2)

    def _hear(self, hub: Hub, seconds: float | None) -> list[Report]:
        """The other processes' reports; those that come within PATIENCE once there is a mistake."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        for member in self._members:
            member.report = None
            if member.gone:
                member.ended()
        while True:
            reports = [m.report for m in self._members if m.report]
            left = deadline - time.monotonic()
            if len(reports) >= self._count - 1 or left <= 0:
                break
            for connection, messages in hub.wait(min(left, 60)):
                if connection not in [m.connection for m in self._members]:
                    self._members.append(_Member(connection))
                member = next(m for m in self._members if m.connection is connection)
                if messages is None and not self.met:  # it will come again
                    self._members.remove(member)
                    hub.forget(connection)
                    continue
                if messages is None:
                    member.ended()
                elif messages:
                    member.reported(messages[-1] | {"process": connection.process})
                report = member.report
                if report and (report.get("error") or report.get("count") != self._count):
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        if not self.met:
            hub.close_listener()
            self.met = True
        return reports


def difference(reports: list[Report]) -> str | None:
    """One line for what differs between processes, with both values; None if nothing does."""
    found = []
    for what, facts in reports[0]["same"].items():
        for name in facts:
            values: dict[str, int] = {}  # and the first process that has it
            for r in reports:
                values.setdefault(repr(r["same"].get(what, {}).get(name)), r["process"])
            if len(values) > 1:
                found.append((what, name, values))
    if not found:
        return None
    what, name, values = found[0]
    shown = ", ".join(f"{value} (process {process})" for value, process in list(values.items())[:3])
    more = ", ".join(name for _, name, _ in found[1:4])
    others = f" (and so {'do' if len(found) > 2 else 'does'} {more})" if more else ""
    return f"{name} differs between processes{others}: {shown}. Give every process the same {what}."


def other_mistakes(reports: list[Report]) -> list[str]:
    """One line for each mistake that process 0 did not make, with the processes that did."""
    who: dict[str, list[Report]] = {}
    for r in reports:
        if r.get("error") and r["error"] != reports[0].get("error"):
            who.setdefault(r["error"], []).append(r)
    return [
        f"process {', '.join(str(r['process']) for r in made)} ({made[0]['host']}): {text}"
        for text, made in who.items()
    ]
