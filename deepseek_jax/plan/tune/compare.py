"""Rows of an exercise, compiled and run on the devices here: memory by the compiler, time by steps."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError, one_line
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import exchange
from deepseek_jax.plan.tune import batch, changes
from deepseek_jax.plan.tune.exercises import Row
from deepseek_jax.plan.tune.steps import Step

PASSES = 2  # over all rows, the second one backwards: what the machine does meanwhile falls on all


class Setting(NamedTuple):
    """What rows are run on, and for how long.

    Attributes:
      room: bytes of a device that may be used.
      steps: that count, of each row. seconds: that they may take; one step is always made.
      say: is given a line as something is ready.
    """

    devices: list[jax.Device]
    room: int
    steps: int
    seconds: float
    say: Callable[[str], None]


def compared(
    config: Config, rows: list[Row], setting: Setting, results: list[dict[str, Any]]
) -> None:
    """Compiles and runs all rows.

    Args:
      results: is filled as rows become ready, so that an interrupted run has what there is.
    """
    running: list[tuple[dict[str, Any], Step, list[float]]] = []
    for row in rows:
        found: dict[str, Any] = {"name": row.name, "options": row.changes}
        results.append(found)
        setting.say(f"{row.name} ...")
        if row.refused:
            found["refused"] = row.refused
            continue
        try:
            step = Step(changes.checked(config, row.changes), setting.devices, setting.room)
        except UserError as e:
            found["refused"] = str(e)
            continue
        found |= of_step(step, setting.room)
        if found["fits"]:
            running.append((found, step, []))
    order = running
    for _ in range(PASSES):
        for found, step, seconds in order:
            with _on_devices(step, found):
                seconds += timed(step, -(-setting.steps // PASSES), setting.seconds / PASSES)
                found |= measured(step, seconds)
                setting.say(f"{found['name']}: {found['seconds'] * 1e3:,.1f} ms")
        order = order[::-1]


def largest_batch(
    config: Config, setting: Setting, results: list[dict[str, Any]], most: int = batch.MOST
) -> batch.Found:
    """Looks for the largest micro-batch, and runs every size that was found to fit.

    Arguments: as `compared`. most: sequences of a device at most.

    Raises:
      UserError: the mesh does not fit.
    """
    shape = dict(make_mesh(config, setting.devices).shape)
    steps: dict[int, Step] = {}

    def bytes_of(size: int) -> int:
        given = batch.options_of(config, shape, size)
        setting.say(f"{size} sequences a device ...")
        step = steps[size] = Step(changes.checked(config, given), setting.devices, setting.room)
        found = {"name": str(size), "micro_batch": size, "options": given}
        results.append(found | of_step(step, setting.room))
        return step.memory.total

    found = batch.search(bytes_of, setting.room, most)
    results.sort(key=lambda r: r["micro_batch"])
    for result in results:
        step = steps[result["micro_batch"]]
        if result["fits"]:
            with _on_devices(step, result):
                result |= measured(step, timed(step, setting.steps, setting.seconds))
                setting.say(f"{result['name']}: {result['seconds'] * 1e3:,.1f} ms")
    return found


def of_step(step: Step, room: int) -> dict[str, Any]:
    """What is known of a compiled step: bytes of a device and what they are, rounds' places, its batch."""
    t = step.config.train
    found: dict[str, Any] = {
        "mesh": {axis: n for axis, n in step.mesh.shape.items() if n > 1},
        "remat": t.remat,
        "sequences": t.batch_size,
        "tokens": t.batch_size * t.sequence_length,
        "accumulation": t.accumulation,
        "bytes": step.memory.total,
        "arguments": step.memory.arguments,
        "temporaries": step.memory.temporaries,
        "fits": step.memory.total <= room,
        "compile_seconds": step.compile_seconds,
    }
    if (buffers := exchange.buffers(step.config, dict(step.mesh.shape))) and buffers.places:
        found["padding"] = buffers.places / buffers.mean_load
    return found


def timed(step: Step, steps: int, seconds: float) -> list[float]:
    """Seconds of steps after one that does not count."""
    step.run()
    out: list[float] = []
    until = time.perf_counter() + seconds
    while len(out) < steps and (not out or time.perf_counter() < until):
        out.append(step.run())
    return out


def measured(step: Step, seconds: list[float]) -> dict[str, Any]:
    """What the times say."""
    t, median = step.config.train, statistics.median(seconds)
    return {
        "seconds": median,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "steps": len(seconds),
        "samples_per_second": t.batch_size / median,
        "tokens_per_second": t.batch_size * t.sequence_length / median,
        "rounds": max(step.rounds(), default=1),
    }


@contextlib.contextmanager
def _on_devices(step: Step, found: dict[str, Any]) -> Iterator[None]:
    """Puts the step's state on the devices and takes it away again. What they refuse is the row's reason."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, FloatingPointError) as e:
        found["refused"] = one_line(e)
        found["fits"] = found["fits"] and "RESOURCE_EXHAUSTED" not in str(e)
    finally:
        step.free()
