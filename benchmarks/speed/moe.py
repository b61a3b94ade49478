"""The routed experts of one MoE layer, forward and backward, on one device, against other ways to
compute the same.

  python -m benchmarks moe [--shapes=16x4096x2x512x256,64x2048x8x256x64] [--loads=balanced,zipf]
                           [--turns=7] [--module] [--floor] [--json]

A shape is experts x tokens x choices per token x hidden size x expert width. Timed in turns,
median, with the gradients of tokens, routing weights and expert weights; float32 on CPUs, bfloat16
on GPUs:

  ours      experts/dispatch.py: never drops a token, one program for every routing
  dense     one SwiGLU of tokens x choices rows: the same useful operations and nothing else, the
            bound that cannot be beaten
  products  each expert's products alone, its rows and weights in arrays of their own, for one
            routing that is known when it is compiled: no token is moved or put together
  ragged    jax.lax.ragged_dot on rows sorted by expert
  masked    a scan over the experts, each on all tokens, weighted by 0 where it was not chosen
  gathered  a scan over the experts, each on as many rows as the fullest has: these are known for
            one routing only, so it is of no use in training

balanced: every expert has the same load. zipf: experts are chosen with probabilities in proportion
to 1/rank. All are checked to agree. --module adds the whole layer of model/moe.py (router and
statistics too) on a routing of its own. --floor adds the least that the instructions of ours could
take on this CPU, as benchmarks/speed/floor.py counts it: its products, each alone, and the bytes of
all else at a copy's speed.
"""

import statistics
import sys
import tempfile
from typing import Any

import jax

from benchmarks.speed import floor
from benchmarks.speed.attention import compute_dtype
from benchmarks.speed.moe_methods import (
    METHODS,
    Shape,
    compare,
    module_program,
    one_device,
    programs,
)
from benchmarks.support import turns
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.cli.arguments import some_of
from deepseek_jax.config.options import MoeConfig
from deepseek_jax.errors import UserError
from deepseek_jax.run import profile
from deepseek_jax.xla import hlo

BARS = {"balanced": 1.6, "zipf": 2.2}  # most times that ours may take of dense


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shapes",
        default="16x4096x2x512x256,64x2048x8x256x64",
        help="Shapes, separated by commas.",
    )
    parser.add_argument(
        "--loads", type=some_of(*BARS), default="balanced,zipf", help="Loads, separated by commas."
    )
    parser.add_argument(
        "--methods", type=some_of(*METHODS), default=",".join(METHODS), help="What to time."
    )
    parser.add_argument("--turns", type=int, default=7, help="Turns to time.")
    parser.add_argument(
        "--capacity-factor",
        type=float,
        default=MoeConfig.capacity_factor,
        help="As config.moe.capacity_factor.",
    )
    parser.add_argument("--module", action="store_true", help="The whole MoE layer too.")
    parser.add_argument(
        "--floor", action="store_true", help="The least that the instructions of ours could take."
    )
    own = parser.parse_args()
    if own.floor and ("ours" not in own.methods or jax.default_backend() != "cpu"):
        raise UserError(
            "--floor is of ours, on a CPU. Have ours among --methods and set JAX_PLATFORMS=cpu, "
            "or leave it out."
        )
    rows = []
    for shape in map(read_shape, own.shapes.split(",")):
        for load in own.loads:
            print(f"{shape.name}, {load} ...", file=sys.stderr)
            rows.append(measure(shape, load, own))
    result = {
        "machine": machine(),
        "dtype": str(compute_dtype()),
        "rows": rows,
        "bars": bars(rows),
    }
    report(own, result, text)
    return 0


def read_shape(given: str) -> Shape:
    try:
        return Shape(*map(int, given.split("x")))
    except (TypeError, ValueError) as e:
        raise UserError(
            f"--shapes: {given} is not five numbers. Write experts x tokens x choices x hidden x "
            "width, as 16x4096x2x512x256."
        ) from e


def measure(shape: Shape, load: str, own: Any) -> dict[str, Any]:
    """One row. Raises FloatingPointError where methods disagree."""
    with jax.set_mesh(one_device()):
        built = programs(shape, load, own.methods, own.capacity_factor)
        compare({name: p() for name, p in built.items() if name not in ("dense", "products")})
        if own.module:
            built["module"] = module_program(shape, own.capacity_factor)
        times = turns.seconds(built, own.turns)
        least = least_of(built["ours"]) if own.floor else None
    row = {
        "shape": shape.name,
        "load": load,
        "median_s": {name: statistics.median(t) for name, t in times.items()},
        "gflops": shape.flops / 1e9,
        "temporaries": {name: p.temporaries for name, p in built.items()},
    }
    row["times_of_dense"] = (
        {name: turns.ratio(times, name, "dense") for name in times if name != "dense"}
        if "dense" in times
        else {}
    )
    row["least_s"] = least
    row["ragged_times_of_ours"] = (
        turns.ratio(times, "ragged", "ours") if {"ragged", "ours"} <= set(times) else None
    )
    return row


def least_of(program: turns.Program, runs: int = 3) -> dict[str, float]:
    """Seconds that the products and the other instructions of a program take at least
    (benchmarks/speed/floor.py)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(program())
        text = program.compiled.as_text()
        parts, _ = floor.parts(
            hlo.Module(text), profile.instructions(folder, text), runs, str(compute_dtype())
        )
    return {
        "products": sum(min(p.alone, p.matmuls) for p in parts.values()),
        "other": sum(p.bytes for p in parts.values()),
    }


def bars(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether ours takes at most so many times the time of dense, and less than ragged_dot."""
    out = {}
    for r in rows:
        if "ours" in r["times_of_dense"]:
            out[f"{r['shape']} {r['load']}: within {BARS[r['load']]} x dense"] = (
                r["times_of_dense"]["ours"] <= BARS[r["load"]]
            )
        if r["ragged_times_of_ours"] is not None and r["shape"].startswith("64x"):
            out[f"{r['shape']} {r['load']}: 10 x as quick as ragged_dot"] = (
                r["ragged_times_of_ours"] >= 10
            )
    return out


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    names = list(dict.fromkeys(name for row in r["rows"] for name in row["median_s"]))
    lines = [["shape", "load", *names, *(f"{n} / dense" for n in names if n != "dense")]]
    for row in r["rows"]:
        ms = [f"{row['median_s'][n] * 1e3:,.1f} ms" for n in names]
        ratios = (
            f"{row['times_of_dense'][n]:.2f}" if row["times_of_dense"] else ""
            for n in names
            if n != "dense"
        )
        lines.append([row["shape"], row["load"], *ms, *ratios])
    said = {True: "met", False: "MISSED"}
    floors = "".join(
        f"{row['shape']} {row['load']}: {_floor(row)}\n" for row in r["rows"] if row["least_s"]
    )
    return (
        f"routed experts, forward + backward, {r['dtype']}, {r['machine']['device']}, "
        f"{r['machine']['cores']} cores\n\n{texts.table(lines)}\n\n"
        + floors
        + "\n".join(f"{said[met]}: {name}" for name, met in r["bars"].items())
    )


def _floor(row: dict[str, Any]) -> str:
    least, dense = row["least_s"], row["median_s"].get("dense")
    of_dense = f" = {sum(least.values()) / dense:.2f} x dense" if dense else ""
    return (
        f"ours could take {sum(least.values()) * 1e3:,.1f} ms{of_dense}, "
        f"{least['products'] * 1e3:,.1f} of it for products "
        f"and {least['other'] * 1e3:,.1f} for the bytes of all else"
    )
