"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). Shape letters: layers.py.

Keys and values come from one compressed vector of `kv_lora_rank` numbers a token, plus one rotated key shared by all
heads (decoupled RoPE). Training expands them; causal attention runs in blocks of queries, each against the keys up to its
end only, recomputed in the backward pass, so that memory is linear in the sequence length.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import Model
from deepseek_jax.model.layers import ATTENTION_NORM_EPS, Linear, RMSNorm
from deepseek_jax.model.rope import apply_rope, softmax_scale

QUERY_BLOCK = 512  # rows of one block; at or below this length attention is one block


def _block_attention(q_BQNH: jax.Array, k_BKNH: jax.Array, v_BKNV: jax.Array, seg_BQ: jax.Array, seg_BK: jax.Array, scale: float) -> jax.Array:
    """Softmax attention of the last Q of K positions to all before them within their own segment; softmax in float32."""
    q_len, k_len = q_BQNH.shape[1], k_BKNH.shape[1]
    score_BNQK = jnp.einsum("bqnh,bknh->bnqk", q_BQNH, k_BKNH, preferred_element_type=jnp.float32) * scale
    causal_QK = jnp.arange(k_len)[None, :] <= jnp.arange(k_len - q_len, k_len)[:, None]
    mask_BQK = causal_QK & (seg_BQ[:, :, None] == seg_BK[:, None, :])
    weight_BNQK = jax.nn.softmax(jnp.where(mask_BQK[:, None], score_BNQK, -1e30), axis=-1)
    return jnp.einsum("bnqk,bknv->bqnv", weight_BNQK.astype(v_BKNV.dtype), v_BKNV)


def causal_attention(q_BSNH: jax.Array, k_BSNH: jax.Array, v_BSNV: jax.Array, segment_ids_BS: jax.Array, scale: float) -> jax.Array:
    """Causal softmax attention within segments.

    Args:
      q_BSNH, k_BSNH: queries and keys; v_BSNV: values, of any width.
      segment_ids_BS: int; a position sees earlier positions with its own id only.
      scale: multiplies the scores.

    Returns:
      [B, S, N, V] in the values' dtype.
    """
    length = q_BSNH.shape[1]
    block = functools.partial(_block_attention, scale=scale)
    if length <= QUERY_BLOCK:
        return block(q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, segment_ids_BS)
    outs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        outs.append(jax.checkpoint(block)(q_BSNH[:, start:end], k_BSNH[:, :end], v_BSNV[:, :end], segment_ids_BS[:, start:end],
                                          segment_ids_BS[:, :end]))
    return jnp.concatenate(outs, axis=1)


class MultiHeadLatentAttention(nnx.Module):
    """MLA with Hugging Face names; `q_lora_rank=None` projects queries directly, as V2-Lite and Moonlight do."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        m, heads = model, model.num_attention_heads
        self.model = m
        q_width = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        if m.q_lora_rank is None:
            self.q_proj = Linear(m, m.hidden_size, q_width, ("embed", "heads"), rngs)
        else:
            self.q_a_proj = Linear(m, m.hidden_size, m.q_lora_rank, ("embed", "lora"), rngs)
            self.q_a_layernorm = RMSNorm(m.q_lora_rank, ATTENTION_NORM_EPS, rngs)
            self.q_b_proj = Linear(m, m.q_lora_rank, q_width, ("lora", "lora_heads"), rngs)
        self.kv_a_proj_with_mqa = Linear(m, m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim, ("embed", "lora"), rngs)
        self.kv_a_layernorm = RMSNorm(m.kv_lora_rank, ATTENTION_NORM_EPS, rngs)
        self.kv_b_proj = Linear(m, m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim), ("lora", "lora_heads"), rngs)
        self.o_proj = Linear(m, heads * m.v_head_dim, m.hidden_size, ("heads", "embed"), rngs)

    @jax.named_scope("attention")
    def __call__(self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids_BS: jax.Array) -> jax.Array:
        m, (b, s, _) = self.model, x_BSD.shape
        heads, nope = m.num_attention_heads, m.qk_nope_head_dim
        if m.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(checkpoint_name(self.q_a_proj(x_BSD), "mla_latent")))
        q_nope, q_rope = jnp.split(q.reshape(b, s, heads, -1), [nope], axis=-1)
        q_BSNH = jnp.concatenate([q_nope, apply_rope(q_rope, *rope, m.rope_interleave)], axis=-1)

        compressed = checkpoint_name(self.kv_a_proj_with_mqa(x_BSD), "mla_latent")
        latent_BSR, k_rope = jnp.split(compressed, [m.kv_lora_rank], axis=-1)
        k_rope = apply_rope(k_rope[:, :, None], *rope, m.rope_interleave)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_BSR)).reshape(b, s, heads, -1)
        k_nope, v_BSNV = jnp.split(kv, [nope], axis=-1)
        k_rope = jax.sharding.reshard(jnp.broadcast_to(k_rope, q_rope.shape), jax.typeof(q_rope).sharding.spec)
        k_BSNH = jnp.concatenate([k_nope, k_rope], axis=-1)

        out = causal_attention(q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, softmax_scale(m))
        return self.o_proj(checkpoint_name(out.reshape(b, s, -1), "attention"))
