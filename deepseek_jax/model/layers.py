"""The small parts: parameters with logical axes, linear maps, RMSNorm, the SwiGLU feed-forward.

Shape letters of this package: B sequences, S positions, T tokens (B*S), D hidden_size, V vocab_size
(in attention: width of a value head), N heads, H width of a query/key head (nope + rope), F
feed-forward width, R rank, E routed experts, K experts per token, C capacity of an expert per
round, L layers.

A `kernel` is [in, out]: the transpose of the Hugging Face `weight` of the same module. Modules have
Hugging Face names.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model import lookup, noise
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.quantized import QuantizedWeight
from deepseek_jax.parallel.weights import (
    apply_weight,
    gather_for_use,
    gather_rounded,
    stored_arrays,
)


def param(
    rngs: nnx.Rngs,
    init: Callable,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A float32 parameter declared with its logical axes, one name per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    return kind(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def reshaped(x: jax.Array, shape: tuple[int, ...], spec: Sequence[Any]) -> jax.Array:
    """x in another shape [B, S, ...], laid out as `spec` says, one entry per dimension: nothing moves.

    jnp.reshape finds a layout by itself, but ignores dimensions of size one: with one sequence or
    one head it gives the mesh axis to a neighbour, or drops it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=jax.P(*spec))


def laid_out_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """x in the layout of the array of as many dimensions that it was sliced from: nothing moves.

    From jax 0.11 on a slice of size one has lost its layout: half of a rope width of two, with one
    sequence, token and head.
    """
    spec = jax.typeof(like).sharding.spec
    return x if jax.typeof(x).sharding.spec == spec else jax.sharding.reshard(x, spec)


def split_width(x: jax.Array, first: int) -> tuple[jax.Array, jax.Array]:
    """The first `first` numbers of the last axis, which no mesh axis divides, and the rest."""
    left, right = jnp.split(x, [first], axis=-1)
    return laid_out_as(left, x), laid_out_as(right, x)


def split_heads(x_BSF: jax.Array, heads: int) -> jax.Array:
    """[B, S, N * H] to [B, S, N, H]: the mesh axis of the width becomes that of the heads."""
    spec = jax.typeof(x_BSF).sharding.spec
    return reshaped(x_BSF, (*x_BSF.shape[:-1], heads, x_BSF.shape[-1] // heads), (*spec, None))


def join_heads(x_BSNH: jax.Array) -> jax.Array:
    """[B, S, N, H] to [B, S, N * H]: the mesh axis of the heads becomes that of the width."""
    *rest, heads, width = x_BSNH.shape
    return reshaped(x_BSNH, (*rest, heads * width), jax.typeof(x_BSNH).sharding.spec[:-1])


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What a module knows of the LoRA update of its weight, besides the factors (lora.py)."""

    scale: float
    dropout: float = 0.0  # share of its inputs that are dropped in training
    site: int = 0  # tells the linear maps of a layer apart: each drops others


class Linear(nnx.Module):
    """y = x @ kernel, plus bias if it has a logical axis, in the dtype of x.

    With LoRA plus scale * dropout(x) @ lora_A @ lora_B.
    """

    lora: LowRank | None = None

    def __init__(
        self,
        config: ModelConfig,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        bias: str | None = None,
    ):
        self.kernel = param(
            rngs, nnx.initializers.normal(config.initializer_range), (d_in, d_out), axes
        )
        self.bias = param(rngs, nnx.initializers.zeros, (d_out,), (bias,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = apply_weight(linear, self.kernel, x.dtype, x)
        if self.lora is not None:
            kept = noise.dropped(x, self.lora.dropout, self.lora.site)
            low = apply_weight(linear, self.lora_A, x.dtype, kept) * self.lora.scale
            y = y + apply_weight(linear, self.lora_B, x.dtype, low)
        return y if self.bias is None else apply_weight(jnp.add, self.bias, y.dtype, y)


def merged_kernel(module: Linear) -> jax.Array:
    """The weight as it acts, outside of jit: with what LoRA adds, and out of few bits."""
    if module.lora is None and not isinstance(module.kernel.get_value(), QuantizedWeight):
        return module.kernel.get_value()
    graphdef, state = nnx.split(module)
    return _merged(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def _merged(graphdef: nnx.GraphDef, state: nnx.State) -> jax.Array:
    module = nnx.merge(graphdef, state)
    kernel = gather_for_use(module.kernel, jnp.float32)
    if module.lora is not None:
        a, b = (gather_for_use(f, jnp.float32) for f in (module.lora_A, module.lora_B))
        kernel = kernel + linear(a, b) * module.lora.scale
    return kernel


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O]. Where the tensor axis divides I, this sums over it.

    The gradient is written by hand: JAX's own gradient of the kernel is a transposed product, for
    which XLA on CPUs transposes the output's gradient one element at a time.
    """
    return _product(x, kernel)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    out = jax.P(*jax.typeof(x).sharding.spec[:-1], jax.typeof(kernel).sharding.spec[1])
    return jnp.einsum("...i,io->...o", x, kernel, out_sharding=out)


def _linear_forward(x, kernel):
    # Not `linear`: a policy of jax.checkpoint would see a custom_vjp_call instead of the product, and
    # compute it again in backward.
    return _product(x, kernel), (x, kernel)


def _linear_backward(residuals, dy):
    x, kernel = residuals
    dx = jnp.einsum("...o,io->...i", dy, kernel, out_sharding=jax.typeof(x).sharding.spec)
    dkernel_spec = jax.typeof(kernel).sharding.spec
    return dx, jnp.einsum("ti,to->io", _tokens(x), _tokens(dy), out_sharding=dkernel_spec)


def _tokens(a: jax.Array) -> jax.Array:
    """[T, W] of [..., W].

    With one dimension to contract XLA leaves the array as it is; with two it transposes it first.
    """
    spec = jax.typeof(a).sharding.spec
    shape = (-1, a.shape[-1]) if a.ndim == 2 else (a.size // a.shape[-1], a.shape[-1])
    return jax.lax.reshape(a, shape, out_sharding=jax.P(spec[0], spec[-1]))


linear.defvjp(_linear_forward, _linear_backward)


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

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
        self.gate_proj = Linear(config, config.hidden_size, width, ("embed", "mlp"), rngs)
        self.up_proj = Linear(config, config.hidden_size, width, ("embed", "mlp"), rngs)
        self.down_proj = Linear(config, width, config.hidden_size, ("mlp", "embed"), rngs)

    @jax.named_scope("mlp")
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return self.down_proj(checkpoint_name(self._units(x_BSD), "mlp_hidden"))

    def _units(self, x_BSD: jax.Array) -> jax.Array:
        gate_BSF = checkpoint_name(self.gate_proj(x_BSD), "mlp_gate_up")
        up_BSF = checkpoint_name(self.up_proj(x_BSD), "mlp_gate_up")
        return jax.nn.silu(gate_BSF) * up_BSF

    def unit_sums(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        """float32 [F]: the sum of |silu(gate) * up| of the inner units over valid tokens, for a tap."""
        units_BSF = jnp.abs(self._units(x_BSD).astype(jnp.float32))
        return jnp.sum(jnp.where(valid_BS[:, :, None], units_BSF, 0.0), axis=(0, 1))


class Embedding(nnx.Module):
    """Token ids to rows of `weight` [V, D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.weight = param(rngs, init, (config.vocab_size, config.hidden_size), ("vocab", "embed"))

    @jax.named_scope("embed")
    def __call__(self, ids_BS: jax.Array, dtype: Any) -> jax.Array:
        arrays, specs = stored_arrays(self.weight)
        batch = jax.typeof(ids_BS).sharding.spec

        def one_device(ids_BS, *arrays):
            """Rows that this device holds, zeros for the others, summed over the tensor axis."""
            weight_VD = gather_rounded(arrays, specs, dtype)
            rows = weight_VD.shape[0]
            local_BS = ids_BS - jax.lax.axis_index("tensor") * rows
            here_BS1 = ((local_BS >= 0) & (local_BS < rows))[..., None]
            return jax.lax.psum(
                jnp.where(here_BS1, lookup.rows(weight_VD, jnp.clip(local_BS, 0, rows - 1)), 0.0),
                "tensor",
            )

        look_up = per_device(one_device, in_specs=(batch, *specs), out_specs=jax.P(*batch, None))
        # Cast after the look-up: its transpose adds up a row for every occurrence of a token, and a
        # bfloat16 sum stops growing after a few hundred of them.
        return look_up(ids_BS, *arrays).astype(dtype)
