"""Attention within documents by fused kernels for NVIDIA GPUs: the one door to them.

A query sees the keys of its own segment whose position is not after its own. Queries and keys have ids of
their own and may differ in number: either may be a part of a longer sequence. Blocks of keys that a tile
of queries cannot see are not read (visible_blocks.py), and no scores reach the GPU's memory.

    kernels     for                                                              numbers
    mosaic      Hopper GPUs, compute capability 9 (Pallas Mosaic GPU: wgmma)     bfloat16, float16
    triton      GPUs from Ampere on (Pallas Triton, which JAX is to remove)      float32 too

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691). Gradients take two kernels, one for queries
and one for keys and values: nothing is added in an open order, so that runs repeat themselves.

Shape letters: layers.py; Q queries and K keys of a sequence; N heads of queries, M heads of keys and
values, each for N / M neighbouring query heads.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.attention.visible_blocks import AFTER_ALL, BEFORE_ALL, Ids, packed

MODULES = {
    "mosaic": "deepseek_jax.model.attention.fused_mosaic",
    "triton": "deepseek_jax.model.attention.fused_triton",
}
LOG2_E = 1.4426950408889634
UNSEEING = 1e30  # for the logsumexp of a query that sees nothing: 2^(score - this) is 0


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Which kernels.

    Attributes:
      kernels: a key of MODULES.
      interpret: kernels are interpreted, on any device.
    """

    kernels: str
    interpret: bool = False


class Operands(NamedTuple):
    """Padded as kernels want them: sequences to whole tiles, heads to whole widths."""

    q: jax.Array  # [B, Q, N, H]
    k: jax.Array  # [B, K, M, H]
    v: jax.Array  # [B, K, M, V]
    queries: jax.Array  # int32 [B, 2, Q]: positions and segments
    keys: jax.Array  # int32 [B, 2, K]


def causal_ids(segment_ids_BS: jax.Array) -> Ids:
    """Of whole sequences, whose positions count through all documents of a row."""
    position_S = jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32)
    return Ids(jnp.broadcast_to(position_S, segment_ids_BS.shape), segment_ids_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def attention(
    method: FusedAttention,
    q_BQNH: jax.Array,
    k_BKMH: jax.Array,
    v_BKMV: jax.Array,
    queries: Ids,
    keys: Ids,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `forward`. Both results have gradients, so that results over different keys may be combined."""
    return forward(method, q_BQNH, k_BKMH, v_BKMV, queries, keys, scale)


def _attention_forward(method, q, k, v, queries, keys, scale):
    out, lse = forward(method, q, k, v, queries, keys, scale)
    return (out, lse), (q, k, v, queries, keys, out, lse)


def _attention_backward(method, scale, kept, cotangents):
    q, k, v, queries, keys, out, lse = kept
    dout, dlse = cotangents
    grads = backward(method, q, k, v, queries, keys, out, lse, dout, scale, dlse)
    return (*grads, None, None)


attention.defvjp(_attention_forward, _attention_backward)


def forward(
    method: FusedAttention,
    q_BQNH: jax.Array,
    k_BKMH: jax.Array,
    v_BKMV: jax.Array,
    queries: Ids,
    keys: Ids,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; softmax and all sums in float32.

    Args:
      method: which kernels.
      q_BQNH: queries.
      k_BKMH: keys, in the dtype of queries.
      v_BKMV: values, likewise.
      queries: where queries stand.
      keys: where keys stand.
      scale: multiplies the scores; above 0.

    Returns:
      The output [B, Q, N, V] in the dtype of the arguments, and the logsumexp of each query's scores,
      float32 [B, N, Q]. A query that sees no key has 0 and -inf.
    """
    module = _module(method)
    given = _operands(module, q_BQNH, k_BKMH, v_BKMV, queries, keys)
    b, q, n, _ = given.q.shape
    out = jax.ShapeDtypeStruct((b, q, n, given.v.shape[-1]), given.q.dtype)
    lse = jax.ShapeDtypeStruct((b, n, q), jnp.float32)
    call = functools.partial(module.forward, scale=scale)
    out_BQNV, lse_BNQ = _call(call, method, (out, lse), *given)
    length, width = q_BQNH.shape[1], v_BKMV.shape[-1]
    return out_BQNV[:, :length, :, :width], lse_BNQ[:, :, :length]


def backward(
    method: FusedAttention,
    q_BQNH: jax.Array,
    k_BKMH: jax.Array,
    v_BKMV: jax.Array,
    queries: Ids,
    keys: Ids,
    out_BQNV: jax.Array,
    lse_BNQ: jax.Array,
    dout_BQNV: jax.Array,
    scale: float,
    dlse_BNQ: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The gradients of q, k and v, summed up in float32, in their dtypes.

    Args:
      method: which kernels; what is not named here, as `forward` has it.
      out_BQNV: the output: of `forward`, or of these queries over more keys than these.
      lse_BNQ: the logsumexp that belongs to it.
      dout_BQNV: the gradient of the output.
      dlse_BNQ: that of the logsumexp; None: it has none.
    """
    module = _module(method)
    given = _operands(module, q_BQNH, k_BKMH, v_BKMV, queries, keys)
    # The gradient of a score is its weight times (that of the weight - delta); logsumexp's by a score is
    # the weight itself.
    delta_BNQ = jnp.einsum("bqnv,bqnv->bnq", dout_BQNV.astype(jnp.float32), out_BQNV)
    if dlse_BNQ is not None:
        delta_BNQ = delta_BNQ - dlse_BNQ
    base2_BNQ = jnp.where(lse_BNQ == -jnp.inf, UNSEEING, lse_BNQ * LOG2_E)
    statistics_BN2Q = _padded(jnp.stack([base2_BNQ, delta_BNQ], axis=2), 3, module.QUERIES)
    dout = _padded(_padded(dout_BQNV.astype(given.q.dtype), 1, module.QUERIES), 3, module.WIDTH)
    operands = (*given[:3], dout, statistics_BN2Q, given.queries, given.keys)
    dq_like, dk_like, dv_like = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given[:3])
    of_queries = functools.partial(module.gradient_of_queries, scale=scale)
    of_keys = functools.partial(module.gradient_of_keys, scale=scale)
    (dq,) = _call(of_queries, method, (dq_like,), *operands)
    dk, dv = _call(of_keys, method, (dk_like, dv_like), *operands)
    pairs = zip((dq, dk, dv), (q_BQNH, k_BKMH, v_BKMV), strict=True)
    return tuple(gradient[:, : a.shape[1], :, : a.shape[-1]] for gradient, a in pairs)


def _module(method: FusedAttention) -> Any:
    return importlib.import_module(MODULES[method.kernels])


def _operands(
    module: Any, q: jax.Array, k: jax.Array, v: jax.Array, queries: Ids, keys: Ids
) -> Operands:
    k, v = (a.astype(q.dtype) for a in (k, v))
    lengths = (module.QUERIES, module.KEYS, module.KEYS)
    q, k, v = (
        _padded(_padded(a, 1, n), 3, module.WIDTH) for a, n in zip((q, k, v), lengths, strict=True)
    )
    of_queries = packed(queries, module.QUERIES, BEFORE_ALL)
    return Operands(q, k, v, of_queries, packed(keys, module.KEYS, AFTER_ALL))


def _padded(a: jax.Array, axis: int, unit: int) -> jax.Array:
    """With zeros up to a multiple of a unit."""
    more = -a.shape[axis] % unit
    return jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)]) if more else a


def _call(
    kernel: Any, method: FusedAttention, like: tuple[jax.ShapeDtypeStruct, ...], *args: jax.Array
) -> tuple[jax.Array, ...]:
    """A kernel's results, which vary over the mesh axes that any of its arguments varies over: inside
    `per_device` a kernel must be told."""
    axes: frozenset[str] = frozenset().union(*(_axes(a) for a in args))
    args = tuple(_varying(a, axes) for a in args)
    kind = jax.typeof(args[0]).manual_axis_type
    like = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=kind) for a in like)
    return tuple(_varying(a, axes) for a in kernel(*args, like=like, interpret=method.interpret))


def _axes(a: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(a).manual_axis_type.varying)


def _varying(a: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(a)))
    return lax.pcast(a, missing, to="varying") if missing else a
