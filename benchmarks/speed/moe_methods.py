"""Ways to compute the routed experts of one MoE layer, compiled for one routing, and whether they agree.

Tensor names end in their axes: T tokens, K choices per token, E experts, D hidden size, F expert width.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.speed.attention import compute_dtype
from benchmarks.support import turns
from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, MoeConfig
from deepseek_jax.experts import dispatch
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel.mesh import make_mesh, per_device

METHODS = ("ours", "dense", "products", "ragged", "masked", "gathered")


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
    """Tokens [T, D], routing weights [T, K], experts [E, D, 2, F] and [E, F, D], and the gradient
    of the result [T, D]."""
    keys = jax.random.split(jax.random.key(0), 5)
    t, d, f = shape.tokens, shape.hidden, shape.width

    def normal(key, *size, scale=1.0):
        return (jax.random.normal(key, size) * scale).astype(dtype)

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
    """Each gives (y, gradients of x, weight, gate_up and down); dense those of its rows and of one
    expert's weights.

    Call it under `jax.set_mesh`.
    """
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
        parts = [slice(start, stop) for start, stop in itertools.pairwise([0, *end])]

        def products(rows, gate_up, down, dy):
            y, back = jax.vjp(
                lambda *of: [_glu(x @ w, shape.width) @ v for x, w, v in zip(*of, strict=True)],
                rows,
                gate_up,
                down,
            )
            return y, *back(dy)

        order = np.argsort(expert_TK.reshape(-1), kind="stable") // shape.choices

        # Arrays of their own: nothing is cut out or put together.
        def split(a):
            return [a[order][mine] for mine in parts]

        flat = a["gate_up"].reshape(shape.experts, shape.hidden, -1)
        out["products"] = turns.compiled(
            products, split(a["x"]), list(flat), list(a["down"]), split(a["dy"])
        )
    return out


def one_device() -> jax.sharding.Mesh:
    return make_mesh(Config(mesh=MeshConfig(fsdp=1)), jax.devices()[:1])


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

    def create():
        return nnx.split(
            MoE(model, MoeConfig(capacity_factor=capacity_factor), nnx.Rngs(0)), nnx.Param, ...
        )

    graphdef, params, rest = create()
    x = arrays(shape, compute_dtype())["x"][None]

    def both(params, rest, x):
        def call(params, x):
            return nnx.merge(graphdef, params, rest)(x, jnp.ones(x.shape[:2], bool))[0]

        y, back = jax.vjp(call, params, x)
        return y, back(x)

    return turns.compiled(both, params, rest, x)
