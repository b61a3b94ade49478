"""Causal softmax attention of whole sequences, as every kind of attention computes it.

It runs in blocks (blockwise.py), so that memory is linear in the sequence length, by fused kernels (fused.py;
implementations.py says which), or by cuDNN's (cudnn.py). Shape letters: layers.py.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.attention import blockwise, cudnn, fused, implementations
from deepseek_jax.parallel.mesh import on_cpu, per_device

QUERY_BLOCK = (
    128  # queries of a block on CPUs; half for short sequences, which are mostly diagonal blocks
)
CPU_SCORES = 2**19  # scores at once on CPUs: two MiB, which stay in a core's cache
GPU_SIZES = blockwise.Sizes(512, 2**28)


def causal_attention(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNV: jax.Array,
    segment_ids_BS: jax.Array,
    scale: float,
    method: str = "auto",
) -> jax.Array:
    """Causal softmax attention within segments; softmax in float32.

    Args:
      q_BSNH: queries, divided over the mesh in B and N alone.
      k_BSNH: keys. They and values may have fewer heads: query head n meets head
        n // (query heads / their heads).
      v_BSNV: values, of any width V.
      segment_ids_BS: int32; a position sees earlier positions with its own id only.
      scale: multiplies the scores.
      method: `config.train.attention`: blocks (blockwise.py), mosaic or triton (fused.py), auto, which takes
        what works here (implementations.py). cudnn: on NVIDIA GPUs where all sequences of a device are
        one segment each, else blocks, and the program holds both; where cuDNN cannot (cudnn.py), blocks
        alone, after one printed line.

    Returns:
      [B, S, N, V] in the values' dtype. Under `jax.checkpoint` what backward needs of it has the name
      "attention".
    """
    chex.assert_rank([q_BSNH, k_BSNH, v_BSNV], 4)
    chex.assert_equal_shape_prefix([q_BSNH, k_BSNH, v_BSNV, segment_ids_BS], 2)
    chex.assert_equal_shape_prefix([k_BSNH, v_BSNV], 3)
    chex.assert_type(segment_ids_BS, int)
    return _attention(q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, scale, method)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segments, scale, method):
    return _forward(q, k, v, segments, scale, method)[0]


def _forward(q, k, v, segments, scale, method):
    def run(q, k, v, segments):
        if kernels := implementations.kernels(method, q.dtype, q.shape[-1], v.shape[-1]):
            ids = fused.causal_ids(segments)
            return fused.forward(kernels, q, k, v, ids, ids, scale)
        blocks = functools.partial(blockwise.forward, scale=scale, sizes=_sizes(q.shape[1]))
        if method != "cudnn" or not cudnn.usable(q.shape[-1], v.shape[-1]):
            return blocks(q, k, v, segments)

        def by_cudnn(q, k, v, segments):
            del segments
            return cudnn.forward(q, k, v, scale)

        return jax.lax.cond(
            _one_segment_each(segments),
            by_cudnn,
            blocks,
            q,
            k,
            v,
            segments,
        )

    heads, rows = _specs(q)
    out, lse = _on_each_device(run, (heads, heads, heads, P(rows[0], None)), (heads, rows))(
        q, k, v, segments
    )
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, segments, out, lse)


def _backward(scale, method, kept, dout):
    def run(q, k, v, segments, out, lse, dout):
        if kernels := implementations.kernels(method, q.dtype, q.shape[-1], v.shape[-1]):
            ids = fused.causal_ids(segments)
            return fused.backward(kernels, q, k, v, ids, ids, out, lse, dout, scale)
        blocks = functools.partial(blockwise.backward, scale=scale, sizes=_sizes(q.shape[1]))
        if method != "cudnn" or not cudnn.usable(q.shape[-1], v.shape[-1]):
            return blocks(q, k, v, segments, out, lse, dout)

        def by_cudnn(q, k, v, segments, out, lse, dout):
            del segments
            return cudnn.backward(q, k, v, out, lse, dout, scale)

        return jax.lax.cond(
            _one_segment_each(segments), by_cudnn, blocks, q, k, v, segments, out, lse, dout
        )

    heads, rows = _specs(kept[0])
    grads = _on_each_device(
        run, (heads, heads, heads, P(rows[0], None), heads, rows, heads), (heads, heads, heads)
    )(*kept, dout)
    return (*grads, None)


_attention.defvjp(_forward, _backward)


def _one_segment_each(segment_ids_BS: jax.Array) -> jax.Array:
    return jnp.all(segment_ids_BS == segment_ids_BS[:, :1])


def _specs(q_BSNH: jax.Array) -> tuple[P, P]:
    """Of arrays [B, S, N, .] and of [B, N, S]."""
    sequences, _, heads, _ = jax.typeof(q_BSNH).sharding.spec
    return P(sequences, None, heads, None), P(sequences, heads, None)


def _on_each_device(f: Callable, in_specs: tuple[P, ...], out_specs: tuple[P, ...]) -> Callable:
    return f if jax.sharding.get_abstract_mesh().empty else per_device(f, in_specs, out_specs)


def _sizes(length: int) -> blockwise.Sizes:
    if not on_cpu():
        return GPU_SIZES
    return blockwise.Sizes(
        QUERY_BLOCK if length > 2 * QUERY_BLOCK else max(1, QUERY_BLOCK // 2), CPU_SCORES
    )
