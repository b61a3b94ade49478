"""Reading and writing a layer's cache on one device.

A token's slot is its position in its own sequence, so that sequences of any lengths lie side by
side; slots beyond a sequence's last position are never seen. Shape letters: layers.py; Z slots of
the cache, W width of an entry.
"""

import jax
import jax.numpy as jnp
from jax import lax

HIDDEN = (
    -1e30
)  # score of a slot that is not seen; finite, so that a sequence that sees nothing has no NaN


def fresh(entries: jax.Array, slots: int) -> jax.Array:
    """A cache of so many slots that begins with entries [B, (M,) S, W] of positions 0 to S - 1."""
    s = entries.shape[-2]
    if s >= slots:
        return lax.slice_in_dim(entries, 0, slots, axis=entries.ndim - 2)
    padding = [(0, 0, 0)] * (entries.ndim - 2) + [(0, slots - s, 0), (0, 0, 0)]
    return lax.pad(entries, jnp.zeros((), entries.dtype), padding)


def write(cache: jax.Array, entries: jax.Array, start_B: jax.Array) -> jax.Array:
    """Puts entries [B, (M,) S, W] into slots start_B[b] to start_B[b] + S - 1 of sequence b.

    These slots must be there.
    """
    if cache.shape[0] == 1:
        # A scatter of at least two rows: XLA on CPUs fuses a dynamic_update_slice, or a scatter of
        # one row, with every use, and copies the cache for each.
        slots = start_B[0] + jnp.arange(entries.shape[-2], dtype=jnp.int32)
        if len(slots) == 1:
            slots = jnp.concatenate([slots] * 2)
            entries = jnp.concatenate([entries] * 2, axis=-2)

        def put(cache_ZW, entries_SW):
            return cache_ZW.at[slots].set(entries_SW, mode="promise_in_bounds")

        return (put if cache.ndim == 3 else jax.vmap(put))(cache[0], entries[0])[None]
    zeros = (0,) * (cache.ndim - 3)
    return jax.vmap(lambda c, new, start: lax.dynamic_update_slice(c, new, (*zeros, start, 0)))(
        cache, entries, start_B
    )


def scores(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """float32 [..., Q, Z]: the product of every query [..., Q, H] and cached key [..., Z, H].

    In this order XLA on CPUs reads the cache as it lies; in the other it transposes it first.
    """
    product = jnp.matmul(keys, queries.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    return product.swapaxes(-1, -2)


def softmax(score_BSNZ: jax.Array, start_B: jax.Array) -> jax.Array:
    """Over the slots that each token sees: those of positions up to its own."""
    s, z = score_BSNZ.shape[1], score_BSNZ.shape[3]
    seen_BSZ = jnp.arange(z) <= start_B[:, None, None] + jnp.arange(s)[:, None]
    return jax.nn.softmax(jnp.where(seen_BSZ[:, :, None], score_BSNZ, HIDDEN), axis=-1)
