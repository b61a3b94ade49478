"""Several processes that train together: joined after they agree, ended with one line when they
cannot or do not.

Alone, all of this does nothing.
"""

import contextlib
import itertools
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from deepseek_jax.cluster import signals
from deepseek_jax.cluster.agreement import (
    ENDED,
    Agreement,
    NoAnswer,
    Report,
    difference,
    other_mistakes,
)
from deepseek_jax.cluster.discovery import Membership
from deepseek_jax.cluster.gpus import Claim, divide, visible_gpus
from deepseek_jax.cluster.monitor import GRACE, Monitor
from deepseek_jax.cluster.ports import loopback
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.cluster.wire import TOKEN, job_token
from deepseek_jax.errors import UserError, one_line
from deepseek_jax.runtime.threads import enough_threads


class Cluster:
    """This process among the others, or alone."""

    def __init__(self, member: Membership | None, timeout: int, program: str):
        """Process 0 begins to listen.

        Args:
          member: of which processes, and which of them this one is; None: it is alone.
          timeout: seconds until all must have come.
          program: begins every line about a mistake.

        Raises:
          UserError: process 0 cannot listen.
        """
        self.index = member.process_id if member else 0
        self.together = member is not None
        self.monitor: Monitor | None = None  # once joined, where there are others
        self._member = member
        self._timeout = timeout
        self._program = program
        if not member:
            return
        host = f"[{member.host}]" if ":" in member.host else member.host
        self._address = f"{host}:{member.port}"
        self._bind = _bind(member)
        self._token = job_token(os.environ, member.job)
        try:
            self._agreement = Agreement(
                (member.host, member.port),
                member.num_processes,
                member.process_id,
                self._token,
                self._bind,
            )
        except OSError as e:
            raise UserError(
                f"--coordinator_address={self._address}: process 0 cannot listen there ({e.strerror}). "
                f"Name its own host and a free port."
            ) from e

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """A UserError inside ends all processes with exit code 2, said once however many found it;
        alone it is raised."""
        try:
            yield
        except UserError as e:
            if not self._member:
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
        """Tells the monitor that this exit is intended."""
        if self.monitor:
            self.monitor.close()

    @contextlib.contextmanager
    def failures(self, *expected: type[Exception]) -> Iterator[None]:
        """An error inside ends this process at once, before anything waits for the others; alone it
        is raised.

        Mistakes (UserError) and `expected` errors are raised. If a lost process is the reason, that
        is said in place of the error.
        """
        try:
            yield
        except Exception as e:
            if not self.monitor or isinstance(e, (UserError, *expected)):
                raise
            text = one_line(e)
            self.monitor.failed(text)
            if isinstance(e, OSError):
                self._say(f"process {self.index}: {text}")
            else:
                traceback.print_exception(e)
            signals.leave(1)

    def join(self, command: dict[str, Any], heartbeat_timeout: float, stopper: Stopper) -> None:
        """Compares the processes' options and installation, divides GPUs, starts the watch over all
        processes, then JAX on all.

        Ends all of them with one line if that fails. Alone it does nothing.

        Args:
          command: the options that must be the same everywhere.
          heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
          stopper: hears the signals of this process, which then stop all.
        """
        member = self._member
        if not member:
            return
        count, index = member.num_processes, member.process_id
        monitor = Monitor(self._program, index, count, heartbeat_timeout, self._token)
        self._where = monitor.serve(self._bind[0]) if index == 0 else None
        verdict = self._settle(_first_report(member, command))
        try:
            monitor.connect(member.host, verdict["monitor"])
        except OSError as e:
            at = f"{member.host}:{verdict['monitor']['port']}"
            raise UserError(
                f"process {index} cannot connect to process 0 at {at} ({e.strerror or e}). "
                f"Open the ports above 1023 between the hosts."
            ) from e
        self.monitor = monitor
        # After the monitor: JAX's service ends processes with a stack trace.
        self._start_jax(member, verdict["gpus"][index], heartbeat_timeout)
        stopper.join(monitor)

    def _start_jax(
        self, member: Membership, gpus: list[int] | None, heartbeat_timeout: float
    ) -> None:
        """Lets JAX connect the processes. `gpus`: positions of those that this one may use; None:
        all that it sees."""
        # Through the proxy of http_proxy JAX would not reach process 0, and end with a stack trace.
        direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = f"{direct},{member.host}" if direct else member.host
        jax.config.update("jax_check_proxy_envs", False)
        # JAX's preemption service would take SIGTERM for itself; the monitor does its work.
        jax.config.update("jax_enable_preemption_service", False)
        enough_threads(1)  # where JAX_NUM_CPU_DEVICES has not asked for more
        try:
            jax.distributed.initialize(
                self._address,
                member.num_processes,
                member.process_id,
                gpus,
                "deactivate",
                self._timeout,
                coordinator_bind_address=f"{self._bind[0]}:{self._bind[1]}"
                if self._bind[0]
                else None,
                heartbeat_timeout_seconds=int(2 * heartbeat_timeout + 60),
            )
        except (RuntimeError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(
                f"JAX cannot start the cluster at {self._address} ({reason}). Try another port."
            ) from e

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Ends all processes with one line if the facts differ between them. `what`: name of what
        the user should make the same."""
        if self._member:
            self._settle({"same": {what: facts}})

    def _settle(self, report: dict[str, Any]) -> dict[str, Any]:
        try:
            verdict = self._exchange(report)
        except NoAnswer as e:
            self._lost()
            self._say(f"process {self.index}: {self._no_answer(e)}")
            self._leave(together=False)
        if verdict["stop"]:
            if verdict["ended"]:
                self._lost()
            self._leave(verdict["all_came"])
        return verdict

    def _no_answer(self, e: NoAnswer) -> str:
        if self._agreement.met:
            return "process 0 ended; its output says why."
        if e.refused:
            return (
                f"process 0 at {self._address} is not of the same job: {e}. Give every process the "
                f"same {TOKEN}, or "
                f"choose another port if another job has this one."
            )
        return (
            f"process 0 does not answer at {self._address} within {self._timeout} s ({e}). Check "
            "that it runs there, or "
            f"raise --cluster_timeout."
        )

    def _lost(self) -> None:
        """Gives the monitor, once it watches, the time to name a process that ended without a word:
        it ends this one, with another exit code."""
        if self.monitor:
            time.sleep(GRACE)

    @property
    def _count(self) -> int:
        assert self._member is not None  # asked of a process that joins others
        return self._member.num_processes

    def _exchange(self, report: dict[str, Any]) -> dict[str, Any]:
        mine = {
            "process": self.index,
            "count": self._count,
            "host": socket.gethostname(),
            **report,
        }
        verdict = self._agreement.exchange(mine, self._judge, self._timeout)
        if self.index == 0:
            for line in verdict["lines"]:
                self._say(line)
        return verdict

    def _judge(self, reports: list[Report]) -> dict[str, Any]:
        """What process 0 tells all: whether to stop, what it prints about that, and everyone's GPUs."""
        lines: list[str] = []
        gpus: list[list[int] | None] = [None] * self._count
        wrong = any(r.get("error") for r in reports)
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
            "all_came": len(reports) == self._count,
            "ended": any(r.get("error") == ENDED for r in reports),
        } | shared

    def _absence(self, reports: list[Report]) -> str | None:
        """One line for processes that did not come, or have the same number."""
        count = self._count
        for a, b in itertools.pairwise(reports):
            if a["process"] == b["process"]:
                return (
                    f"--process_id={a['process']} is given to two processes ({a['host']} and {b['host']}). "
                    f"Give each its own number, from 0 to {count - 1}."
                )
        came = {r["process"] for r in reports}
        missing = [i for i in range(count) if i not in came]
        if not missing:
            return None
        names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        strangers = ""
        if refused := sorted(self._agreement.refused):
            strangers = (
                f" Connections with another {TOKEN} were refused, from {', '.join(refused[:3])}."
            )
        return (
            f"{len(missing)} of {count} processes did not come to {self._address} within {self._timeout} s: "
            f"number {names}. Start all of them at about the same time, or raise "
            f"--cluster_timeout.{strangers}"
        )

    def _say(self, text: str) -> None:
        print(f"{self._program}: {text}", file=sys.stderr, flush=True)

    def _leave(self, together: bool) -> NoReturn:
        """Exit code 2. JAX would wait at the exit for processes that do not come."""
        if self.monitor and together:
            self.monitor.close()
        elif self.monitor:
            self.monitor.close("it ended because of a mistake", 2)
        if not together and jax.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from None


def _first_report(member: Membership, command: dict[str, Any]) -> Report:
    """What process 0 compares and divides: options, installation, GPUs."""
    gpus = visible_gpus()
    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS", "").replace(" ", "")
    if ids:
        gpus = [g for i, g in enumerate(gpus) if str(i) in ids.split(",")]
    installed = {
        "Python": platform.python_version().rpartition(".")[0],
        "JAX": jax.__version__,
        "whether a GPU is visible": bool(gpus),
    }
    command = {"--num_processes": member.num_processes} | command
    return {
        "same": {"command": command, "installation": installed},
        "gpus": gpus,
        "may_share": member.may_share and not ids,
    }


def _bind(member: Membership) -> tuple[str, int]:
    """Where process 0 listens: what JAX reads from the environment, this host alone if all are on
    it, or everywhere."""
    host, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")
    if port.isdecimal():
        return host, int(port)
    return loopback(member.host), member.port
