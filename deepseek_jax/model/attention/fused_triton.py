"""The kernels of fused.py in Pallas Triton, for GPUs that Mosaic's do not run on.

JAX 0.11 and 0.12 announce the end of this backend; tests/model/test_attention_choice.py notices when it is
gone. Interpreted they run on any device. Arrays in a Triton kernel have sizes that are powers of two,
and a head's width of 192 is none: it is taken in parts of 128 and 64. The first axis of a grid changes
fastest: neighbours share a head, whose keys stay in the second-level cache.

Shape letters: fused.py; a tile is [Q or K, part of a width].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from deepseek_jax.model.attention.fused import LOG2_E
from deepseek_jax.model.attention.visible_blocks import Range, ranges

QUERIES = 64  # of a tile, and of a block
KEYS = 64
WIDTH = 16  # widths are padded to multiples of this, the least of a product
LOWEST = -1e30  # below every score: the highest of none
# The gradient of keys holds four tiles, two of them as wide as a head.
OPTIONS = {"num_warps": 8, "num_stages": 2}

Tiles = tuple[jax.Array, ...]  # the parts of a width


def forward(q, k, v, queries_B2Q, keys_B2K, *, scale, like, interpret):
    """As fused.forward, of padded operands."""
    b, length, n, _ = q.shape
    share = n // k.shape[2]
    range_BT4, _ = ranges(queries_B2Q, keys_B2K, QUERIES, KEYS)
    tile = functools.partial(_tile, last=length // QUERIES - 1)
    return pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale),
        out_shape=like,
        grid=(length // QUERIES, n, b),
        in_specs=[
            _head_tile(q, QUERIES, tile),
            _head(k, share),
            _head(v, share),
            pl.BlockSpec((None, 2, QUERIES), lambda t, n, b: (b, 0, tile(t))),
            pl.BlockSpec((None, *keys_B2K.shape[1:]), lambda t, n, b: (b, 0, 0)),
            pl.BlockSpec((None, None, 4), lambda t, n, b: (b, tile(t), 0)),
        ],
        out_specs=[
            _head_tile(like[0], QUERIES, tile),
            pl.BlockSpec((None, None, QUERIES), lambda t, n, b: (b, n, tile(t))),
        ],
        name="attention_forward",
        **_options(interpret),
    )(q, k, v, queries_B2Q, keys_B2K, range_BT4)


def _forward_kernel(q, k, v, query_ids, key_ids, range_, out, lse, *, scale):
    q_parts = _load(q)
    position, segment = query_ids[0, :], query_ids[1, :]

    def block(i, carry, masked):
        total, top, sum_ = carry
        here = pl.ds(i * KEYS, KEYS)
        score = _product(q_parts, _load(k, here)) * (scale * LOG2_E)
        if masked:
            score = _masked(score, position[:, None], segment[:, None], key_ids, here, 1)
        new_top = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.exp2(score - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        sum_ = sum_ * shrink + jnp.sum(weight, axis=1)
        weight = weight.astype(v.dtype)
        total = tuple(
            a * shrink[:, None] + _dot(weight, part)
            for a, part in zip(total, _load(v, here), strict=True)
        )
        return total, new_top, sum_

    rows = q.shape[0]
    start = _zeros(rows, v), jnp.full(rows, LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32)
    total, top, sum_ = _blocks(range_, block, start)
    inverse = 1 / jnp.where(sum_ > 0, sum_, 1)
    _store(out, tuple(a * inverse[:, None] for a in total))
    seen = jnp.where(sum_ > 0, sum_, 1)
    lse[...] = jnp.where(sum_ > 0, (top + jnp.log2(seen)) / LOG2_E, -jnp.inf)


def gradient_of_queries(
    q, k, v, dout, statistics, queries_B2Q, keys_B2K, *, scale, like, interpret
):
    """As fused.backward, of padded operands: dq alone, as a tuple."""
    b, length, n, _ = q.shape
    share = n // k.shape[2]
    range_BT4, _ = ranges(queries_B2Q, keys_B2K, QUERIES, KEYS)
    tile = functools.partial(_tile, last=length // QUERIES - 1)
    return pl.pallas_call(
        functools.partial(_queries_kernel, scale=scale),
        out_shape=like,
        grid=(length // QUERIES, n, b),
        in_specs=[
            _head_tile(q, QUERIES, tile),
            _head(k, share),
            _head(v, share),
            _head_tile(dout, QUERIES, tile),
            pl.BlockSpec((None, None, 2, QUERIES), lambda t, n, b: (b, n, 0, tile(t))),
            pl.BlockSpec((None, 2, QUERIES), lambda t, n, b: (b, 0, tile(t))),
            pl.BlockSpec((None, *keys_B2K.shape[1:]), lambda t, n, b: (b, 0, 0)),
            pl.BlockSpec((None, None, 4), lambda t, n, b: (b, tile(t), 0)),
        ],
        out_specs=[_head_tile(like[0], QUERIES, tile)],
        name="attention_queries_gradient",
        **_options(interpret),
    )(q, k, v, dout, statistics, queries_B2Q, keys_B2K, range_BT4)


def _queries_kernel(q, k, v, dout, statistics, query_ids, key_ids, range_, dq, *, scale):
    q_parts, dout_parts = _load(q), _load(dout)
    base2, delta = statistics[0, :], statistics[1, :]
    position, segment = query_ids[0, :], query_ids[1, :]

    def block(i, total, masked):
        here = pl.ds(i * KEYS, KEYS)
        k_parts = _load(k, here)
        score = _product(q_parts, k_parts) * (scale * LOG2_E)
        if masked:
            score = _masked(score, position[:, None], segment[:, None], key_ids, here, 1)
        weight = jnp.exp2(score - base2[:, None])
        dweight = _product(dout_parts, _load(v, here))
        dscore = (weight * (dweight - delta[:, None])).astype(k.dtype)
        return tuple(a + _dot(dscore, part) for a, part in zip(total, k_parts, strict=True))

    total = _blocks(range_, block, _zeros(q.shape[0], q))
    _store(dq, tuple(a * scale for a in total))


def gradient_of_keys(q, k, v, dout, statistics, queries_B2Q, keys_B2K, *, scale, like, interpret):
    """As fused.backward, of padded operands: (dk, dv)."""
    b, length, m, _ = k.shape
    share = q.shape[2] // m
    _, range_BU4 = ranges(queries_B2Q, keys_B2K, QUERIES, KEYS)

    def first(t):
        return t

    def group(a):
        return pl.BlockSpec((None, a.shape[1], share, a.shape[3]), lambda t, m, b: (b, 0, m, 0))

    rows = (None, share, *statistics.shape[2:])
    return pl.pallas_call(
        functools.partial(_keys_kernel, scale=scale),
        out_shape=like,
        grid=(length // KEYS, m, b),
        in_specs=[
            group(q),
            _head_tile(k, KEYS, first),
            _head_tile(v, KEYS, first),
            group(dout),
            pl.BlockSpec(rows, lambda t, m, b: (b, m, 0, 0)),
            pl.BlockSpec((None, *queries_B2Q.shape[1:]), lambda t, m, b: (b, 0, 0)),
            pl.BlockSpec((None, 2, KEYS), lambda t, m, b: (b, 0, t)),
            pl.BlockSpec((None, None, 4), lambda t, m, b: (b, t, 0)),
        ],
        out_specs=[_head_tile(a, KEYS, first) for a in like],
        name="attention_keys_gradient",
        **_options(interpret),
    )(q, k, v, dout, statistics, queries_B2Q, keys_B2K, range_BU4)


def _keys_kernel(q, k, v, dout, statistics, query_ids, key_ids, range_, dk, dv, *, scale):
    k_parts, v_parts = _load(k), _load(v)
    position, segment = key_ids[0, :], key_ids[1, :]

    def block(i, carry, masked, head):
        dk_total, dv_total = carry
        here = pl.ds(i * QUERIES, QUERIES)
        q_parts, dout_parts = _load(q, here, head), _load(dout, here, head)
        score = _product(k_parts, q_parts) * (scale * LOG2_E)  # [K, Q]
        if masked:
            score = _masked(score, position[:, None], segment[:, None], query_ids, here, 0)
        weight = jnp.exp2(score - statistics[head, 0, here][None])
        dweight = _product(v_parts, dout_parts)
        dscore = (weight * (dweight - statistics[head, 1, here][None])).astype(q.dtype)
        weight = weight.astype(q.dtype)
        return (
            tuple(a + _dot(dscore, part) for a, part in zip(dk_total, q_parts, strict=True)),
            tuple(a + _dot(weight, part) for a, part in zip(dv_total, dout_parts, strict=True)),
        )

    def of_head(head, carry):
        return _blocks(range_, functools.partial(block, head=head), carry)

    rows = k.shape[0]
    start = _zeros(rows, k), _zeros(rows, v)
    dk_total, dv_total = lax.fori_loop(0, q.shape[1], of_head, start)
    _store(dk, tuple(a * scale for a in dk_total))
    _store(dv, dv_total)


def _blocks(range_: Any, block: Callable[..., Any], carry: Any) -> Any:
    """`block` of all blocks of a range in order, with a mask where it is needed."""
    first, end, whole_first, whole_end = (range_[i] for i in range(len(Range._fields)))
    masked = functools.partial(block, masked=True)
    carry = lax.fori_loop(first, whole_first, masked, carry)
    carry = lax.fori_loop(whole_first, whole_end, functools.partial(block, masked=False), carry)
    return lax.fori_loop(whole_end, end, masked, carry)


def _masked(score, position, segment, other_ids, here, key_axis):
    """Scores, -inf where a query does not see a key.

    Args:
      score: [rows, columns].
      position: of the rows' tokens, [rows, 1].
      segment: likewise.
      other_ids: of all tokens of the columns' side.
      here: which of them the columns are.
      key_axis: 1: the columns are keys; 0: the rows are.
    """
    other = other_ids[0, here][None]
    is_before = other <= position if key_axis else position <= other
    return jnp.where(is_before & (other_ids[1, here][None] == segment), score, -jnp.inf)


def _parts(width: int) -> Sequence[Any]:
    """Powers of two that a width, a multiple of WIDTH, is made of, the largest first."""
    parts, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        parts.append(pl.ds(start, size))
        start += size
    return parts


def _load(a: Any, *rows: Any) -> Tiles:
    """All columns of some rows, part by part."""
    rows = rows or (slice(None),)
    return tuple(a[(*rows, part)] for part in _parts(a.shape[-1]))


def _store(there: Any, values: Tiles) -> None:
    for part, value in zip(_parts(there.shape[-1]), values, strict=True):
        there[:, part] = value.astype(there.dtype)


def _zeros(rows: int, like: Any) -> Tiles:
    return tuple(jnp.zeros((rows, part.size), jnp.float32) for part in _parts(like.shape[-1]))


def _product(left: Tiles, right: Tiles) -> jax.Array:
    """Rows by rows: [rows of left, rows of right], float32."""
    total = _dot(left[0], right[0].T)
    for a, b in zip(left[1:], right[1:], strict=True):
        total += _dot(a, b.T)
    return total


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _tile(t: Any, last: int) -> Any:
    """Tiles of late queries see the most keys, and come first."""
    return last - t


def _head_tile(a: Any, rows: int, tile: Callable[[Any], Any]) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows, None, a.shape[3]), lambda t, n, b: (b, tile(t), n, 0))


def _head(a: Any, share: int) -> pl.BlockSpec:
    """All rows of the head that a head of queries meets."""
    return pl.BlockSpec((None, a.shape[1], None, a.shape[3]), lambda t, n, b: (b, 0, n // share, 0))


def _options(interpret: bool) -> dict[str, Any]:
    params = None if interpret else triton.CompilerParams(**OPTIONS)
    return {"compiler_params": params, "interpret": interpret}
