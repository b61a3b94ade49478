"""Which blocks of keys a tile of queries can see, and which it sees whole: what fused kernels go through.

A query sees the keys of its own segment whose position is not after its own. Of a tile and a block only
the lowest and highest position and segment are compared, so a block may be gone through in which
nothing is seen, where segments do not follow one another; never the reverse.

Shape letters: fused.py; T tiles of one side, U blocks of the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

AFTER_ALL = 2**31 - 1  # position of keys that are not there: after every query
BEFORE_ALL = -1  # of queries that are not there: they see nothing


class Ids(NamedTuple):
    """Where tokens stand.

    Attributes:
      position: int32 [B, S], from 0 to 2^31 - 2.
      segment: int32 [B, S].
    """

    position: jax.Array
    segment: jax.Array


class Range(NamedTuple):
    """What a kernel reads of int32 [B, T, 4]: the blocks from `first` to `end` are gone through, and those
    from `whole_first` to `whole_end`, which lie within, need no mask."""

    first: jax.Array
    end: jax.Array
    whole_first: jax.Array
    whole_end: jax.Array


def packed(ids: Ids, unit: int, filler: int) -> jax.Array:
    """int32 [B, 2, S]: positions and segments, up to a multiple of `unit` with tokens at `filler`."""
    more = -ids.position.shape[1] % unit
    position, segment = (a.astype(jnp.int32) for a in ids)
    if more:
        position = jnp.pad(position, ((0, 0), (0, more)), constant_values=filler)
        # The last segment, so that the block's range stays what it was.
        segment = jnp.pad(segment, ((0, 0), (0, more)), mode="edge")
    return jnp.stack([position, segment], axis=1)


def ranges(
    queries_B2Q: jax.Array, keys_B2K: jax.Array, query_tile: int, key_tile: int
) -> tuple[jax.Array, jax.Array]:
    """int32 [B, T, 4] and [B, U, 4]: `Range`s of blocks of keys for each tile of queries, and of blocks of
    queries for each tile of keys.

    Args:
      queries_B2Q: positions and segments, as `packed` has them.
      keys_B2K: those of keys.
      query_tile: queries of a tile, a divisor of Q.
      key_tile: likewise.
    """
    low_q, high_q = (a[:, :, :, None] for a in _extremes(queries_B2Q, query_tile))
    low_k, high_k = (a[:, :, None, :] for a in _extremes(keys_B2K, key_tile))
    is_seen_BTU = (
        (low_k[:, 0] <= high_q[:, 0])
        & (low_k[:, 1] <= high_q[:, 1])
        & (high_k[:, 1] >= low_q[:, 1])
    )
    is_whole_BTU = (
        (high_k[:, 0] <= low_q[:, 0])
        & (low_k[:, 1] == high_q[:, 1])
        & (high_k[:, 1] == low_q[:, 1])
    )
    of_queries = _ranges_of(is_seen_BTU, is_whole_BTU)
    return of_queries, _ranges_of(is_seen_BTU.swapaxes(1, 2), is_whole_BTU.swapaxes(1, 2))


def _extremes(ids_B2S: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest position and segment of each tile: [B, 2, T]."""
    b, two, length = ids_B2S.shape
    tiles = ids_B2S.reshape(b, two, length // tile, tile)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _ranges_of(is_seen_BTU: jax.Array, is_whole_BTU: jax.Array) -> jax.Array:
    blocks = is_seen_BTU.shape[-1]
    is_any = is_seen_BTU.any(axis=-1)
    first = jnp.argmax(is_seen_BTU, axis=-1)  # 0 where nothing is seen
    end = jnp.where(is_any, blocks - jnp.argmax(is_seen_BTU[..., ::-1], axis=-1), 0)
    has_whole = is_whole_BTU.any(axis=-1)
    whole_first = jnp.where(has_whole, jnp.argmax(is_whole_BTU, axis=-1), first)
    # Only the first blocks in a row that are seen whole count.
    is_over = ~is_whole_BTU & (jnp.arange(blocks) > whole_first[..., None])
    whole_end = jnp.where(is_over.any(axis=-1), jnp.argmax(is_over, axis=-1), blocks)
    whole_end = jnp.where(has_whole, whole_end, first)
    return jnp.stack(Range(first, end, whole_first, whole_end), axis=-1).astype(jnp.int32)
