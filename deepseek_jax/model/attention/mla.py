"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). Shape letters: layers.py.

Keys and values come from one compressed vector of `kv_lora_rank` numbers per token, the latent,
plus one rotated key shared by all heads (decoupled RoPE). Training expands them to keys and values
of every head.

Decoding absorbs the expansion (section 2.1.2): with W_UK and W_UV, the halves of `kv_b_proj`, a
head's score is q W_UK^T . latent and its output (sum of weights x latents) W_UV. Keys and values
are never made, and the cache holds the latent and the shared key, of width W = kv_lora_rank +
qk_rope_head_dim.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.attention import kv_cache
from deepseek_jax.model.attention.causal import causal_attention
from deepseek_jax.model.attention.interface import CacheShape, LayerCache, Rope
from deepseek_jax.model.layers import (
    Linear,
    RMSNorm,
    join_heads,
    merged_kernel,
    split_heads,
    split_width,
)
from deepseek_jax.model.rope import apply_rope, yarn_temperature
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device

NORM_EPS = 1e-6  # no released implementation lets the norms inside MLA follow rms_norm_eps


class Projected(NamedTuple):
    """Queries and latents of tokens."""

    q_nope: jax.Array  # [B, S, N, nope]: without position
    q_rope: jax.Array  # [B, S, N, rope]: rotated
    latent: jax.Array  # [B, S, R]: normed
    k_rope: jax.Array  # [B, S, rope]: the rotated key of all heads


class MultiHeadLatentAttention(nnx.Module):
    """MLA with Hugging Face names.

    `q_lora_rank=None` projects queries directly, as V2-Lite and Moonlight do.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, method: str = "auto"):
        m = config
        self.config = config
        self.method = method
        heads = m.num_attention_heads
        q_width = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        if m.q_lora_rank is None:
            self.q_proj = Linear(m, m.hidden_size, q_width, ("embed", "heads"), rngs)
        else:
            self.q_a_proj = Linear(m, m.hidden_size, m.q_lora_rank, ("embed", "lora"), rngs)
            self.q_a_layernorm = RMSNorm(m.q_lora_rank, NORM_EPS, rngs)
            self.q_b_proj = Linear(m, m.q_lora_rank, q_width, ("lora", "lora_heads"), rngs)
        self.kv_a_proj_with_mqa = Linear(
            m, m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim, ("embed", "lora"), rngs
        )
        self.kv_a_layernorm = RMSNorm(m.kv_lora_rank, NORM_EPS, rngs)
        kv_width = heads * (m.qk_nope_head_dim + m.v_head_dim)
        self.kv_b_proj = Linear(m, m.kv_lora_rank, kv_width, ("lora", "lora_heads"), rngs)
        self.o_proj = Linear(m, heads * m.v_head_dim, m.hidden_size, ("heads", "embed"), rngs)

    @staticmethod
    def softmax_scale(config: ModelConfig) -> float:
        """1/sqrt(query width), times m(mscale_all_dim)^2 under YaRN, as DeepSeek-V2 and V3 do."""
        scale = config.qk_head_dim**-0.5
        rope = config.rope_scaling
        if rope.type == "yarn" and rope.mscale_all_dim:
            scale *= yarn_temperature(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[CacheShape, ...]:
        return (CacheShape(None, config.kv_lora_rank + config.qk_rope_head_dim),)

    def __call__(self, x_BSD: jax.Array, rope: Rope, segment_ids_BS: jax.Array) -> jax.Array:
        return self.attend(self.project(x_BSD, rope), segment_ids_BS)

    @jax.named_scope("attention")
    def project(self, x_BSD: jax.Array, rope: Rope) -> Projected:
        return Projected(*self._queries(x_BSD, rope), *self._latents(x_BSD, rope))

    def _queries(self, x_BSD: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
        m = self.config
        if m.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            compressed = checkpoint_name(self.q_a_proj(x_BSD), "mla_latent")
            q = self.q_b_proj(self.q_a_layernorm(compressed))
        q_nope, q_rope = split_width(split_heads(q, m.num_attention_heads), m.qk_nope_head_dim)
        return q_nope, apply_rope(q_rope, *rope, m.rope_interleave)

    def _latents(self, x_BSD: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
        m = self.config
        compressed = checkpoint_name(self.kv_a_proj_with_mqa(x_BSD), "mla_latent")
        latent_BSR, k_rope = split_width(compressed, m.kv_lora_rank)
        k_rope = apply_rope(k_rope[:, :, None], *rope, m.rope_interleave)
        return self.kv_a_layernorm(latent_BSR), k_rope[:, :, 0]

    @jax.named_scope("attention")
    def attend(self, projected: Projected, segment_ids_BS: jax.Array) -> jax.Array:
        m = self.config
        q_rope = projected.q_rope
        q_BSNH = jnp.concatenate([projected.q_nope, q_rope], axis=-1)
        kv = split_heads(self.kv_b_proj(projected.latent), m.num_attention_heads)
        k_nope, v_BSNV = split_width(kv, m.qk_nope_head_dim)
        k_rope = jax.sharding.reshard(
            jnp.broadcast_to(projected.k_rope[:, :, None], q_rope.shape),
            jax.typeof(q_rope).sharding.spec,
        )
        k_BSNH = jnp.concatenate([k_nope, k_rope], axis=-1)
        out_BSNV = causal_attention(
            q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, self.softmax_scale(m), self.method
        )
        return self.o_proj(join_heads(out_BSNV))

    def cache_entries(self, projected: Projected) -> tuple[jax.Array, ...]:
        return (jnp.concatenate([projected.latent, projected.k_rope], axis=-1),)

    def decoding_weights(self, mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
        """W_UK [N, nope, R] and W_UV [N, R, V].

        Heads are divided over tensor, the latent over the batch axes where they divide it.
        """
        ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
        latent = BATCH_AXES if self.config.kv_lora_rank % ways == 0 else None
        return _split_expansion(merged_kernel(self.kv_b_proj), self.config, latent)

    @jax.named_scope("attention")
    def decode(
        self,
        projected: Projected,
        cache: LayerCache,
        weights: tuple[jax.Array, ...],
        start_B: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        m = self.config
        scale = self.softmax_scale(m)

        def one_device(q_nope, q_rope, new_BSW, latents_BZW, w_uk, w_uv, start_B):
            latents_BZW = kv_cache.write(latents_BZW, new_BSW, start_B)
            q_BSNR = jnp.einsum("bsnh,nhr->bsnr", q_nope, w_uk)
            q_BSNW = jnp.concatenate([q_BSNR, q_rope], axis=-1)
            b, s, n, w = q_BSNW.shape
            score_BQZ = kv_cache.scores(latents_BZW, q_BSNW.reshape(b, s * n, w)) * scale
            p_BSNZ = kv_cache.softmax(score_BQZ.reshape(b, s, n, -1), start_B).astype(new_BSW.dtype)
            # With the rotated key, which is not needed: a slice of the cache would be a copy of it.
            mixed_BQW = jnp.matmul(p_BSNZ.reshape(b, s * n, -1), latents_BZW)
            mixed_BSNR = mixed_BQW.reshape(b, s, n, w)[..., : m.kv_lora_rank]
            out_BSNV = jnp.einsum("bsnr,nrv->bsnv", mixed_BSNR, w_uv)
            return out_BSNV.reshape(b, s, -1), latents_BZW

        (new_BSW,) = self.cache_entries(projected)
        weights = tuple(
            jax.sharding.reshard(w.astype(new_BSW.dtype), P("tensor", None, None)) for w in weights
        )
        (cache_spec,) = (shape.spec for shape in self.cache_shapes(m))
        heads, sequences = P(BATCH_AXES, None, "tensor", None), P(BATCH_AXES)
        call = per_device(
            one_device,
            (heads, heads, sequences, cache_spec, P("tensor"), P("tensor"), sequences),
            (P(BATCH_AXES, None, "tensor"), cache_spec),
        )
        out, latents = call(projected.q_nope, projected.q_rope, new_BSW, *cache, *weights, start_B)
        return self.o_proj(out), (latents,)


@functools.partial(jax.jit, static_argnames=("config", "latent"))
def _split_expansion(
    kernel_RO: jax.Array, config: ModelConfig, latent: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array]:
    """W_UK and W_UV of `kv_b_proj`, each laid out as decoding multiplies by it.

    Args:
      kernel_RO: the weight of `kv_b_proj`.
      config: the model's options.
      latent: the mesh axes of R.
    """
    kernel_RO = jax.sharding.reshard(kernel_RO, P(None, "tensor"))
    w_RNO = split_heads(kernel_RO, config.num_attention_heads)
    w_uk = w_RNO[:, :, : config.qk_nope_head_dim].transpose(1, 2, 0)
    w_uv = w_RNO[:, :, config.qk_nope_head_dim :].transpose(1, 0, 2)
    return (
        jax.sharding.reshard(w_uk, P("tensor", None, latent)),
        jax.sharding.reshard(w_uv, P("tensor", latent, None)),
    )
