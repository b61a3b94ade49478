"""Start a program in several processes on this host, as torchrun does.

  python -m deepseek_jax.launch --nproc_per_node=2 train.py --config=configs/tiny.py --workdir=runs/two
  python -m deepseek_jax.launch --nproc_per_node=2 -m some.module ARGUMENTS
  python -m deepseek_jax.launch --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=host0 train.py ...   (on each host)
  python -m deepseek_jax.launch --nproc_per_node=4 --max_restarts=10 --min_processes=2 train.py ...

One process drives all GPUs of its host, so one a host is the usual number; several are for hosts whose GPUs belong to different
sockets, and for trying several hosts out on one. Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, which train.py understands (another program passes them to jax.distributed.initialize), and its own part of the
visible GPUs. Without GPUs each has JAX_NUM_CPU_DEVICES devices.

The output of process 0 is left alone; lines of the others begin with their number. SIGTERM, SIGINT (Ctrl-C),
SIGHUP, SIGUSR1 and SIGUSR2 are passed on to all, and train.py stops with a checkpoint; a second SIGTERM or
SIGINT kills. When a process fails, the others get SIGTERM, and SIGKILL after --grace seconds. The exit code
is that of the first that failed, 128 + N for signal N. If the launcher is killed, so are its processes (on
Linux).

--max_restarts starts all of them again, and train.py goes on from the newest checkpoint; not after a mistake (exit code 2), bad numbers (3)
or a stop by one of these signals. The delay before it doubles from 1 s to 60 s while starts fail within 10
minutes. With --min_processes a process that fails first twice in a row is given up, with its GPUs, and the
others go on if their devices fit the mesh (an axis of -1 takes what is left). When the lost place is mended,
SIGUSR2 to the launcher stops them after a checkpoint and starts all again; with --min_processes it does
nothing else. With several hosts every launcher restarts its own processes, all of them, and they meet again
at --master_addr.
"""

import argparse
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cluster.gpus import shares, visible_gpus
from deepseek_jax.cluster.meeting import free_port
from deepseek_jax.cluster.signals import SIGNALS, URGENT
from deepseek_jax.errors import ExitCode, UserError, stopped_by
from deepseek_jax.launch.restarts import Restarts, first_failed

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, and the program with its arguments.

    Raises:
      UserError: a wrong or missing one.
    """
    p = arguments.Parser(prog="python -m deepseek_jax.launch", description=__doc__)

    def add(name: str, default: Any, help: str, kind: type = int) -> None:
        p.add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            default=default,
            help=help,
            type=kind,
        )

    add(
        "nproc_per_node",
        "1",
        "processes on this host; gpu: one for each visible GPU (default: 1)",
        str,
    )
    add("nnodes", 1, "hosts (default: 1)")
    add("node_rank", 0, "this host's number, from 0 (default: 0)")
    add("master_addr", None, "name or address of host 0, if there are several", str)
    add("master_port", None, "free port there (default: 29500; on one host the launcher finds one)")
    add(
        "devices_per_process",
        None,
        "GPUs of each process (default: all, divided), or CPU devices if there are no GPUs",
    )
    add(
        "grace",
        30.0,
        "seconds from SIGTERM to SIGKILL once one process has ended by failure or signal (default: 30)",
        float,
    )
    add("max_restarts", 0, "how often to start all processes again after one failed (default: 0)")
    add(
        "min_processes",
        None,
        "go on with fewer processes, down to this number, without one that keeps failing (default: all are needed)",
    )
    p.add_argument(
        "-m", "--module", action="store_true", help="the program is a module, as for python -m"
    )
    p.add_argument("program", type=arguments.path, help="a Python file, or with -m a module")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")
    a = p.parse_args(argv)
    if a.nproc_per_node == "gpu":
        a.nproc_per_node = str(len(visible_gpus()))
        if a.nproc_per_node == "0":
            raise UserError("--nproc_per_node=gpu, but no GPU is visible. Give a number.")
    if not a.nproc_per_node.isdecimal():
        raise UserError(f"--nproc_per_node={a.nproc_per_node} is not a number. Give one, or gpu.")
    a.nproc_per_node = int(a.nproc_per_node)
    ranges = {
        "nproc_per_node": (1, 4096),
        "nnodes": (1, 1 << 20),
        "node_rank": (0, a.nnodes - 1),
        "master_port": (1, 65535),
        "devices_per_process": (1, 4096),
        "grace": (0, 1e6),
        "max_restarts": (0, 1 << 20),
        "min_processes": (1, a.nproc_per_node),
    }
    for name, (low, high) in ranges.items():
        value = getattr(a, name)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"--{name}={value} is not between {low} and {high}. Give a number in that range."
            )
    if a.nnodes > 1 and not a.master_addr:
        raise UserError(
            f"--nnodes={a.nnodes} needs --master_addr, the name of host 0. Give it on every host."
        )
    if a.min_processes is not None and not a.max_restarts:
        raise UserError(
            f"--min_processes={a.min_processes} has no effect without restarts. Give --max_restarts as well."
        )
    if a.min_processes is not None and a.nnodes > 1:
        raise UserError(
            f"--min_processes={a.min_processes} with --nnodes={a.nnodes}: the launchers of several hosts do not agree on fewer processes. "
            f"Leave it out, and start all again with another --nnodes when a host is lost."
        )
    if not a.module and not os.path.isfile(a.program):
        raise UserError(f"{a.program} is not a file. Name a Python program, or a module after -m.")
    return a


def environments(
    a: argparse.Namespace, env: Mapping[str, str], places: list[int] | None = None
) -> list[dict[str, str]]:
    """What each process has in its environment besides `env`, the launcher's. `places`: those in use of --nproc_per_node, each with its GPUs.

    Raises:
      UserError: the visible GPUs do not divide.
    """
    places = list(range(a.nproc_per_node)) if places is None else places
    host, port = a.master_addr or "127.0.0.1", a.master_port
    if port is None and a.nnodes == 1:
        port = free_port()
    address = f"{host}:{port or 29500}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(a.nnodes * len(places))}
    if host == "127.0.0.1":
        common["JAX_COORDINATOR_BIND_ADDRESS"] = (
            address  # not on all interfaces, as is JAX's default
        )
    gpus = visible_gpus()
    named = [
        name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
    ]
    visible = (named or [str(i) for i in range(len(gpus))])[: len(gpus)]
    parts = shares(visible, a.nproc_per_node, a.devices_per_process) if gpus else None
    if a.devices_per_process and not gpus:
        common["JAX_NUM_CPU_DEVICES"] = str(a.devices_per_process)
    return [
        common
        | {"JAX_PROCESS_ID": str(a.node_rank * a.nproc_per_node + i)}
        | ({"CUDA_VISIBLE_DEVICES": parts[place]} if parts else {})
        for i, place in enumerate(places)
    ]


def _die_with(parent: int) -> Callable[[], None] | None:
    """For a new process to run: the kernel kills it when its parent ends, however that comes."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return prepare


class Child:
    """One process, in a session of its own: Ctrl-C reaches it through the launcher alone, and what it leaves can be found."""

    def __init__(self, command: list[str], env: dict[str, str], place: int = 0):
        self.number, self.place = int(env["JAX_PROCESS_ID"]), place
        self.code: int | None = None
        self.killed = False  # by the launcher
        pipe = subprocess.PIPE if self.number else None
        self.popen = subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )

    def ended(self) -> bool:
        """True once, when it has; what it started and left in its session is killed then."""
        if (
            self.code is not None
            or os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            return False
        self._kill_session()  # before wait(), which lets another process have its number
        code = self.popen.wait()
        self.code = 128 - code if code < 0 else code
        return True

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(
                self.popen.pid, number
            )  # it is not reaped yet; Popen.send_signal would do that, unseen by ended()

    def kill(self) -> None:
        """Works on stopped processes too."""
        if self.code is None:
            self.killed = True
            self._kill_session()

    def _kill_session(self) -> None:
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except (
            ProcessLookupError,
            PermissionError,
        ):  # nothing is left (macOS says the latter of a zombie)
            pass


class Relay:
    """Passes lines on with the number of the process that they come from."""

    def __init__(self, prefix: bytes, out: int):
        self._prefix, self._out, self._rest = prefix, out, b""

    def read(self, stream: IO[bytes]) -> bool:
        """Passes on what has come; False at the end."""
        chunk = os.read(stream.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if self._rest and (not chunk or len(self._rest) > 1 << 16):
            lines, self._rest = [*lines, self._rest], b""
        text = b"".join(self._prefix + line + b"\n" for line in lines)
        while text:
            try:
                text = text[os.write(self._out, text) :]
            except OSError:  # nobody reads any more; the processes go on
                break
        return bool(chunk)


def _say(text: str) -> None:
    print(f"deepseek_jax.launch: {text}", file=sys.stderr, flush=True)


class Launcher:
    """Starts, watches, ends and restarts the processes, in one thread."""

    def __init__(
        self,
        command: list[str],
        environments: Callable[[list[int]], list[dict[str, str]]],
        grace: float,
        restarts: Restarts,
    ):
        """`environments`: of places, what each process has besides this one's. `grace`: seconds from SIGTERM to SIGKILL."""
        self._command, self._environments, self._grace, self._restarts = (
            command,
            environments,
            grace,
            restarts,
        )
        self._stopped: int | None = None  # the signal that asked for it
        self._urgent = 0  # how many of URGENT have come
        self._grow = False
        self._ready = selectors.DefaultSelector()
        self._signals, self._sender = socket.socketpair()  # a signal wakes select()
        for end in (self._signals, self._sender):
            end.setblocking(False)
        self._ready.register(self._signals, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._sender.fileno())
        for number in (*SIGNALS, signal.SIGCHLD):
            if (
                number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN
            ):  # nohup ignores SIGHUP
                signal.signal(number, lambda *_: None)
        self._children: list[Child] = []

    def run(self) -> int:
        """Returns the exit code when all processes have ended for good."""
        while True:
            began = time.monotonic()
            code, failed = self._attempt()
            if self._stopped is not None:
                return code
            start = (
                self._restarts.grow()
                if self._grow
                else self._restarts.after(code, failed, time.monotonic() - began)
            )
            self._grow = False
            if start is None:
                return code
            _say(start.text)
            until = time.monotonic() + start.delay
            while self._stopped is None and (left := until - time.monotonic()) > 0:
                self._read(left)
            if self._stopped is not None:
                return stopped_by(self._stopped)

    def _attempt(self) -> tuple[int, int | None]:
        """Starts the processes once. Returns their exit code and the place that failed first, when all have ended."""
        self._kill_at, self._first_failed, ended = float("inf"), None, []
        places = self._restarts.places
        self._children = [
            Child(self._command, env, place)
            for env, place in zip(self._environments(places), places, strict=True)
        ]
        for child in self._children:
            for stream, out in ((child.popen.stdout, 1), (child.popen.stderr, 2)):
                if stream:
                    self._ready.register(
                        stream, selectors.EVENT_READ, Relay(f"[{child.number}] ".encode(), out)
                    )
        while any(c.code is None for c in self._children):
            self._read(min(max(self._kill_at - time.monotonic(), 0), 60))
            for child in self._children:
                if child.ended():
                    ended.append((child.place, child.code, child.killed))
                    self._after(child)
            if time.monotonic() >= self._kill_at:
                self._kill_at = float("inf")
                for child in self._children:
                    child.kill()
        while len(self._ready.get_map()) > 1 and self._read(0.2):
            continue  # what is left in the pipes
        for key in [
            k for k in self._ready.get_map().values() if k.data is not None
        ]:  # somebody they left behind has them
            self._ready.unregister(key.fileobj)
            key.fileobj.close()
        return first_failed(ended)

    def _read(self, wait: float) -> bool:
        """Waits for output, signals and ends of processes; False if none came."""
        events = self._ready.select(wait)
        for key, _ in events:
            if key.data is None:
                for number in self._signals.recv(1 << 10):
                    if number == signal.SIGUSR2 and self._restarts.may_shrink:
                        if len(self._children) < self._restarts.count and not self._grow:
                            self._grow = True
                            self._pass_on(signal.SIGTERM)
                    elif number in SIGNALS:
                        self._stop(number)
            elif not key.data.read(key.fileobj):
                self._ready.unregister(key.fileobj)
                key.fileobj.close()
        return bool(events)

    def _stop(self, number: int) -> None:
        """Which signals count as a second one: stopping.py."""
        self._urgent += number in URGENT
        if self._urgent > 1 and number in URGENT:
            for child in self._children:
                child.kill()
        elif self._stopped is None:
            self._stopped = number
            if not self._grow:  # else they are stopping
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for child in self._children:
            child.signal(number)

    def _after(self, child: Child) -> None:
        asked = self._stopped is not None or self._grow
        if child.code and not self._first_failed:
            self._first_failed = child
            if not asked:
                why = " (another was lost)" if child.code == ExitCode.LOST else ""
                _say(
                    f"process {child.number} ended with exit code {child.code}{why}; stopping the others."
                )
                self._pass_on(signal.SIGTERM)
        if child.code or asked:
            # Without one of them the others cannot save.
            self._kill_at = min(
                self._kill_at,
                time.monotonic()
                + (min(self._grace, 5.0) if child.code == ExitCode.LOST else self._grace),
            )


def main(argv: list[str]) -> int:
    a = parse(argv)
    command = [sys.executable, "-u", *(["-m"] if a.module else []), a.program, *a.arguments]
    environments(a, os.environ)  # mistakes come first
    restarts = Restarts(a.nproc_per_node, a.min_processes or a.nproc_per_node, a.max_restarts)
    return Launcher(
        command, lambda places: environments(a, os.environ, places), a.grace, restarts
    ).run()


if __name__ == "__main__":
    sys.exit(exit_code("deepseek_jax.launch", lambda: main(sys.argv[1:])))
