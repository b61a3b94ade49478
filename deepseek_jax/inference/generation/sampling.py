"""The choice of a token from logits. Shape letters: model/layers.py."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are chosen: temperature, then top-k, then top-p of the rest, as in transformers."""

    temperature: float = 0.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    # draw from the smallest set with at least this probability (arXiv:1904.09751); 1: from all
    top_p: float = 1.0
    seed: int = 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "temperature", "top_p", "index_B"],
    meta_fields=["top_k", "greedy"],
)
@dataclasses.dataclass(frozen=True)
class Drawing:
    """`Sampling` as a program takes it. For each top_k and greedy it is compiled anew."""

    seed: jax.Array  # uint32
    temperature: jax.Array  # float32
    top_p: jax.Array | None  # float32; None: all
    index_B: jax.Array  # int32: numbers of the prompts
    top_k: int
    greedy: bool


def drawing(options: Sampling, index_B: jax.Array) -> Drawing:
    """How to draw for prompts with these numbers."""
    return Drawing(
        seed=jnp.uint32(options.seed),
        temperature=jnp.float32(options.temperature),
        top_p=None if options.top_p >= 1 else jnp.float32(options.top_p),
        index_B=index_B,
        top_k=options.top_k,
        greedy=options.temperature == 0,
    )


def allowed(
    logits: jax.Array, temperature: jax.Array | float, top_k: int, top_p: jax.Array | float | None
) -> jax.Array:
    """float32 logits [..., V] to sample from: -inf where a token cannot be chosen.

    Tokens as likely as the last one of a top-k or top-p set all belong to it.
    """
    # The maximum is subtracted first: a tiny temperature must not overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = jnp.min(jax.lax.top_k(logits, top_k)[0], axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is None:
        return logits
    p = jax.nn.softmax(logits, axis=-1)
    # Bisection over the bits of float32 finds the largest threshold that keeps enough probability:
    # sorting a vocabulary takes far longer.

    def bits(n: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(n, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = jnp.sum(jnp.where(p >= bits(middle), p, 0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # By a reduction, like `enough`, so that both have the same layout: from jax 0.11 on a slice of
    # one number has none.
    low = jnp.zeros_like(jnp.max(p, axis=-1, keepdims=True), jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, above_one)))
    return jnp.where(p >= bits(low), logits, -jnp.inf)


def choose(logits_BSV: jax.Array, position_BS: jax.Array, drawing: Drawing) -> jax.Array:
    """The tokens, int32 [B, S].

    A draw depends on the seed, the number of the prompt and the token's position alone.

    Args:
      logits_BSV: float32, -inf where a token cannot be chosen.
      position_BS: int32, the position that each token will have.
      drawing: how to draw.
    """
    if drawing.greedy:
        return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
    logits_BSV = allowed(logits_BSV, drawing.temperature, drawing.top_k, drawing.top_p)

    def draw(logits_V, index, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(drawing.seed), index), position)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.vmap(jax.vmap(draw, in_axes=(0, None, 0)))(logits_BSV, drawing.index_B, position_BS)
