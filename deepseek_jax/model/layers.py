"""The small parts: parameters with logical axes, linear maps, RMSNorm, the SwiGLU feed-forward.

Shape letters of this package: B sequences, S positions, T tokens (B*S), D hidden_size, V vocab_size, N heads,
H width of a query/key head (nope + rope), F feed-forward width, R rank, E routed experts, K experts per token,
C places per expert and round, L layers.

A `kernel` is [in, out]: the transpose of the Hugging Face `weight` of the same module. Modules have Hugging Face names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.weights import apply_weight, gather_on_device, stored_arrays

ATTENTION_NORM_EPS = (
    1e-6  # the norms inside MLA do not follow rms_norm_eps in any released implementation
)


def param(
    rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """A float32 parameter declared with its logical axes, one name a dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    return nnx.Param(
        init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False
    )


def reshaped(x: jax.Array, shape: tuple[int, ...], spec: Sequence[Any]) -> jax.Array:
    """x in another shape [B, S, ...], laid out as `spec` says, one entry a dimension: nothing moves.

    jnp.reshape finds the layout by itself, but takes a dimension of size one for none: of one sequence, or
    one head, it gives the mesh axis to a neighbour, or leaves it out.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=jax.P(*spec))


def laid_out_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """x in the layout of an array of as many dimensions, which it came from: nothing moves.

    From jax 0.11 on a slice of one number has lost its layout: of one sequence, token and head, half of a
    rope width of two.
    """
    spec = jax.typeof(like).sharding.spec
    return x if jax.typeof(x).sharding.spec == spec else jax.sharding.reshard(x, spec)


def split_width(x: jax.Array, first: int) -> tuple[jax.Array, jax.Array]:
    """The first numbers of the last axis, which nothing divides, and the rest of them."""
    parts = jnp.split(x, [first], axis=-1)
    return laid_out_as(parts[0], x), laid_out_as(parts[1], x)


def split_heads(x_BSF: jax.Array, heads: int) -> jax.Array:
    """[B, S, N * H] to [B, S, N, H]: what divides the width divides the heads."""
    spec = jax.typeof(x_BSF).sharding.spec
    return reshaped(x_BSF, (*x_BSF.shape[:-1], heads, x_BSF.shape[-1] // heads), (*spec, None))


def join_heads(x_BSNH: jax.Array) -> jax.Array:
    """[B, S, N, H] to [B, S, N * H]: what divides the heads divides the width."""
    *rest, heads, width = x_BSNH.shape
    return reshaped(x_BSNH, (*rest, heads * width), jax.typeof(x_BSNH).sharding.spec[:-1])


class Linear(nnx.Module):
    """y = x @ kernel, plus bias if it has a logical axis, in the dtype of x."""

    def __init__(
        self,
        model: ModelConfig,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        bias: str | None = None,
    ):
        self.kernel = param(
            rngs, nnx.initializers.normal(model.initializer_range), (d_in, d_out), axes
        )
        self.bias = param(rngs, nnx.initializers.zeros, (d_out,), (bias,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = apply_weight(linear, self.kernel, x.dtype, x)
        return y if self.bias is None else apply_weight(jnp.add, self.bias, y.dtype, y)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O]. Where the tensor axis divides the inputs, this sums over it.

    JAX's own gradient of the kernel is a transposed product, for which XLA on CPUs writes the output's gradient transposed, an element at a time.
    """
    out = jax.P(*jax.typeof(x).sharding.spec[:-1], jax.typeof(kernel).sharding.spec[1])
    return jnp.einsum("...i,io->...o", x, kernel, out_sharding=out)


def _linear_backward(residuals, dy):
    x, kernel = residuals
    spec = lambda a: jax.typeof(a).sharding.spec
    dx = jnp.einsum("...o,io->...i", dy, kernel, out_sharding=spec(x))
    # Contracting one dimension leaves x as it is; with two, XLA would transpose it first.
    tokens = lambda a: jax.lax.reshape(
        a,
        (-1, a.shape[-1]) if a.ndim == 2 else (a.size // a.shape[-1], a.shape[-1]),
        out_sharding=jax.P(spec(a)[0], spec(a)[-1]),
    )
    return dx, jnp.einsum("ti,to->io", tokens(x), tokens(dy), out_sharding=spec(kernel))


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_backward)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = param(rngs, nnx.initializers.ones, (width,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return apply_weight(jnp.multiply, self.weight, jnp.float32, x32).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig, width: int, rngs: nnx.Rngs):
        self.gate_proj = Linear(model, model.hidden_size, width, ("embed", "mlp"), rngs)
        self.up_proj = Linear(model, model.hidden_size, width, ("embed", "mlp"), rngs)
        self.down_proj = Linear(model, width, model.hidden_size, ("mlp", "embed"), rngs)

    @jax.named_scope("mlp")
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_BSF, up_BSF = (
            checkpoint_name(projection(x_BSD), "mlp_gate_up")
            for projection in (self.gate_proj, self.up_proj)
        )
        h_BSF = jax.nn.silu(gate_BSF) * up_BSF
        return self.down_proj(checkpoint_name(h_BSF, "mlp_hidden"))


class Embedding(nnx.Module):
    """Token ids to rows of `weight` [V, D]."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(model.initializer_range)
        self.weight = param(rngs, init, (model.vocab_size, model.hidden_size), ("vocab", "embed"))

    @jax.named_scope("embed")
    def __call__(self, ids_BS: jax.Array, dtype: Any) -> jax.Array:
        (arrays, specs), batch = stored_arrays(self.weight), jax.typeof(ids_BS).sharding.spec

        def one_device(ids_BS, *arrays):
            """Rows that this device holds, zeros for the others, summed over the tensor axis."""
            weight_VD = gather_on_device(arrays, specs, jnp.float32)
            rows = weight_VD.shape[0]
            local_BS = ids_BS - jax.lax.axis_index("tensor") * rows
            here_BS1 = ((local_BS >= 0) & (local_BS < rows))[..., None]
            return jax.lax.psum(
                jnp.where(here_BS1, weight_VD[jnp.clip(local_BS, 0, rows - 1)], 0.0), "tensor"
            )

        look_up = per_device(one_device, in_specs=(batch, *specs), out_specs=jax.P(*batch, None))
        # Cast after the look-up: its transpose adds up a row for every occurrence of a token, and in bfloat16 such a sum stops
        # growing after some hundred of them.
        return look_up(ids_BS, *arrays).astype(dtype)
