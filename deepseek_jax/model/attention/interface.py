"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) and grouped-query attention (Ainslie et al. 2023,
arXiv:2305.13245). Shape letters: layers.py.

In MLA keys and values come from one compressed vector of `kv_lora_rank` numbers a token, plus one rotated key shared by all
heads (decoupled RoPE). Training expands them; causal attention runs in blocks (blockwise.py), so that memory is linear in the
sequence length.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.attention import blockwise, cudnn
from deepseek_jax.model.layers import (
    ATTENTION_NORM_EPS,
    Linear,
    RMSNorm,
    join_heads,
    split_heads,
    split_width,
)
from deepseek_jax.model.rope import apply_rope, softmax_scale
from deepseek_jax.parallel.mesh import on_cpu, per_device

QUERY_BLOCK = 128  # queries of a block on CPUs; shorter for short sequences, whose diagonal blocks are most of the work
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
      q_BSNH, k_BSNH: queries and keys, divided over the mesh in B and N alone; v_BSNV: values, of any width. Keys and values may have
        fewer heads: query head n meets head n // (query heads / their heads).
      segment_ids_BS: int; a position sees earlier positions with its own id only.
      scale: multiplies the scores.
      method: `config.train.attention`: auto or blocks (blockwise.py); cudnn, on NVIDIA GPUs, where all sequences of a device are one
        segment each, else blocks: the program holds both. Where cuDNN cannot (cudnn.py), blocks alone, after
        one printed line.

    Returns:
      [B, S, N, V] in the values' dtype. Under `jax.checkpoint` what backward needs of it has the name "attention".
    """
    return _attention(q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, scale, method)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segments, scale, method):
    return _forward(q, k, v, segments, scale, method)[0]


def _forward(q, k, v, segments, scale, method):
    def run(q, k, v, segments):
        blocks = functools.partial(blockwise.forward, scale=scale, sizes=_sizes(q.shape[1]))
        if method != "cudnn" or not cudnn.usable(q.shape[-1], v.shape[-1]):
            return blocks(q, k, v, segments)
        return jax.lax.cond(
            _one_segment_each(segments),
            lambda *a: cudnn.forward(*a[:3], scale),
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
        blocks = functools.partial(blockwise.backward, scale=scale, sizes=_sizes(q.shape[1]))
        if method != "cudnn" or not cudnn.usable(q.shape[-1], v.shape[-1]):
            return blocks(q, k, v, segments, out, lse, dout)
        fused = lambda q, k, v, segments, *a: cudnn.backward(q, k, v, *a, scale)
        return jax.lax.cond(
            _one_segment_each(segments), fused, blocks, q, k, v, segments, out, lse, dout
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


class MultiHeadLatentAttention(nnx.Module):
    """MLA with Hugging Face names; `q_lora_rank=None` projects queries directly, as V2-Lite and Moonlight do."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, method: str = "auto"):
        m, heads = model, model.num_attention_heads
        self.model, self.method = m, method
        q_width = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        if m.q_lora_rank is None:
            self.q_proj = Linear(m, m.hidden_size, q_width, ("embed", "heads"), rngs)
        else:
            self.q_a_proj = Linear(m, m.hidden_size, m.q_lora_rank, ("embed", "lora"), rngs)
            self.q_a_layernorm = RMSNorm(m.q_lora_rank, ATTENTION_NORM_EPS, rngs)
            self.q_b_proj = Linear(m, m.q_lora_rank, q_width, ("lora", "lora_heads"), rngs)
        self.kv_a_proj_with_mqa = Linear(
            m, m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim, ("embed", "lora"), rngs
        )
        self.kv_a_layernorm = RMSNorm(m.kv_lora_rank, ATTENTION_NORM_EPS, rngs)
        self.kv_b_proj = Linear(
            m,
            m.kv_lora_rank,
            heads * (m.qk_nope_head_dim + m.v_head_dim),
            ("lora", "lora_heads"),
            rngs,
        )
        self.o_proj = Linear(m, heads * m.v_head_dim, m.hidden_size, ("heads", "embed"), rngs)

    @jax.named_scope("attention")
    def __call__(
        self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids_BS: jax.Array
    ) -> jax.Array:
        return self.expanded(self.queries(x_BSD, rope), self.latents(x_BSD, rope), segment_ids_BS)

    def queries(
        self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Queries without and with position: [B, S, N, nope] and, rotated, [B, S, N, rope]."""
        m = self.model
        if m.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(
                self.q_a_layernorm(checkpoint_name(self.q_a_proj(x_BSD), "mla_latent"))
            )
        q_nope, q_rope = split_width(split_heads(q, m.num_attention_heads), m.qk_nope_head_dim)
        return q_nope, apply_rope(q_rope, *rope, m.rope_interleave)

    def latents(
        self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """What keys and values are made of: the normed latent [B, S, R] and the rotated key of all heads [B, S, rope]."""
        compressed = checkpoint_name(self.kv_a_proj_with_mqa(x_BSD), "mla_latent")
        latent_BSR, k_rope = split_width(compressed, self.model.kv_lora_rank)
        k_rope = apply_rope(k_rope[:, :, None], *rope, self.model.rope_interleave)
        return self.kv_a_layernorm(latent_BSR), k_rope[:, :, 0]

    def expanded(
        self,
        queries: tuple[jax.Array, jax.Array],
        latents: tuple[jax.Array, jax.Array],
        segment_ids_BS: jax.Array,
    ) -> jax.Array:
        """Causal attention over keys and values of every head: [B, S, D]."""
        m, (q_nope, q_rope), (latent_BSR, k_rope) = self.model, queries, latents
        heads, nope = q_nope.shape[2:]
        q_BSNH = jnp.concatenate([q_nope, q_rope], axis=-1)
        kv = split_heads(self.kv_b_proj(latent_BSR), heads)
        k_nope, v_BSNV = split_width(kv, nope)
        k_rope = jax.sharding.reshard(
            jnp.broadcast_to(k_rope[:, :, None], q_rope.shape), jax.typeof(q_rope).sharding.spec
        )
        k_BSNH = jnp.concatenate([k_nope, k_rope], axis=-1)

        out = causal_attention(
            q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, softmax_scale(m), self.method
        )
        return self.o_proj(join_heads(out))


class GroupedQueryAttention(nnx.Module):
    """Attention as in Llama, Qwen, GLM and Mixtral: `num_key_value_heads` heads of keys and values, each for a group of query heads."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, method: str = "auto"):
        m, width = model, model.qk_head_dim
        self.model, self.method = m, method
        bias = "heads_bias" if m.attention_bias else None
        self.q_proj = Linear(
            m, m.hidden_size, m.num_attention_heads * width, ("embed", "heads"), rngs, bias
        )
        self.k_proj = Linear(
            m, m.hidden_size, m.num_key_value_heads * width, ("embed", "heads"), rngs, bias
        )
        self.v_proj = Linear(
            m, m.hidden_size, m.num_key_value_heads * width, ("embed", "heads"), rngs, bias
        )
        if m.use_qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(width, m.rms_norm_eps, rngs),
                RMSNorm(width, m.rms_norm_eps, rngs),
            )
        out_bias = "embed_bias" if m.attention_out_bias else None
        self.o_proj = Linear(
            m, m.num_attention_heads * width, m.hidden_size, ("heads", "embed"), rngs, out_bias
        )

    @jax.named_scope("attention")
    def __call__(
        self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids_BS: jax.Array
    ) -> jax.Array:
        return self.attended(self.projected(x_BSD, rope), segment_ids_BS)

    def projected(
        self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, N, H], keys and values [B, S, M, H]; queries and keys are rotated."""
        m = self.model
        q_BSNH = split_heads(self.q_proj(x_BSD), m.num_attention_heads)
        k_BSMH, v_BSMH = (
            split_heads(p(x_BSD), m.num_key_value_heads) for p in (self.k_proj, self.v_proj)
        )
        if m.use_qk_norm:
            q_BSNH, k_BSMH = self.q_norm(q_BSNH), self.k_norm(k_BSMH)
        q_BSNH, k_BSMH = (_rotated(a, rope, m.rotary_dim) for a in (q_BSNH, k_BSMH))
        return q_BSNH, k_BSMH, v_BSMH

    def attended(
        self, projected: tuple[jax.Array, jax.Array, jax.Array], segment_ids_BS: jax.Array
    ) -> jax.Array:
        """Causal attention: [B, S, D]."""
        out = causal_attention(*projected, segment_ids_BS, softmax_scale(self.model), self.method)
        return self.o_proj(join_heads(out))


def _rotated(x_BSNH: jax.Array, rope: tuple[jax.Array, jax.Array], width: int) -> jax.Array:
    """The first `width` numbers of every head rotated, in halves as these families do."""
    if width == x_BSNH.shape[-1]:
        return apply_rope(x_BSNH, *rope, interleave=False)
    rotated, rest = split_width(x_BSNH, width)
    return jnp.concatenate([apply_rope(rotated, *rope, interleave=False), rest], axis=-1)


def make_attention(model: ModelConfig, rngs: nnx.Rngs, method: str) -> nnx.Module:
    """The attention that a model's options ask for."""
    return (
        MultiHeadLatentAttention if model.num_key_value_heads is None else GroupedQueryAttention
    )(model, rngs, method)
