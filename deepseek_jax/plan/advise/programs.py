"""A plan, compiled for the devices that it is for, and what its program says: one `python -m
deepseek_jax.plan --roofline --json`, in a process of its own. XLA's compiler can end a process, and one that
takes too long can only be ended so.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.plan.advise.estimate import PARTS
from deepseek_jax.plan.advise.hardware import Known
from deepseek_jax.plan.advise.search import Compiled, Machine, Plan
from deepseek_jax.plan.rates import Rates
from deepseek_jax.plan.rates_file import SECONDS

# Parts of the model that instructions are of, and the part of a step's time that each is counted as.
COUNTED_AS = {
    "attention": "attention",
    "mlp": "mlp",
    "experts": "experts",
    "dispatch": "routing",
    "combine": "routing",
    "route": "routing",
    "router": "routing",
    "statistics": "routing",
    "loss": "loss",
    "head": "loss",
    "optimizer": "optimizer",
    "collectives": "collectives",
}


class Compiler:
    """Compiles plans.

    Args:
      known: what they are compiled for. machine: how many of it.
      skew: as plan/skew.py has it.
      flags_of: makes the flags of train.py of a plan.
      seconds: from now, after which none goes on.
    """

    def __init__(
        self,
        known: Known,
        machine: Machine,
        skew: str,
        flags_of: Callable[[Plan], Sequence[str]],
        seconds: float,
    ) -> None:
        self._flags = [
            f"--hardware={known.stands_in or known.key}",
            f"--devices={machine.devices}",
            f"--gpus_per_host={machine.gpus_per_host}",
            f"--rates={given(known.speed.derated)}",
            f"--skew={skew}",
        ]
        self._flags_of = flags_of
        self._deadline = time.monotonic() + seconds

    def __call__(self, plan: Plan) -> Compiled | str | None:
        """The program's bytes and predicted time, or why there is none; None: it takes too long."""
        command = [sys.executable, "-m", "deepseek_jax.plan", "--roofline", "--json"]
        command += [*self._flags, *self._flags_of(plan)]
        began = time.monotonic()
        environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(sys.path))
        environment.pop("JAX_NUM_CPU_DEVICES", None)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=max(1.0, self._deadline - began),
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            return _reason(done)
        said = json.loads(done.stdout)
        return Compiled(
            said["program"]["memory"]["total"],
            parts_of(said["roofline"]["derated"]),
            time.monotonic() - began,
            said,
        )


def given(rates: Rates) -> str:
    """Rates as --rates takes them. One of 0 is none, but for seconds."""
    found = rates._asdict().items()
    return ",".join(f"{name}={value!r}" for name, value in found if value or name in SECONDS)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process has ended badly: its one line, or what XLA's compiler said before it ended it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode > 0:
        return lines[-1].partition(": ")[2] if lines else f"exit code {done.returncode}"
    failed = next((line for line in lines if "Check failed" in line), lines[-1] if lines else "")
    _, found, said = failed.partition("Check failed")
    return f"XLA's compiler fails on it (signal {-done.returncode}): {found}{said}".strip()


def parts_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by estimate.PARTS of what roofline.predict says by parts of the model."""
    parts = dict.fromkeys(PARTS, 0.0)
    for part, phases in summary["parts"].items():
        parts[COUNTED_AS.get(part, "elementwise")] += sum(phases.values())
    return parts
