"""Attention with a cache. Shape letters: model/layers.py, cache.py.

MLA is absorbed (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): with W_UK and W_UV, the halves of `kv_b_proj`, a head's score is
q W_UK^T . latent and its output (sum of weights x latents) W_UV. Keys and values are never made; all heads read the same latents.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.inference.generation import cache
from deepseek_jax.model.attention.interface import GroupedQueryAttention, MultiHeadLatentAttention
from deepseek_jax.model.layers import split_heads
from deepseek_jax.model.rope import softmax_scale
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device

Absorbed = tuple[jax.Array, jax.Array]  # W_UK [N, nope, R] and W_UV [N, R, V]
HEADS, ROWS = P(BATCH_AXES, None, "tensor", None), P(BATCH_AXES)
NOWHERE = (
    -1e30
)  # score of a slot that is not seen; finite, so that a row that sees nothing has no NaN


def absorbed(kernel_RO: jax.Array, model: ModelConfig) -> Absorbed:
    """W_UK and W_UV of `kv_b_proj`, each laid out as decoding multiplies by it."""
    m = model
    w_RNO = split_heads(kernel_RO, m.num_attention_heads)
    return w_RNO[:, :, : m.qk_nope_head_dim].transpose(1, 2, 0), w_RNO[
        :, :, m.qk_nope_head_dim :
    ].transpose(1, 0, 2)


def prefill(slots: int, made: list[cache.Layer]) -> Callable[..., jax.Array]:
    """Attention of rows from their first token on, as in training; appends a cache of so many slots to `made`."""

    def attend(attn: nnx.Module, x_BSD, rope, segment_ids_BS):
        if isinstance(attn, MultiHeadLatentAttention):
            latents = attn.latents(x_BSD, rope)
            made.append((cache.fresh(jnp.concatenate(latents, axis=-1), slots),))
            return attn.expanded(attn.queries(x_BSD, rope), latents, segment_ids_BS)
        q, k, v = projected = attn.projected(x_BSD, rope)
        made.append(tuple(cache.fresh(a.swapaxes(1, 2), slots) for a in (k, v)))
        return attn.attended(projected, segment_ids_BS)

    return attend


def cached(
    layer: cache.Layer, weights: Absorbed | None, start_B: jax.Array, made: list[cache.Layer]
) -> Callable[..., jax.Array]:
    """Attention of S tokens a row, at positions start_B[b] and after, to themselves and what the cache has of positions before.

    Appends the cache with them in it to `made`.
    """

    def attend(attn: nnx.Module, x_BSD, rope, segment_ids_BS):
        del (
            segment_ids_BS
        )  # tokens of a row that do not count are never seen: nothing after them is kept
        if isinstance(attn, MultiHeadLatentAttention):
            out, *new = _latent(attn, x_BSD, rope, layer, weights, start_B)
        else:
            out, *new = _grouped(attn, x_BSD, rope, layer, start_B)
        made.append(tuple(new))
        return attn.o_proj(out)

    return attend


def _latent(attn: MultiHeadLatentAttention, x_BSD, rope, layer, weights, start_B):
    m, scale = attn.model, softmax_scale(attn.model)
    (spec,) = (s.spec for s in cache.shapes(m))

    def one_device(q_nope, q_rope, new, latents_BCK, w_uk, w_uv, start_B):
        latents_BCK = cache.write(latents_BCK, new, start_B)
        q_BSNR = jnp.einsum("bsnh,nhr->bsnr", q_nope, w_uk)
        q_BSNK = jnp.concatenate([q_BSNR, q_rope], axis=-1)
        b, s, n, k = q_BSNK.shape
        score_BQC = _products(latents_BCK, q_BSNK.reshape(b, s * n, k)) * scale
        p_BSNC = _softmax(score_BQC.reshape(b, s, n, -1), start_B).astype(new.dtype)
        # Of the whole cache: a slice of it would be a copy.
        mixed_BQK = jnp.matmul(p_BSNC.reshape(b, s * n, -1), latents_BCK)
        out = jnp.einsum(
            "bsnr,nrv->bsnv", mixed_BQK.reshape(b, s, n, k)[..., : m.kv_lora_rank], w_uv
        )
        return out.reshape(*out.shape[:2], -1), latents_BCK

    weights = tuple(
        jax.sharding.reshard(w.astype(x_BSD.dtype), P("tensor", None, None)) for w in weights
    )
    call = per_device(
        one_device,
        (HEADS, HEADS, ROWS, spec, P("tensor"), P("tensor"), ROWS),
        (P(BATCH_AXES, None, "tensor"), spec),
    )
    return call(
        *attn.queries(x_BSD, rope),
        jnp.concatenate(attn.latents(x_BSD, rope), axis=-1),
        *layer,
        *weights,
        start_B,
    )


def _grouped(attn: GroupedQueryAttention, x_BSD, rope, layer, start_B):
    scale = softmax_scale(attn.model)
    specs = tuple(s.spec for s in cache.shapes(attn.model))

    def one_device(q_BSNH, k_BSMH, v_BSMH, keys, values, start_B):
        keys, values = (
            cache.write(c, new.swapaxes(1, 2), start_B)
            for c, new in ((keys, k_BSMH), (values, v_BSMH))
        )
        (b, s, n, h), heads = q_BSNH.shape, keys.shape[1]
        # A head's queries, of all its group and all tokens, as the rows of one product.
        q_BMQH = (
            q_BSNH.reshape(b, s, heads, n // heads, h)
            .transpose(0, 2, 1, 3, 4)
            .reshape(b, heads, -1, h)
        )
        score = _products(keys, q_BMQH) * scale
        score = (
            score.reshape(b, heads, s, n // heads, -1).transpose(0, 2, 1, 3, 4).reshape(b, s, n, -1)
        )
        p = _softmax(score, start_B).astype(values.dtype)
        p = (
            p.reshape(b, s, heads, n // heads, -1)
            .transpose(0, 2, 1, 3, 4)
            .reshape(b, heads, s * (n // heads), -1)
        )
        out = jnp.matmul(p, values).reshape(b, heads, s, -1)
        return out.swapaxes(1, 2).reshape(b, s, -1), keys, values

    call = per_device(
        one_device, (HEADS, HEADS, HEADS, *specs, ROWS), (P(BATCH_AXES, None, "tensor"), *specs)
    )
    return call(*attn.projected(x_BSD, rope), *layer, start_B)


def _products(cached: jax.Array, queries: jax.Array) -> jax.Array:
    """float32 [..., Q, C]: of every query [..., Q, H] and cached key [..., C, H]. In this order XLA on CPUs reads the cache as it lies; in
    the other it transposes it first."""
    product = jnp.matmul(cached, queries.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    return product.swapaxes(-1, -2)


def _softmax(score_BSNC: jax.Array, start_B: jax.Array) -> jax.Array:
    """Over the slots that each token sees: up to its own."""
    s, c = score_BSNC.shape[1], score_BSNC.shape[3]
    seen_BSC = jnp.arange(c) <= start_B[:, None, None] + jnp.arange(s)[:, None]
    return jax.nn.softmax(jnp.where(seen_BSC[:, :, None], score_BSNC, NOWHERE), axis=-1)
