"""The routed experts of one MoE layer, forward and backward, on one device, against other ways to compute the same.

  python -m benchmarks moe [--shapes=16x4096x2x512x256,64x2048x8x256x64] [--loads=balanced,zipf] [--turns=7] [--module] [--floor] [--json]

A shape is experts x tokens x choices a token x hidden size x expert width. Timed in turns, median, with the gradients of tokens,
routing weights and expert weights; float32 on CPUs, bfloat16 on GPUs:

  ours     experts/dispatch.py: never drops a token, one program for every routing
  dense    one SwiGLU of tokens x choices rows: the same useful operations and nothing else, what cannot be beaten
  products each expert's products alone, every expert's rows and weights in arrays of their own, for one routing that is known when it is
           compiled: no token is moved, nothing is cut out or put together
  ragged   jax.lax.ragged_dot on rows sorted by expert
  masked   a scan over the experts, each on all tokens, weighted by 0 where it was not chosen
  gathered a scan over the experts, each on as many rows as the fullest has: known for one routing alone, so not of use in training

balanced: every expert has the same load. zipf: experts are chosen with probabilities in proportion to 1/rank. All are checked to
agree. --module adds the whole layer of model/moe.py (router and statistics too) on a routing of its own. --floor adds the least that the
instructions of ours could take on this CPU, as benchmarks/floor.py counts it: its products, each alone, and the bytes of all else at a copy's speed.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks import floor, turns
from benchmarks.attention import compute_dtype
from deepseek_jax.cli import texts
from deepseek_jax.cli.arguments import some_of
from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, MoeConfig
from deepseek_jax.errors import UserError
from deepseek_jax.experts import dispatch
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel.mesh import make_mesh, per_device
from deepseek_jax.plan import options
from deepseek_jax.run import profile
from deepseek_jax.xla import hlo

METHODS = ("ours", "dense", "products", "ragged", "masked", "gathered")
BARS = {"balanced": 1.6, "zipf": 2.2}  # most times that ours may take of dense


class Shape(NamedTuple):
    experts: int
    tokens: int
    choices: int
    hidden: int
    width: int

    @property
    def name(self) -> str:
        return "x".join(map(str, self))

    @property
    def flops(self) -> int:
        """Useful operations, forward and backward: three matrices, each multiplied with three times."""
        return 3 * 2 * 3 * self.tokens * self.choices * self.hidden * self.width


def main() -> int:
    parser = options.Parser(__doc__)
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
            "--floor is of ours, on a CPU. Have ours among --methods and set JAX_PLATFORMS=cpu, or leave it out."
        )
    rows = []
    for shape in map(read_shape, own.shapes.split(",")):
        for load in own.loads:
            print(f"{shape.name}, {load} ...", file=sys.stderr)
            rows.append(measure(shape, load, own))
    result = {
        "machine": turns.machine(),
        "dtype": str(compute_dtype()),
        "rows": rows,
        "bars": bars(rows),
    }
    print(json.dumps(result, indent=2) if own.json else text(result))
    return 0


def read_shape(given: str) -> Shape:
    try:
        return Shape(*map(int, given.split("x")))
    except (TypeError, ValueError) as e:
        raise UserError(
            f"--shapes: {given} is not five numbers. Write experts x tokens x choices x hidden x width, as 16x4096x2x512x256."
        ) from e


def routing(shape: Shape, load: str) -> np.ndarray:
    """int32 [T, K]: distinct experts for each token."""
    rng = np.random.default_rng(0)
    if load == "balanced":
        start = rng.permutation(shape.tokens)[:, None] * shape.choices
        return ((start + np.arange(shape.choices)) % shape.experts).astype(np.int32)
    # The largest of log p + Gumbel noise: draws without replacement.
    score = -np.log(np.arange(1, shape.experts + 1)) + rng.gumbel(
        size=(shape.tokens, shape.experts)
    )
    return np.argsort(-score, axis=1)[:, : shape.choices].astype(np.int32)


def arrays(shape: Shape, dtype: Any) -> dict[str, jax.Array]:
    """Tokens [T, D], routing weights [T, K], experts [E, D, 2, F] and [E, F, D], and the gradient of the result [T, D]."""
    keys = jax.random.split(jax.random.key(0), 5)
    t, d, f = shape.tokens, shape.hidden, shape.width
    normal = lambda key, *size, scale=1.0: (jax.random.normal(key, size) * scale).astype(dtype)
    return {
        "x": normal(keys[0], t, d),
        "weight": jax.random.uniform(keys[1], (t, shape.choices)),
        "gate_up": normal(keys[2], shape.experts, d, 2, f, scale=d**-0.5),
        "down": normal(keys[3], shape.experts, f, d, scale=f**-0.5),
        "dy": normal(keys[4], t, d),
    }


def functions(shape: Shape, expert_TK: np.ndarray, capacity_factor: float) -> dict[str, Callable]:
    """(x, weight, experts' choices [T, K], gate_up, down) -> y [T, D], by every method but dense."""
    fullest = int(np.bincount(expert_TK.reshape(-1), minlength=shape.experts).max())
    t, k = expert_TK.shape

    def ours(x, weight, expert, gate_up, down):
        return dispatch.dispatch(
            "all_to_all",
            dispatch.Tokens(x, weight, expert),
            dispatch.ExpertWeights(gate_up, down),
            capacity_factor,
        )[0]

    def ragged(x, weight, expert, gate_up, down):
        order = jnp.argsort(expert.reshape(-1), stable=True)
        sizes = jnp.bincount(expert.reshape(-1), length=shape.experts).astype(jnp.int32)
        hidden = lax.ragged_dot(
            x[order // k], gate_up.reshape(shape.experts, shape.hidden, -1), sizes
        )
        out = lax.ragged_dot(_glu(hidden, shape.width), down, sizes)
        out = out * weight.reshape(-1)[order][:, None].astype(x.dtype)
        return jnp.zeros_like(x).at[order // k].add(out)

    def over_experts(one):
        def f(x, weight, expert, gate_up, down):
            def step(y, e):
                return one(
                    y, x, weight, expert, gate_up[e].reshape(shape.hidden, -1), down[e], e
                ), None

            return lax.scan(step, jnp.zeros_like(x), jnp.arange(shape.experts))[0]

        return f

    def masked(y, x, weight, expert, gate_up, down, e):
        weight_T1 = jnp.sum(jnp.where(expert == e, weight, 0), axis=1, keepdims=True)
        return y + _glu(x @ gate_up, shape.width) @ down * weight_T1.astype(x.dtype)

    def gathered(y, x, weight, expert, gate_up, down, e):
        place = jnp.nonzero(expert.reshape(-1) == e, size=fullest, fill_value=t * k)[0]
        rows = x.at[place // k].get(mode="fill", fill_value=0)
        out = _glu(rows @ gate_up, shape.width) @ down
        return y.at[place // k].add(
            out
            * weight.reshape(-1).at[place].get(mode="fill", fill_value=0)[:, None].astype(x.dtype),
            mode="drop",
        )

    return {
        "ours": ours,
        "ragged": ragged,
        "masked": over_experts(masked),
        "gathered": over_experts(gathered),
    }


def _glu(hidden: jax.Array, width: int) -> jax.Array:
    return jax.nn.silu(hidden[..., :width]) * hidden[..., width:]


def programs(
    shape: Shape, load: str, methods: list[str], capacity_factor: float
) -> dict[str, turns.Program]:
    """Each gives (y, gradients of x, weight, gate_up and down); dense those of its rows and of one expert's weights.

    Call it under `jax.set_mesh`."""
    a = arrays(shape, compute_dtype())
    expert_TK = routing(shape, load)
    expert = jnp.asarray(expert_TK)
    out = {}
    for name, f in functions(shape, expert_TK, capacity_factor).items():
        if name in methods:
            f = per_device(f, in_specs=(jax.P(),) * 5, out_specs=jax.P())

            def both(x, weight, expert, gate_up, down, dy, f=f):
                y, back = jax.vjp(
                    lambda x, weight, gate_up, down: f(x, weight, expert, gate_up, down),
                    x,
                    weight,
                    gate_up,
                    down,
                )
                return y, *back(dy)

            out[name] = turns.compiled(
                both, a["x"], a["weight"], expert, a["gate_up"], a["down"], a["dy"]
            )
    if "dense" in methods:

        def dense(x, gate_up, down, dy):
            y, back = jax.vjp(
                lambda x, gate_up, down: _glu(x @ gate_up, shape.width) @ down, x, gate_up, down
            )
            return y, *back(dy)

        rows, drows = (jnp.tile(r, (shape.choices, 1)) for r in (a["x"], a["dy"]))
        out["dense"] = turns.compiled(
            dense, rows, a["gate_up"][0].reshape(shape.hidden, -1), a["down"][0], drows
        )
    if "products" in methods:
        end = np.cumsum(np.bincount(expert_TK.reshape(-1), minlength=shape.experts)).tolist()
        parts = [slice(start, stop) for start, stop in zip([0, *end], end)]

        def products(rows, gate_up, down, dy):
            y, back = jax.vjp(
                lambda *of: [_glu(x @ w, shape.width) @ v for x, w, v in zip(*of)],
                rows,
                gate_up,
                down,
            )
            return y, *back(dy)

        order = np.argsort(expert_TK.reshape(-1), kind="stable") // shape.choices
        # Arrays of their own: nothing is cut out or put together.
        split = lambda a: [a[order][mine] for mine in parts]
        flat = a["gate_up"].reshape(shape.experts, shape.hidden, -1)
        out["products"] = turns.compiled(
            products, split(a["x"]), list(flat), list(a["down"]), split(a["dy"])
        )
    return out


def one_device() -> jax.sharding.Mesh:
    return make_mesh(Config(mesh=MeshConfig(fsdp=1)), jax.devices()[:1])


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
    """Seconds that the products and the other instructions of a program take at least (benchmarks/floor.py)."""
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


def compare(results: dict[str, tuple]) -> None:
    tolerance = 1e-4 if compute_dtype() == jnp.float32 else 3e-2
    names = list(results)
    for name in names[1:]:
        for part, a, b in zip(
            ("y", "dx", "dweight", "dgate_up", "ddown"),
            results[name],
            results[names[0]],
            strict=True,
        ):
            a, b = (np.asarray(v, np.float32) for v in (a, b.reshape(a.shape)))
            error = np.abs(a - b).max() / np.abs(b).max()
            if not error < tolerance:
                raise FloatingPointError(f"{part} by {name} is {error:.1e} from that by {names[0]}")


def module_program(shape: Shape, capacity_factor: float) -> turns.Program:
    """The whole MoE layer without shared experts, one sequence; its routing is that of random weights."""
    model = ModelConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.choices,
        n_shared_experts=0,
    )
    create = lambda: nnx.split(
        MoE(model, MoeConfig(capacity_factor=capacity_factor), nnx.Rngs(0)), nnx.Param, ...
    )
    graphdef, params, rest = create()
    x = arrays(shape, compute_dtype())["x"][None]

    def both(params, rest, x):
        call = lambda params, x: nnx.merge(graphdef, params, rest)(x, jnp.ones(x.shape[:2], bool))[
            0
        ]
        y, back = jax.vjp(call, params, x)
        return y, back(x)

    return turns.compiled(both, params, rest, x)


def bars(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Of ours: its time in terms of dense's, and of ragged_dot's."""
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
        f"routed experts, forward + backward, {r['dtype']}, {r['machine']['device']}, {r['machine']['cores']} cores\n\n{texts.table(lines)}\n\n"
        + floors
        + "\n".join(f"{said[met]}: {name}" for name, met in r["bars"].items())
    )


def _floor(row: dict[str, Any]) -> str:
    least, dense = row["least_s"], row["median_s"].get("dense")
    of_dense = f" = {sum(least.values()) / dense:.2f} x dense" if dense else ""
    return (
        f"ours could take {sum(least.values()) * 1e3:,.1f} ms{of_dense}, {least['products'] * 1e3:,.1f} of it for products "
        f"and {least['other'] * 1e3:,.1f} for the bytes of all else"
    )
