"""Several processes that train together: joined after they agree, ended with one line when they cannot or do not.

Alone, all of this does nothing.
"""

import contextlib
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from deepseek_jax import enough_threads
from deepseek_jax.cluster import signals
from deepseek_jax.cluster.discovery import Place
from deepseek_jax.cluster.gpus import Claim, divide, visible_gpus
from deepseek_jax.cluster.meeting import ENDED, Meeting, NoAnswer, Report
from deepseek_jax.cluster.monitor import GRACE, Monitor
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.errors import UserError, one_line


class Cluster:
    """This process among the others, or alone."""

    def __init__(self, place: Place | None, timeout: int, program: str):
        """Process 0 begins to listen.

        Args:
          timeout: seconds until all must have come. program: begins every line about a mistake.

        Raises:
          UserError: process 0 cannot listen.
        """
        self._place, self._timeout, self._program = place, timeout, program
        self.index, self.together = place.index if place else 0, place is not None
        self.monitor: Monitor | None = None  # once joined, where there are others
        if not place:
            return
        self._address = (
            f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}"
        )
        self._bind = _bind(place)
        try:
            self._meeting = Meeting(place.host, place.port, place.count, place.index, *self._bind)
        except OSError as e:
            raise UserError(
                f"--coordinator_address={self._address}: process 0 cannot listen there ({e.strerror}). "
                f"Name its own host and a free port."
            ) from e

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """A UserError inside ends all processes with exit code 2, said once however many found it; alone it is raised."""
        try:
            yield
        except UserError as e:
            if not self._place:
                raise
            if self.index == 0:
                self._say(str(e))  # at once: the others may come late, or never
            try:
                verdict = self._exchange({"error": str(e)})
            except NoAnswer:
                self._say(f"process {self.index}: {e}")
                self._leave(together=False)
            self._leave(verdict["all_came"])

    def close(self) -> None:
        """This process ends as it should: nobody is to miss it."""
        if self.monitor:
            self.monitor.close()

    @contextlib.contextmanager
    def failures(self, *expected: type[Exception]) -> Iterator[None]:
        """An error inside, but for mistakes and `expected`, ends this process at once, before anything waits for the others; alone it is raised.

        Where a lost process made it fail, that is said in place of the error.
        """
        try:
            yield
        except Exception as e:
            if not self.monitor or isinstance(e, (UserError, *expected)):
                raise
            text = one_line(e)
            self.monitor.failed(text)
            self._say(f"process {self.index}: {text}") if isinstance(
                e, OSError
            ) else traceback.print_exception(e)
            signals.leave(1)

    def join(self, command: dict[str, Any], heartbeat_timeout: float, stopper: Stopper) -> None:
        """Compares the processes' options and installation, gives each its GPUs, starts JAX on all and the watch over them; alone does
        nothing.

        Ends all of them with one line if that fails.

        Args:
          command: the options that must be the same everywhere.
          heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
          stopper: hears the signals of this process, which then stop all.
        """
        p = self._place
        if not p:
            return
        gpus, ids = visible_gpus(), os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
        if ids:
            gpus = [g for i, g in enumerate(gpus) if str(i) in ids.replace(" ", "").split(",")]
        python = platform.python_version().rpartition(".")[0]
        installed = {
            "Python": python,
            "JAX": jax.__version__,
            "whether a GPU is visible": bool(gpus),
        }
        command = {"--num_processes": p.count} | command
        mine = {
            "same": {"command": command, "installation": installed},
            "gpus": gpus,
            "may_share": p.may_share and not ids,
        }
        monitor = Monitor(self._program, p.index, p.count, heartbeat_timeout)
        self._where = monitor.serve(self._bind[0]) if p.index == 0 else None
        verdict = self._settle(mine)
        try:
            monitor.connect(p.host, verdict["monitor"])
        except OSError as e:
            raise UserError(
                f"process {p.index} cannot connect to process 0 at {p.host}:{verdict['monitor']['port']} ({e.strerror or e}). "
                f"Open the ports above 1023 between the hosts."
            ) from e
        self.monitor = monitor
        # Through the proxy of http_proxy JAX would not reach process 0, and end with a stack trace.
        direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = f"{direct},{p.host}" if direct else p.host
        jax.config.update("jax_check_proxy_envs", False)
        bind = f"{self._bind[0]}:{self._bind[1]}" if self._bind[0] else None
        enough_threads(1)  # where JAX_NUM_CPU_DEVICES has not asked for more
        jax.config.update(
            "jax_enable_preemption_service", False
        )  # it would take SIGTERM for itself; the monitor does its work
        try:
            # The monitor is to be first: JAX's service ends processes with a stack trace.
            jax.distributed.initialize(
                self._address,
                p.count,
                p.index,
                verdict["gpus"][p.index],
                "deactivate",
                self._timeout,
                coordinator_bind_address=bind,
                heartbeat_timeout_seconds=int(2 * heartbeat_timeout + 60),
            )
        except (RuntimeError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(
                f"JAX cannot start the cluster at {self._address} ({reason}). Try another port."
            ) from e
        stopper.join(monitor)

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Ends all processes with one line if the facts differ between them. `what` the user should make the same."""
        if self._place:
            self._settle({"same": {what: facts}})

    def _settle(self, report: dict[str, Any]) -> dict[str, Any]:
        try:
            verdict = self._exchange(report)
        except NoAnswer as e:
            self._lost()
            late = (
                f"process 0 does not answer at {self._address} within {self._timeout} s ({e}). Check that it runs there, or "
                f"raise --cluster_timeout."
            )
            self._say(
                f"process {self.index}: {'process 0 ended; its output says why.' if self._meeting.met else late}"
            )
            self._leave(together=False)
        if verdict["stop"]:
            if verdict["ended"]:
                self._lost()
            self._leave(verdict["all_came"])
        return verdict

    def _lost(self) -> None:
        """A process that ended without a word is the monitor's to name, where it watches already: it ends this one, with another exit code."""
        if self.monitor:
            time.sleep(GRACE)

    def _exchange(self, report: dict[str, Any]) -> dict[str, Any]:
        mine = {
            "process": self.index,
            "count": self._place.count,
            "host": socket.gethostname(),
            **report,
        }
        verdict = self._meeting.exchange(mine, self._judge, self._timeout)
        if self.index == 0:
            for line in verdict["lines"]:
                self._say(line)
        return verdict

    def _judge(self, reports: list[Report]) -> dict[str, Any]:
        """What process 0 tells all: whether to stop, what it prints about that, and everyone's GPUs."""
        lines, gpus, wrong = [], [None] * self._place.count, any(r.get("error") for r in reports)
        shared: dict[str, Any] = {}
        if wrong:
            lines = other_mistakes(reports)
        elif line := difference(reports) or self._absence(reports):
            lines = [line]
        elif "gpus" in reports[0]:
            try:
                gpus = divide([Claim(r["host"], r["gpus"], r["may_share"]) for r in reports])
            except UserError as e:
                lines = [str(e)]
            shared = {"monitor": self._where}
        return {
            "stop": wrong or bool(lines),
            "lines": lines,
            "gpus": gpus,
            "all_came": len(reports) == self._place.count,
            "ended": any(r.get("error") == ENDED for r in reports),
        } | shared

    def _absence(self, reports: list[Report]) -> str | None:
        came, count = [r["process"] for r in reports], self._place.count
        for a, b in zip(reports, reports[1:]):
            if a["process"] == b["process"]:
                return (
                    f"--process_id={a['process']} is given to two processes ({a['host']} and {b['host']}). "
                    f"Give each its own number, from 0 to {count - 1}."
                )
        missing = [i for i in range(count) if i not in came]
        names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        return missing and (
            f"{len(missing)} of {count} processes did not come to {self._address} within {self._timeout} s: "
            f"number {names}. Start all of them at about the same time, or raise --cluster_timeout."
        )

    def _say(self, text: str) -> None:
        print(f"{self._program}: {text}", file=sys.stderr, flush=True)

    def _leave(self, together: bool) -> NoReturn:
        """Exit code 2. JAX would wait at the exit for processes that do not come."""
        if self.monitor:
            self.monitor.close(
                **{} if together else {"failed": "it ended because of a mistake", "code": 2}
            )
        if not together and jax.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from None


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
    others = (
        f" (and so {'do' if len(found) > 2 else 'does'} {', '.join(n for _, n, _ in found[1:4])})"
        if len(found) > 1
        else ""
    )
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


def _bind(place: Place) -> tuple[str, int]:
    """Where process 0 listens: what JAX reads from the environment, this host alone if all are on it, or everywhere."""
    host, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")
    if port.isdecimal():
        return host, int(port)
    return "127.0.0.1" if place.host in ("localhost", "127.0.0.1") else "", place.port
