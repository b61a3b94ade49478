"""What a train step on a CPU costs by parts, and the least that each part could cost here: how near
the step is to its floor.

  python -m benchmarks floor [--shape=mid] [--dtype=float32] [--remat=dots] [--steps=3] [--json]

Traces the compiled step (shapes: benchmarks/support/shapes.py) and adds up its instructions by part
of the model. Beside the measured time of matmuls stand two ideals: their FLOPs at the speed of this
machine's best square matmul, and the time of the very same products alone (same shapes, nothing
else running, best of some runs). Beside all other instructions stands the time to read their
operands and to write their results once, at the speed at which this machine copies an array of that
many bytes. What a slice or a gather takes of an operand counts, not all of it. The floor of a part
is its matmuls, alone or as they were if that was less, plus those bytes: it takes the instructions
as they are, so fusing more would lower it. Times of instructions that ran at once, on different
cores, add up.
"""

import math
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.step import matmul_peak
from benchmarks.support import shapes
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.model.count import count
from deepseek_jax.plan import topology
from deepseek_jax.run import profile
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state
from deepseek_jax.xla import hlo, loops, work

COPY_SIZES = [
    2**n for n in range(14, 29, 2)
]  # bytes: from what fits the first cache to what fits none


class Matmul(NamedTuple):
    """One product, as XLA's dot: shapes, and the dimensions of each operand that are contracted and
    shared."""

    dtype: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    dimensions: tuple[
        tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
    ]

    @property
    def flops(self) -> int:
        (_, contracted), (_, shared) = self.dimensions
        free = math.prod(n for i, n in enumerate(self.right) if i not in (*contracted, *shared))
        return 2 * math.prod(self.left) * free


class Least(NamedTuple):
    """What an instruction has to do."""

    matmuls: tuple[Matmul, ...]
    bytes: int


class Row(NamedTuple):
    """Seconds per step of one part of the model."""

    matmuls: float  # measured
    at_peak: float
    alone: float
    other: float  # measured
    bytes: float  # what that takes at the speed of a copy

    @property
    def measured(self) -> float:
        return self.matmuls + self.other

    @property
    def floor(self) -> float:
        return min(self.alone, self.matmuls) + self.bytes


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shape", choices=shapes.NAMES, default="mid", help=f"{', '.join(shapes.NAMES)}."
    )
    parser.add_argument("--dtype", default="float32", help="Compute dtype.")
    parser.add_argument("--remat", default="dots", help="config.train.remat.")
    parser.add_argument("--steps", type=int, default=3, help="Steps to trace.")
    own = parser.parse_args()
    result = measure(own.shape, own.dtype, own.remat, own.steps)
    report(own, result, text)
    return 0


def measure(shape: str, dtype: str, remat: str, steps: int) -> dict[str, Any]:
    """Traces the step on one CPU device and makes the table."""
    config = shapes.config(shape, dtype, remat)
    mesh, layout = topology.lay_out(config, jax.devices()[:1])
    step = topology.compile_step(config, mesh, layout)
    seconds = []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        state = init_state(config, layout)
        for i, batch in enumerate(shapes.batches(config, 2 + 2 * steps)):
            if i == 2 + steps:
                jax.profiler.start_trace(folder)
            started = time.perf_counter()
            state, _ = jax.block_until_ready(
                step.compiled(state, put_batch(batch, config.micro_batch, mesh))
            )
            seconds.append(time.perf_counter() - started)
        jax.profiler.stop_trace()
        text = step.compiled.as_text()
        events = profile.instructions(folder, text)
    del state
    rows, peak = parts(hlo.Module(text), events, steps, dtype)
    flops = count(
        config.model, layout.abstract.params, config.train.sequence_length
    ).flops_per_token
    flops *= config.train.batch_size * config.train.sequence_length
    return {
        "machine": machine(),
        "shape": shape,
        "dtype": dtype,
        "remat": remat,
        "matmul_flops": peak,
        "model_flops": flops,
        "step_s": statistics.median(seconds[2 : 2 + steps]),
        "parts": {name: row._asdict() for name, row in rows.items()},
        "share_of_matmul": flops / peak / statistics.median(seconds[2 : 2 + steps]),
        "share_at_floor": flops / peak / sum(row.floor for row in rows.values()),
        "share_matmuls_alone": flops
        / peak
        / sum(min(row.alone, row.matmuls) for row in rows.values()),
    }


def parts(
    module: hlo.Module, events: list[profile.Event], steps: int, dtype: str
) -> tuple[dict[str, Row], float]:
    """The rows by part, and the FLOP/s of the best square matmul."""
    reader = work.Reader(module, on_gpu=False)
    least = {
        i.name: of(reader, computation, i)
        for computation, i, _ in loops.visits(module, lambda _: True)
    }
    speed, peak = copy_speed(), matmul_peak(dtype)
    alone = {m: time_alone(m) for m in sorted({m for e in events for m in least[e.name].matmuls})}
    sums: defaultdict = defaultdict(Counter)
    for e in events:
        cost, row = least[e.name], sums[e.part]
        if cost.matmuls:
            row["matmuls"] += e.seconds
            row["at_peak"] += sum(m.flops for m in cost.matmuls) / peak
            row["alone"] += sum(alone[m] for m in cost.matmuls)
        else:
            row["other"] += e.seconds
            row["bytes"] += cost.bytes / speed(cost.bytes)
    names = [n for n in (*profile.PARTS, *sums) if n in sums]
    return {n: Row(*(sums[n][f] / steps for f in Row._fields)) for n in dict.fromkeys(names)}, peak


def of(reader: work.Reader, computation: str, instruction: hlo.Instruction) -> Least:
    """What an instruction, with all that is fused into it, multiplies, reads and writes."""
    matmuls = tuple(
        matmul(reader.module.computations[place], i)
        for place, i in reader.products(computation, instruction)
    )
    return Least(matmuls, round(reader.of(computation, instruction).bytes))


def matmul(scope: dict[str, hlo.Instruction], dot: hlo.Instruction) -> Matmul:
    def dims(name: str) -> tuple[int, ...]:
        found = re.search(rf"{name}={{([\d,]*)}}", dot.attributes)
        return tuple(map(int, filter(None, found[1].split(",")))) if found else ()

    def shape(text):
        return (
            text[: text.index("[")],
            tuple(map(int, filter(None, text[text.index("[") + 1 : text.index("]")].split(",")))),
        )

    (dtype, left), (_, right) = (shape(scope[name].shape) for name in dot.operands[:2])
    return Matmul(
        dtype,
        left,
        right,
        (
            (dims("lhs_contracting_dims"), dims("rhs_contracting_dims")),
            (dims("lhs_batch_dims"), dims("rhs_batch_dims")),
        ),
    )


def time_alone(m: Matmul, runs: int = 7) -> float:
    """Seconds of a product: the best run of it alone or, where it is short, of several independent ones."""
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "s32": jnp.int32}[
        m.dtype
    ]
    many = int(min(max(1e8 // max(m.flops, 1), 1), 16))
    operands = [(jnp.ones(m.left, dtype), jnp.ones(m.right, dtype)) for _ in range(many)]
    return (
        best(
            jax.jit(lambda pairs: [jax.lax.dot_general(*pair, m.dimensions) for pair in pairs]),
            operands,
            runs=runs,
        )
        / many
    )


def best(f: Any, *arguments: Any, runs: int) -> float:
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)


def copy_speed() -> Any:
    """A function: bytes of an array -> bytes per second, read and written, of a copy of that size."""
    plus = jax.jit(lambda a: a + 1, donate_argnums=0)
    found = []
    for size in COPY_SIZES:
        a, times = plus(jnp.zeros(size // 8, jnp.float32)), []
        for _ in range(max(5, min(50, 2**26 // size))):
            started = time.perf_counter()
            a = jax.block_until_ready(plus(a))
            times.append(time.perf_counter() - started)
        found.append(size / min(times))
    # A program's start is not a part of an instruction's time: small sizes go no slower than the fastest.
    found = [max(found[i:]) for i in range(len(found))]
    return lambda size: float(
        np.interp(math.log(max(size, 1)), [math.log(s) for s in COPY_SIZES], found)
    )


def text(r: dict[str, Any]) -> str:
    """The table for a person."""

    def ms(s):
        return f"{s * 1e3:,.1f}"

    lines = [
        [
            "part",
            "ms per step",
            "matmuls",
            "at peak",
            "alone",
            "other",
            "its bytes",
            "floor",
            "of it",
        ]
    ]
    rows = {name: Row(**row) for name, row in r["parts"].items()}
    for name, row in (*rows.items(), ("all", Row(*map(sum, zip(*rows.values(), strict=True))))):
        lines.append(
            [
                name,
                ms(row.measured),
                ms(row.matmuls),
                ms(row.at_peak),
                ms(row.alone),
                ms(row.other),
                ms(row.bytes),
                ms(row.floor),
                f"{row.floor / row.measured:.0%}" if row.measured else "",
            ]
        )
    return (
        f"{r['shape']}, {r['dtype']}, remat {r['remat']}, {r['machine']['device']}, "
        f"{r['machine']['cores']} cores\n\n{texts.table(lines)}\n\n"
        f"A step takes {ms(r['step_s'])} ms: {r['share_of_matmul']:.0%} of the "
        f"{r['matmul_flops'] / 1e9:,.0f} GFLOP/s of the best square matmul. "
        f"If every instruction\nran at its floor it would be {r['share_at_floor']:.0%}; if there "
        "were matmuls only, each as quick as it is alone, "
        f"{r['share_matmuls_alone']:.0%}."
    )
