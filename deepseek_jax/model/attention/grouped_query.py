"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), as in Llama, Qwen, GLM and Mixtral.

Shape letters: layers.py; M heads of keys and values, each for a group of N / M neighbouring query heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.attention import kv_cache
from deepseek_jax.model.attention.causal import causal_attention
from deepseek_jax.model.attention.interface import CacheShape, LayerCache, Rope
from deepseek_jax.model.layers import Linear, RMSNorm, join_heads, split_heads, split_width
from deepseek_jax.model.rope import apply_rope
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device


class Projected(NamedTuple):
    """Queries and keys, rotated, and values of tokens."""

    q_BSNH: jax.Array
    k_BSMH: jax.Array
    v_BSMH: jax.Array


class GroupedQueryAttention(nnx.Module):
    """`num_key_value_heads` heads of keys and values; the cache holds both."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, method: str = "auto"):
        m = config
        self.config = config
        self.method = method
        width = m.qk_head_dim
        q_width = m.num_attention_heads * width
        kv_width = m.attention_shape.key_value_heads * width
        bias = "heads_bias" if m.attention_bias else None
        out_bias = "embed_bias" if m.attention_out_bias else None
        self.q_proj = Linear(m, m.hidden_size, q_width, ("embed", "heads"), rngs, bias)
        self.k_proj = Linear(m, m.hidden_size, kv_width, ("embed", "heads"), rngs, bias)
        self.v_proj = Linear(m, m.hidden_size, kv_width, ("embed", "heads"), rngs, bias)
        if m.use_qk_norm:
            self.q_norm = RMSNorm(width, m.rms_norm_eps, rngs)
            self.k_norm = RMSNorm(width, m.rms_norm_eps, rngs)
        self.o_proj = Linear(m, q_width, m.hidden_size, ("heads", "embed"), rngs, out_bias)

    @staticmethod
    def softmax_scale(config: ModelConfig) -> float:
        return config.qk_head_dim**-0.5

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[CacheShape, ...]:
        return (CacheShape(config.attention_shape.key_value_heads, config.qk_head_dim),) * 2

    def __call__(self, x_BSD: jax.Array, rope: Rope, segment_ids_BS: jax.Array) -> jax.Array:
        return self.attend(self.project(x_BSD, rope), segment_ids_BS)

    @jax.named_scope("attention")
    def project(self, x_BSD: jax.Array, rope: Rope) -> Projected:
        m = self.config
        q_BSNH = split_heads(self.q_proj(x_BSD), m.num_attention_heads)
        kv_heads = m.attention_shape.key_value_heads
        k_BSMH = split_heads(self.k_proj(x_BSD), kv_heads)
        v_BSMH = split_heads(self.v_proj(x_BSD), kv_heads)
        if m.use_qk_norm:
            q_BSNH = self.q_norm(q_BSNH)
            k_BSMH = self.k_norm(k_BSMH)
        q_BSNH = _rotated(q_BSNH, rope, m.rotary_dim)
        k_BSMH = _rotated(k_BSMH, rope, m.rotary_dim)
        return Projected(q_BSNH, k_BSMH, v_BSMH)

    @jax.named_scope("attention")
    def attend(self, projected: Projected, segment_ids_BS: jax.Array) -> jax.Array:
        scale = self.softmax_scale(self.config)
        out_BSNH = causal_attention(*projected, segment_ids_BS, scale, self.method)
        return self.o_proj(join_heads(out_BSNH))

    def cache_entries(self, projected: Projected) -> tuple[jax.Array, ...]:
        return projected.k_BSMH.swapaxes(1, 2), projected.v_BSMH.swapaxes(1, 2)

    def decoding_weights(self, mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
        del mesh
        return ()

    @jax.named_scope("attention")
    def decode(
        self,
        projected: Projected,
        cache: LayerCache,
        weights: tuple[jax.Array, ...],
        start_B: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        del weights
        m = self.config
        scale = self.softmax_scale(m)

        def one_device(q_BSNH, k_BSMH, v_BSMH, keys_BMZH, values_BMZH, start_B):
            keys_BMZH = kv_cache.write(keys_BMZH, k_BSMH.swapaxes(1, 2), start_B)
            values_BMZH = kv_cache.write(values_BMZH, v_BSMH.swapaxes(1, 2), start_B)
            b, s, n, h = q_BSNH.shape
            kv_heads = keys_BMZH.shape[1]
            group = n // kv_heads
            # One product per head of keys: the queries of its group, of all tokens, are its rows.
            q_BMQH = (
                q_BSNH.reshape(b, s, kv_heads, group, h)
                .transpose(0, 2, 1, 3, 4)
                .reshape(b, kv_heads, -1, h)
            )
            score_BMQZ = kv_cache.scores(keys_BMZH, q_BMQH) * scale
            score_BSNZ = (
                score_BMQZ.reshape(b, kv_heads, s, group, -1)
                .transpose(0, 2, 1, 3, 4)
                .reshape(b, s, n, -1)
            )
            p_BSNZ = kv_cache.softmax(score_BSNZ, start_B).astype(values_BMZH.dtype)
            p_BMQZ = (
                p_BSNZ.reshape(b, s, kv_heads, group, -1)
                .transpose(0, 2, 1, 3, 4)
                .reshape(b, kv_heads, s * group, -1)
            )
            out_BMSO = jnp.matmul(p_BMQZ, values_BMZH).reshape(b, kv_heads, s, -1)
            return out_BMSO.swapaxes(1, 2).reshape(b, s, -1), keys_BMZH, values_BMZH

        cache_specs = tuple(shape.spec for shape in self.cache_shapes(m))
        heads = P(BATCH_AXES, None, "tensor", None)
        call = per_device(
            one_device,
            (heads, heads, heads, *cache_specs, P(BATCH_AXES)),
            (P(BATCH_AXES, None, "tensor"), *cache_specs),
        )
        out, keys, values = call(*projected, *cache, start_B)
        return self.o_proj(out), (keys, values)


def _rotated(x_BSNH: jax.Array, rope: Rope, width: int) -> jax.Array:
    """The first `width` numbers of every head rotated, in halves as these families do."""
    if width == x_BSNH.shape[-1]:
        return apply_rope(x_BSNH, *rope, interleave=False)
    rotated, rest = split_width(x_BSNH, width)
    return jnp.concatenate([apply_rope(rotated, *rope, interleave=False), rest], axis=-1)
