"""The choice of a token from logits. Shape letters: model/layers.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are chosen. Order: temperature, then top-k, then top-p of what is left, as in transformers."""

    temperature: float = 0.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # of the likeliest tokens alone; 0: all
    top_p: float = 1.0  # of the smallest set of likeliest tokens with at least this probability together (arXiv:1904.09751); 1: all
    seed: int = 0


def allowed(logits_BV: jax.Array, temperature: jax.Array, top_k: int, top_p: jax.Array | None) -> jax.Array:
    """float32 logits to sample from: -inf where a token cannot be chosen. Tokens as likely as the last of a set are all in it."""
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature  # the maximum first: a tiny temperature must not overflow
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if top_p is None:
        return logits_BV
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    # The largest threshold above which there is enough, by bisection over the bits of float32: a sort of a vocabulary takes far longer.
    bits = lambda n_B1: jax.lax.bitcast_convert_type(n_B1, jnp.float32)

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 + high_B1) // 2
        enough = jnp.sum(jnp.where(p_BV >= bits(middle_B1), p_BV, 0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle_B1, low_B1), jnp.where(enough, high_B1, middle_B1)

    low = jnp.zeros_like(p_BV[:, :1], jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, one)))
    return jnp.where(p_BV >= bits(low), logits_BV, -jnp.inf)


def choose(logits_BV: jax.Array, index_B: jax.Array, position_B: jax.Array, seed: jax.Array, temperature: jax.Array, top_k: int,
           top_p: jax.Array | None) -> jax.Array:
    """int32 [B]: sampled tokens. A row's draw depends on the seed, its prompt's index and the position of the token alone."""
    logits_BV = allowed(logits_BV, temperature, top_k, top_p)
    key_of = lambda index, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)
    draw = lambda logits_V, index, position: jax.random.categorical(key_of(index, position), logits_V)
    return jax.vmap(draw)(logits_BV, index_B, position_B).astype(jnp.int32)
