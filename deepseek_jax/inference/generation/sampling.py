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


class Drawing(NamedTuple):
    """`Sampling` as a program takes it."""

    seed: jax.Array  # uint32
    temperature: jax.Array
    top_p: jax.Array | None  # None: all
    index_B: jax.Array  # int32: numbers of the rows' prompts


def drawing(options: Sampling, index_B: jax.Array) -> Drawing:
    """For rows with these prompts."""
    top_p = None if options.top_p >= 1 else jnp.float32(options.top_p)
    return Drawing(jnp.uint32(options.seed), jnp.float32(options.temperature), top_p, index_B)


def allowed(
    logits: jax.Array, temperature: jax.Array | float, top_k: int, top_p: jax.Array | float | None
) -> jax.Array:
    """float32 logits [..., V] to sample from: -inf where a token cannot be chosen. Tokens as likely as the last of a set are all in it."""
    logits = (
        logits - jnp.max(logits, axis=-1, keepdims=True)
    ) / temperature  # the maximum first: a tiny temperature must not overflow
    if 0 < top_k < logits.shape[-1]:
        least = jnp.min(jax.lax.top_k(logits, top_k)[0], axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is None:
        return logits
    p = jax.nn.softmax(logits, axis=-1)
    # The largest threshold above which there is enough, by bisection over the bits of float32: to sort a vocabulary takes far longer.
    bits = lambda n: jax.lax.bitcast_convert_type(n, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = jnp.sum(jnp.where(p >= bits(middle), p, 0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # A reduction, as `enough` is: from jax 0.11 on a slice of one number has no layout.
    low = jnp.zeros_like(jnp.max(p, axis=-1, keepdims=True), jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, above_one)))
    return jnp.where(p >= bits(low), logits, -jnp.inf)


def choose(
    logits_BSV: jax.Array, position_BS: jax.Array, drawing: Drawing, top_k: int, greedy: bool
) -> jax.Array:
    """int32 [B, S]: tokens. A draw depends on the seed, the number of the row's prompt and the position of the token alone."""
    if greedy:
        return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
    logits_BSV = allowed(logits_BSV, drawing.temperature, top_k, drawing.top_p)

    def draw(logits_V, index, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(drawing.seed), index), position)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.vmap(jax.vmap(draw, in_axes=(0, None, 0)))(logits_BSV, drawing.index_B, position_BS)
