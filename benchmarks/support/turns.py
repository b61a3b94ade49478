"""Programs timed in turns, so that what else the machine does falls on all alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
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


def seconds(programs: Mapping[Any, Callable[[], Any]], turns: int) -> dict[Any, list[float]]:
    """The seconds of each program in every turn, after one to warm up."""
    for run in programs.values():
        run()
    out: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(turns):
        for name, run in programs.items():
            started = time.perf_counter()
            run()
            out[name].append(time.perf_counter() - started)
    return out


def medians(programs: Mapping[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
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
    """Time of program a in terms of program b: the median over turns of `seconds`."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
