"""Programs timed in turns, so that what else the machine does falls on all alike."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled function and what it is called with."""

    compiled: Any  # jax.stages.Compiled
    arguments: tuple

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.arguments))

    @property
    def temporaries(self) -> int:
        """Bytes on one device that the compiler plans with, beside arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


def compiled(f: Callable, *arguments: Any) -> Program:
    """f compiled for these arguments, arrays or their shapes."""
    return Program(jax.jit(f).lower(*arguments).compile(), arguments)


def seconds(programs: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, list[float]]:
    """The seconds of each program in every turn, after one to warm up."""
    for run in programs.values():
        run()
    out = {name: [] for name in programs}
    for _ in range(turns):
        for name, run in programs.items():
            started = time.perf_counter()
            run()
            out[name].append(time.perf_counter() - started)
    return out


def medians(programs: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    """Median seconds of each program."""
    return {name: statistics.median(times) for name, times in seconds(programs, turns).items()}


def queued(run: Program, calls: int, turns: int) -> float:
    """Median seconds of one of `calls` calls that are handed to the device together, after one to warm up. On
    a GPU a call that is waited for costs the host's way there and back as well, which is as long as a product
    of 100 GFLOP takes: a kernel's own time needs the queue to be full."""
    run()
    out = []
    for _ in range(turns):
        started = time.perf_counter()
        for _ in range(calls - 1):
            run.compiled(*run.arguments)
        run()
        out.append((time.perf_counter() - started) / calls)
    return statistics.median(out)


def ratio(times: dict[Any, list[float]], a: Any, b: Any) -> float:
    """How many times as long as b program a takes: the median over turns of `seconds`."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": device.device_kind, "devices": jax.device_count(), "cores": cores, "jax": jax.__version__,
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
