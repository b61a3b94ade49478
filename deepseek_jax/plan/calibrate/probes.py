"""What is timed of one device: products, attention, experts, memory, launches. All devices do it at once, as
in a step: virtual CPU devices share cores and caches, and GPUs a power supply.

Tensor names end in their axes: B sequences, S positions, N heads, H width of queries and keys, V of values; T
rows, D hidden size, F width of a feed-forward layer, E experts. Turns depend on each other: what one leaves
behind the next one takes, so that the compiler cannot take any out of the loop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import Config, MeshConfig
from deepseek_jax.errors import UserError
from deepseek_jax.experts import cpu_grouped_matmul, implementations
from deepseek_jax.experts.block_rows import BLOCK, BlockRows, Blocks
from deepseek_jax.model.attention.causal import causal_attention
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from deepseek_jax.plan.calibrate.timing import Probe

SPEC = jax.P(BATCH_AXES)  # of arrays [devices, ...]: one row for each
LAUNCHES = 32  # of a turn


class Sizes(NamedTuple):
    """Of the arrays of a device.

    Attributes:
      rows: tokens of a product. large, narrow: (hidden size, width): a dense layer and a fine expert.
      heads, length, qk, v: of attention.
      experts, expert_rows: of a grouped product, all of the device's.
      memory, cached: bytes of an array that no cache holds, and of one that it does.
      messages: bytes that collectives receive.
      host: bytes that travel to the host.
    """

    rows: int
    large: tuple[int, int]
    narrow: tuple[int, int]
    heads: int
    length: int
    qk: int
    v: int
    experts: int
    expert_rows: int
    memory: int
    cached: int
    messages: tuple[int, ...]
    host: int


ON_CPU = Sizes(
    rows=256,
    large=(256, 1024),
    narrow=(160, 96),
    heads=4,
    length=256,
    qk=48,
    v=32,
    experts=8,
    expert_rows=512,
    memory=2**24,
    cached=2**17,
    messages=(2**10, 2**16, 2**20),
    host=2**22,
)
ON_GPU = Sizes(
    rows=8192,
    large=(4096, 12288),
    narrow=(2048, 1408),
    heads=16,
    length=4096,
    qk=192,
    v=128,
    experts=32,
    expert_rows=32768,
    memory=2**30,
    cached=2**23,
    messages=(2**16, 2**22, 2**26),
    host=2**28,
)


class Machine(NamedTuple):
    """Devices to measure: a mesh with all of them on the axis fsdp."""

    mesh: jax.sharding.Mesh
    sizes: Sizes

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    def array(
        self, shape: tuple[int, ...], dtype: Any, scale: float = 1.0, seed: int = 0
    ) -> jax.Array:
        """[devices, *shape]: random numbers, the same on every device."""
        # Of a few numbers, repeated: drawing a gigabyte takes seconds.
        drawn = np.random.default_rng(seed).normal(size=min(math.prod(shape), 2**16)) * scale
        one = np.resize(drawn.astype(np.float32), (1, *shape)).astype(jnp.dtype(dtype))
        where = jax.NamedSharding(self.mesh, SPEC)
        shape = (self.mesh.size, *shape)
        return jax.make_array_from_callback(shape, where, lambda index: one)


def machine_of(devices: list[jax.Device]) -> Machine:
    """These devices, to be measured together."""
    mesh = make_mesh(Config(mesh=MeshConfig(fsdp=len(devices))), devices)
    return Machine(mesh, ON_CPU if devices[0].platform == "cpu" else ON_GPU)


class Repeated:
    """A call that makes turns on every device.

    Args:
      turn: (carry, *fixed) -> carry. of_each: it sees the arrays of one device without their first axis, else
        those of the mesh.
      carry, fixed: arrays [devices, ...].
    """

    def __init__(
        self,
        machine: Machine,
        turn: Callable[..., jax.Array],
        carry: jax.Array,
        *fixed: jax.Array,
        of_each: bool = True,
    ) -> None:
        def turns_of(turns: jax.Array, carry: jax.Array, *fixed: jax.Array) -> jax.Array:
            return lax.fori_loop(0, turns, lambda _, c: turn(c, *fixed), carry)

        def on_each(turns: jax.Array, carry: jax.Array, *fixed: jax.Array) -> jax.Array:
            return turns_of(turns, carry[0], *(a[0] for a in fixed))[None]

        specs = (jax.P(), SPEC, *(SPEC for _ in fixed))
        mapped = jax.shard_map(
            on_each, mesh=machine.mesh, in_specs=specs, out_specs=SPEC, check_vma=False
        )
        self._mesh = machine.mesh
        self._arguments = carry, *fixed
        self._jitted = jax.jit(mapped if of_each else turns_of)

    def __call__(self, turns: int) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(jnp.int32(turns), *self._arguments)

    def text(self) -> str:
        """The compiled program."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(jnp.int32(1), *self._arguments).compile().as_text()


def product(machine: Machine, what: str, dtype: Any, precision: str | None = None) -> Probe:
    """[T, D] x [D, F] x [F, D], as a feed-forward layer has them.

    Args:
      what: large or narrow.
    """
    d, f = getattr(machine.sizes, what)
    rows = machine.sizes.rows
    x = machine.array((rows, d), dtype)
    up = machine.array((d, f), dtype, d**-0.5, seed=1)
    down = machine.array((f, d), dtype, f**-0.5, seed=2)

    def turn(x_TD: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
        for w in (up_DF, down_FD):
            x_TD = jnp.matmul(x_TD, w.astype(x_TD.dtype), precision=precision)
        return x_TD

    name = f"{jnp.dtype(dtype).name} products, {what} ({rows} x {d} x {f})"
    return Probe(name, 4.0 * rows * d * f, Repeated(machine, turn, x, up, down))


def fp8_product(machine: Machine) -> Probe:
    """The same of e4m3, with results in bfloat16 that become e4m3 again."""
    rows, (d, f) = machine.sizes.rows, machine.sizes.large
    e4m3 = jnp.float8_e4m3fn
    x = machine.array((rows, d), e4m3)
    up, down = (machine.array(s, e4m3, s[0] ** -0.5) for s in ((d, f), (f, d)))

    def turn(x_TD: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
        for w in (up_DF, down_FD):
            x_TD = jnp.matmul(x_TD, w, preferred_element_type=jnp.bfloat16).astype(e4m3)
        return x_TD

    return Probe(
        f"float8 products ({rows} x {d} x {f})",
        4.0 * rows * d * f,
        Repeated(machine, turn, x, up, down),
    )


def attention(machine: Machine, dtype: Any) -> tuple[Probe, Probe]:
    """(forward, forward and backward) of a sequence on each device, by what a run would take.

    FLOPs are those of causal attention, half of all pairs: two products forward and five backward.
    """
    s = machine.sizes
    of_qk, of_v = ((1, s.length, s.heads, width) for width in (s.qk, s.v))
    q, k, v, dout = (
        machine.array(shape, dtype, seed=seed).reshape(machine.mesh.size, *shape[1:])
        for seed, shape in enumerate((of_qk, of_qk, of_v, of_v))
    )
    segments = machine.array((s.length,), jnp.int32, 0.0)

    def attend(q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array) -> jax.Array:
        return causal_attention(q_BSNH, k_BSNH, v_BSNV, segments, s.qk**-0.5)

    def as_queries(a_BSNV: jax.Array) -> jax.Array:
        return jnp.pad(a_BSNV, [(0, 0)] * 3 + [(0, s.qk - s.v)])

    def forward(q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array) -> jax.Array:
        return as_queries(attend(q_BSNH, k_BSNH, v_BSNV))

    def both(q_BSNH, k_BSNH, v_BSNV, dout_BSNV):
        _, back = jax.vjp(attend, q_BSNH, k_BSNH, v_BSNV)
        dq, dk, dv = back(dout_BSNV)
        return dq + dk + as_queries(dv)

    pairs = s.heads * s.length**2 / 2
    there = 2 * pairs * (s.qk + s.v)
    back = 2 * pairs * (3 * s.qk + 2 * s.v)
    name = f"attention, {s.heads} heads of {s.qk} and {s.v}, {s.length} tokens"
    return (
        Probe(f"{name}, forward", there, Repeated(machine, forward, q, k, v, of_each=False)),
        Probe(f"{name}, both", there + back, Repeated(machine, both, q, k, v, dout, of_each=False)),
    )


def grouped(machine: Machine, dtype: Any) -> Probe:
    """[rows, D] by expert x [E, D, F] x [E, F, D]: by the kernels that a run takes, or the CPU's."""
    s = machine.sizes
    e, rows, (d, f) = s.experts, s.expert_rows, s.narrow
    x = machine.array((rows, d), dtype)
    up = machine.array((e, d, f), dtype, d**-0.5)
    down = machine.array((e, f, d), dtype, f**-0.5)
    with jax.set_mesh(machine.mesh):
        chosen = implementations.kernels("auto", dtype)
    each = rows // e
    start_G1 = jnp.arange(e + 1, dtype=jnp.int32) * each
    none = jnp.zeros(0, jnp.int32)
    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    if machine.on_cpu:
        there = cpu_grouped_matmul.SortedRows(none, none, start_G1[:-1], jnp.diff(start_G1))
        block = cpu_grouped_matmul.block_size(rows, 1, e)
        x = machine.array((rows + block, d), dtype)

        def multiply(x_JD: jax.Array, w_EDF: jax.Array) -> jax.Array:
            return cpu_grouped_matmul.matmul(x_JD, w_EDF, there, block)

    elif chosen is None:
        raise UserError("no kernels for grouped products work here")
    else:
        expert_N = jnp.repeat(jnp.arange(e, dtype=jnp.int32), each // BLOCK)
        blocks = Blocks(expert_N, start_G1 // BLOCK)
        multiply = chosen.products(BlockRows(none, none, blocks)).multiply

    def turn(x_JD: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array) -> jax.Array:
        return multiply(multiply(x_JD, up_EDF), down_EFD)

    name = f"products of {e} experts ({rows} x {d} x {f})"
    return Probe(name, 4.0 * rows * d * f, Repeated(machine, turn, x, up, down))


def triad(machine: Machine, what: str) -> Probe:
    """a <- b + 0.5 a: bytes of two arrays read and one written.

    Args:
      what: memory or cached, of Sizes.
    """
    size = getattr(machine.sizes, what)
    a, b = (machine.array((size // 4,), jnp.float32, seed=seed) for seed in (0, 1))

    def turn(a: jax.Array, b: jax.Array) -> jax.Array:
        return b + 0.5 * a

    return Probe(f"a + 0.5 b of {gb(size)}", 3.0 * size, Repeated(machine, turn, a, b))


def launches(machine: Machine) -> Probe:
    """Tiny products, each a kernel of its own that waits for the one before."""
    x = machine.array((8, 8), jnp.float32, 8**-0.5)

    def turn(x_DD: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            x_DD = x_DD @ x_DD
        return x_DD

    return Probe(f"{LAUNCHES} tiny products", LAUNCHES, Repeated(machine, turn, x))
