"""The storm's part `processes`: runs under the launcher, of whose processes one is killed or stopped."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.durability import faults
from benchmarks.durability.faults import INTERVAL, Process, Tally

LIMIT = 600.0  # seconds for anything that takes some
HEARTBEAT = 10.0  # seconds of silence after which a process is lost
ENDS_WITHIN = 180.0  # seconds from a fault until all processes have ended, on a busy machine


class Fault(NamedTuple):
    process: int
    number: int  # the signal

    def name(self, count: int) -> str:
        done = "SIGSTOP to" if self.number == signal.SIGSTOP else "kill -9"
        return f"{count} processes: {done} number {self.process}"


PLANS = {
    2: (
        Fault(0, signal.SIGKILL),
        Fault(1, signal.SIGSTOP),
        Fault(1, signal.SIGKILL),
        Fault(0, signal.SIGSTOP),
    ),
    4: (Fault(2, signal.SIGKILL), Fault(3, signal.SIGSTOP)),
}


def launched(count: int, arguments: list[str], *more: str) -> list[str]:
    return [
        "-m",
        "deepseek_jax.launch",
        f"--nproc_per_node={count}",
        "--grace=20",
        *more,
        *arguments,
    ]


def child(launcher: int, number: int) -> int:
    """The pid of a launcher's process with this number. The order of pids says nothing: they wrap
    around."""
    pids = subprocess.run(
        ["pgrep", "-P", str(launcher)], capture_output=True, text=True
    ).stdout.split()
    wanted = f"JAX_PROCESS_ID={number}".encode()
    return next(
        int(pid)
        for pid in pids
        if wanted in pathlib.Path("/proc", pid, "environ").read_bytes().split(b"\0")
    )


def disturb(
    p: Process,
    count: int,
    plan: tuple[Fault, ...],
    workdir: pathlib.Path,
    say: Callable[[str], None] = print,
) -> faults.Tallies:
    """Waits for some steps after every start, then causes the next fault of the plan. After the last
    one the run goes on."""
    out = faults.tallies()
    done = line = 0
    for fault in plan:
        tally = out[fault.name(count)] = out.get(fault.name(count), Tally())
        # The second save waits for the first: after it there is a checkpoint to resume from.
        if not p.wait_for_step(done + 2 * INTERVAL + 2, LIMIT):
            raise RuntimeError("the run does not go on:\n" + "\n".join(p.lines[-40:]))
        tally.tried += 1
        began = time.monotonic()
        os.kill(child(p.popen.pid, fault.process), fault.number)
        named = p.wait_for(rf"process {fault.process} \(.*\) was lost", ENDS_WITHIN, line)
        again = p.wait_for(r"deepseek_jax.launch: restart \d+ of", ENDS_WITHIN, line)
        tally.detected += named is not None
        logged = max(faults.rows(workdir)[0], default=0)
        line = next(
            (i for i in range(line, len(p.lines)) if again and p.lines[i] == again.string), line
        )
        began_again = again and p.wait_for(
            r"^workdir +[^\s,]+(?:, resuming after step (\d+))?", LIMIT, line
        )
        if not began_again:
            raise RuntimeError(
                f"{fault.name(count)}: it did not start again:\n" + "\n".join(p.lines[-40:])
            )
        done, line = int(began_again[1] or 0), line + 1
        tally.lost(logged - done)
        tally.wrong += done < faults.newest_save(logged) - INTERVAL
        tally.survived += 1
        say(
            f"{fault.name(count)}: {'named, ' if named else 'NOT named, '}ended and started again "
            f"within {time.monotonic() - began:.0f} s, "
            f"step {logged} -> {done}"
        )
    return out


def run(folder: pathlib.Path, say: Callable[[str], None]) -> faults.Tallies:
    """Two and four processes; losses are compared with undisturbed runs of as many processes."""
    out = faults.tallies()
    text = faults.corpus(folder)
    for count, plan in PLANS.items():
        steps = (2 * INTERVAL + 4) * (len(plan) + 2) * 2
        options = {
            "mesh__fsdp": -1,
            "train__steps": steps,
            "watchdog__heartbeat_timeout": HEARTBEAT,
        }
        env = faults.environment(folder)
        say(f"the undisturbed run of {steps} steps in {count} processes")
        with Process(
            launched(count, faults.train(folder / f"calm{count}", text, **options)), env
        ) as calm:
            if calm.wait(LIMIT) != 0:
                raise RuntimeError("the undisturbed run failed:\n" + "\n".join(calm.lines[-40:]))
        reference, _ = faults.rows(folder / f"calm{count}")
        workdir = folder / f"storm{count}"
        with Process(
            launched(count, faults.train(workdir, text, **options), f"--max_restarts={len(plan)}"),
            env,
        ) as p:
            out |= disturb(p, count, plan, workdir, say)
            code = p.wait(LIMIT)
        wrong = (
            faults.differing(workdir, reference)
            + (code != 0)
            + (len(faults.rows(workdir)[0]) != steps)
        )
        out[plan[-1].name(count)].wrong += wrong
    return out
