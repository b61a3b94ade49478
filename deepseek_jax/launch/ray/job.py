"""What a worker runs: the command of its process, its environment, and which ends are not tried again.

No Ray and no processes here, only decisions.
"""

import secrets
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.cluster.ports import free_port, loopback
from deepseek_jax.cluster.wire import TOKEN
from deepseek_jax.errors import ExitCode
from deepseek_jax.launch.ray.options import RayOptions
from deepseek_jax.launch.restarts import NEVER

# Variables of the caller that every process gets: what they mean does not depend on the host. Names of
# credentials are not among them, as Ray shows the environment of its workers.
HANDED_ON = ("JAX_", "XLA_", "NCCL_", "TF_CPP_")
# Each process has its own.
_PLACES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
# Ray sets it to the CPUs that it keeps for a worker, which does not work with them but waits.
_THREADS = "OMP_NUM_THREADS"


class Outcome(NamedTuple):
    """How a run on Ray ended.

    Attributes:
      code: what train.py left with, 128 + N for signal N.
      step: of the newest checkpoint that was reported; None: there is none.
      checkpoint: its folder.
      metrics: reported with it: the last row of metrics.jsonl that has a loss, and the last evaluation.
      workdir: the folder of the run in the storage.
      preempted: it was stopped because Ray takes a host away.
      said: the last line on stderr, of process 0.
    """

    code: int
    step: int | None = None
    checkpoint: str | None = None
    metrics: dict[str, Any] = {}
    workdir: str = ""
    preempted: bool = False
    said: str = ""


class Plan(NamedTuple):
    """What the driver sends to every worker. Plain values, so that Ray can show and keep them.

    Attributes:
      command: the program with its arguments, as for Python.
      folder: where it is started.
      env: variables of every process.
      workdir: the folder of the run, in the storage.
      remote: whether that is no folder, so that each host needs one for metrics and config.
      local_dir: the folder for those; "": in the host's folder for temporary files.
      grace: seconds from a signal, or from the end of one process, to SIGKILL.
      tick: seconds between two looks at the processes.
    """

    command: list[str]
    folder: str
    env: dict[str, str]
    workdir: str
    remote: bool
    local_dir: str
    grace: float
    tick: float = 1.0


def plan(options: RayOptions, folder: str, env: Mapping[str, str]) -> Plan:
    """What the workers are sent.

    Args:
      options: checked.
      folder: of the caller, from which relative paths of the command begin.
      env: of the caller.
    """
    handed_on = {
        name: value
        for name, value in env.items()
        if name.startswith(HANDED_ON) and name not in _PLACES
    }
    if _THREADS in env:
        handed_on[_THREADS] = env[_THREADS]
    given = dict(text.split("=", 1) for text in options.env)
    module = ["-m"] if options.module else []
    extra = [f"--config.checkpoint.dir={options.run_folder}/checkpoints"] if options.remote else []
    return Plan(
        command=["-u", *module, *options.command, *extra],
        folder=folder,
        env=handed_on | given,
        workdir=options.run_folder,
        remote=options.remote,
        local_dir=options.local_dir,
        grace=options.grace,
    )


def meeting(host: str) -> dict[str, str]:
    """Where the processes of one start meet, and the secret by which they know each other.

    Args:
      host: the address of process 0's host.
    """
    return {"address": f"{host}:{free_port()}", "token": secrets.token_hex(16)}


def environment(
    base: Mapping[str, str], plan: Plan, meeting: Mapping[str, str], rank: int, count: int
) -> dict[str, str]:
    """The whole environment of a process.

    Args:
      base: of the worker.
      plan: from the driver.
      meeting: as process 0 made it.
      rank: of this process.
      count: of all.
    """
    out = {n: v for n, v in base.items() if n not in (*_PLACES, _THREADS)} | plan.env
    out |= {
        "JAX_COORDINATOR_ADDRESS": meeting["address"],
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
        TOKEN: meeting["token"],
    }
    if loopback(meeting["address"]):
        out["JAX_COORDINATOR_BIND_ADDRESS"] = meeting["address"]  # JAX would take all interfaces
    return out


def is_final(code: int) -> bool:
    """Whether an end is returned to Ray. What a worker raises, Ray starts again while max_failures lasts."""
    return code in NEVER


def explained(code: int, said: str, where: str = "") -> str:
    """One line about an end.

    Args:
      code: the exit code.
      said: the process's last line on stderr, if any.
      where: whose end it is.
    """
    if said and code in (ExitCode.MISTAKE, ExitCode.BAD_NUMBERS):
        return said
    number = code - 128
    try:
        how = (
            f"ended by {signal.Signals(number).name}"
            if number > 0
            else f"ended with exit code {code}"
        )
    except ValueError:
        how = f"ended with exit code {code}"
    text = f"{where}{' ' if where else ''}train.py {how}"
    return f"{text}: {said}" if said else text
