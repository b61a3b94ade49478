"""What is timed between devices, and between devices and their host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.offload import HOST
from deepseek_jax.plan.calibrate.probes import Machine, Repeated
from deepseek_jax.plan.calibrate.timing import Probe
from deepseek_jax.xla.program import RECEIVED

AXIS = "fsdp"


def _gather(x: jax.Array, n: int) -> jax.Array:
    return lax.all_gather(x, AXIS, tiled=True)[: len(x)]


def _scatter(x: jax.Array, n: int) -> jax.Array:
    part = lax.psum_scatter(x, AXIS, tiled=True)
    return lax.dynamic_update_slice_in_dim(x, part, 0, 0)


def _reduce(x: jax.Array, n: int) -> jax.Array:
    return lax.psum(x, AXIS)


def _exchange(x: jax.Array, n: int) -> jax.Array:
    return lax.all_to_all(x, AXIS, 0, 0, tiled=True)


def _pass_on(x: jax.Array, n: int) -> jax.Array:
    return lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


KINDS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "all-gather": _gather,
    "reduce-scatter": _scatter,
    "all-reduce": _reduce,
    "all-to-all": _exchange,
    "collective-permute": _pass_on,
}


def collective(machine: Machine, kind: str, received: int) -> Probe:
    """One collective over all devices, of zeros: sums of them stay what they are.

    Args:
      kind: of KINDS.
      received: bytes that each device receives, about.
    """
    n = machine.mesh.size
    operand = received / RECEIVED[kind](n * 1024, n) * n * 1024
    numbers = max(1, round(operand / 4 / n)) * n
    x = machine.array((numbers,), jnp.float32, 0.0)
    bytes_ = RECEIVED[kind](4 * numbers, n)
    run = Repeated(machine, lambda x: KINDS[kind](x, n), x)
    return Probe(f"{kind}", bytes_, run)


class Line(NamedTuple):
    """seconds = latency + bytes / rate."""

    latency: float
    rate: float


def fitted(bytes_: list[float], seconds: list[float]) -> Line:
    """The line through times of several sizes, by least squares of relative errors: the small sizes say the
    latency, the large ones the rate."""
    b, s = np.asarray(bytes_), np.asarray(seconds)
    design = np.stack([1 / s, b / s], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(s), rcond=None)
    if latency < 0:  # the larger sizes alone would give less than nothing for none
        latency = 0.0
        per_byte = float(np.sum(b / s) / np.sum((b / s) ** 2))
    if per_byte <= 0:
        per_byte = float(np.min(s / b))
    return Line(float(latency), 1 / float(per_byte))


def to_host(machine: Machine) -> Probe | None:
    """Arrays from the devices to their host's memory and back; None where the host has none of its own."""
    kinds = {m.kind for m in machine.mesh.devices.flat[0].addressable_memories()}
    if machine.on_cpu or HOST not in kinds:
        return None
    x = machine.array((machine.sizes.host // 4,), jnp.float32)
    device = x.sharding
    host = device.with_memory_kind(HOST)

    def call(turns: int) -> Any:
        here = x
        for _ in range(turns):
            here = jax.device_put(jax.device_put(here, host), device)
        return here

    return Probe("to the host and back", 2.0 * machine.sizes.host, call)


def read_back(machine: Machine) -> Probe:
    """The host reads a number that a device has just computed, and starts the next program."""
    one = jax.device_put(np.float32(1), machine.mesh.devices.flat[0])
    plus = jax.jit(lambda x: x + 1)

    def call(turns: int) -> Any:
        x = one
        for _ in range(turns):
            x = plus(x)
            float(x)
        return x

    return Probe("a number read by the host", 1.0, call)
