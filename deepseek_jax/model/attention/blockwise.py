"""Exact causal attention in blocks of queries, forward and backward, on one device. Shape letters: layers.py.

As in FlashAttention-2 (Dao 2023, arXiv:2307.08691), forward keeps the output and one logsumexp per
query and head, and backward recomputes the weights from them, so that memory is linear in the
sequence length. A block of queries meets all keys that it may see at once, without an online
softmax: the fastest way on machines without fused kernels. More letters: G = b * n heads that are
worked on together, Q queries of a block, K keys of its level, counted from the first.

Sizes: a block's scores (G x Q x K) should stay in the cache, and fill the device. Blocks of one
level see the same keys, up to the level's end, so that a loop can go through them: the program does
not grow with the length, and at most LEVELS blocks' temporaries exist at once. With 8 levels,
scores beyond the diagonal cost at most an eighth of the work that counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LEVELS = 8


class Sizes(NamedTuple):
    """How a device goes through the work."""

    block: int  # queries at once
    scores: int  # scores at once, as long as that leaves a block of one head


class Level(NamedTuple):
    """Blocks of queries that meet the same keys."""

    start: int  # first query
    block: int  # queries of a block
    blocks: int

    @property
    def end(self) -> int:
        return self.start + self.block * self.blocks


def forward(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNV: jax.Array,
    segment_ids_BS: jax.Array,
    scale: float,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention within segments.

    k and v may have fewer heads than q, each for a group of neighbouring query heads: they are
    repeated only for the heads that are worked on together.

    Returns:
      The output [B, S, N, V] in the dtype of v, and the logsumexp of each query's scores, float32 [B, N, S].
    """

    def group(q, k, v, segments_bS):
        share = q.shape[2] // k.shape[2]
        q_GSH = _heads_first(q)
        k_GSH = _repeated(_heads_first(k), share)
        v_GSV = _repeated(_heads_first(v), share)
        outs, sums = [], []
        for level in _levels(q_GSH.shape[1], sizes.block):
            k_GKH, v_GKV = k_GSH[:, : level.end], v_GSV[:, : level.end]

            def block(i, level=level, k_GKH=k_GKH, v_GKV=v_GKV):
                mine = _block_of(level, i)
                score_GQK = _scores(mine(q_GSH), k_GKH, scale, _bias(segments_bS, level, i))
                top_GQ1 = jnp.max(score_GQK, axis=-1, keepdims=True)
                weight_GQK = jnp.exp(score_GQK - top_GQ1)
                sum_GQ1 = jnp.sum(weight_GQK, axis=-1, keepdims=True)
                # Divided after the product, which has fewer numbers than the weights.
                out_GQV = _dot(weight_GQK.astype(v.dtype), v_GKV, 2, 1) / sum_GQ1
                return out_GQV.astype(v.dtype), top_GQ1 + jnp.log(sum_GQ1)

            out, sum_ = _each(block, level.blocks)
            outs.append(out)
            sums.append(sum_)
        return outs, sums

    outs, sums = _by_groups(group, (q_BSNH, k_BSNH, v_BSNV, segment_ids_BS), (2, 2, 2, None), sizes)
    b, s, heads, _ = q_BSNH.shape
    return _heads_last(jnp.concatenate(outs, axis=1), b), jnp.concatenate(sums, axis=1).reshape(
        b, heads, s
    )


def backward(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNV: jax.Array,
    segment_ids_BS: jax.Array,
    out_BSNV: jax.Array,
    lse_BNS: jax.Array,
    dout_BSNV: jax.Array,
    scale: float,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, summed up in float32, in their dtypes."""

    def group(q, k, v, segments_bS, out, lse, dout):
        s = segments_bS.shape[1]
        share = q.shape[2] // k.shape[2]
        q_GSH, out_GSV, dout_GSV = (_heads_first(a) for a in (q, out, dout))
        k_GSH, v_GSV = (_repeated(_heads_first(a), share) for a in (k, v))
        lse_GS1 = lse.reshape(-1, s, 1)
        delta_GS1 = jnp.sum(dout_GSV.astype(jnp.float32) * out_GSV, axis=-1, keepdims=True)
        dqs, dk_GHS, dv_GVS = [], None, None
        # The last level comes first: it sees all keys, so it makes dk and dv whole, and the others
        # add to them.
        for level in reversed(_levels(s, sizes.block)):
            k_GKH, v_GKV = k_GSH[:, : level.end], v_GSV[:, : level.end]

            def block(i, level=level, k_GKH=k_GKH, v_GKV=v_GKV):
                mine = _block_of(level, i)
                q_GQH, dout_GQV = mine(q_GSH), mine(dout_GSV)
                weight_GQK = jnp.exp(
                    _scores(q_GQH, k_GKH, scale, _bias(segments_bS, level, i)) - mine(lse_GS1)
                )
                dscore_GQK = (weight_GQK * (_dot(dout_GQV, v_GKV, 2, 2) - mine(delta_GS1))).astype(
                    q.dtype
                )
                # [G, H, K], not [G, K, H]: XLA's CPU products are twice as fast if the small matrix
                # is transposed.
                return (
                    _dot(dscore_GQK, k_GKH, 2, 1),
                    _dot(q_GQH, dscore_GQK, 1, 1),
                    _dot(dout_GQV, weight_GQK.astype(v.dtype), 1, 1),
                )

            dq, dk, dv = _each_summed(block, level.blocks)
            dqs.append(dq)
            dk_GHS = dk if dk_GHS is None else dk_GHS.at[:, :, : level.end].add(dk)
            dv_GVS = dv if dv_GVS is None else dv_GVS.at[:, :, : level.end].add(dv)

        def shared(a_GXX: jax.Array) -> jax.Array:
            """The sum over the query heads that share a head of keys and values."""
            if share == 1:
                return a_GXX
            return jnp.sum(a_GXX.reshape(-1, share, *a_GXX.shape[1:]), axis=1)

        return (
            [(dq * scale).astype(q.dtype) for dq in dqs[::-1]],
            (shared(dk_GHS) * scale).astype(k.dtype),
            shared(dv_GVS).astype(v.dtype),
        )

    arrays = (q_BSNH, k_BSNH, v_BSNV, segment_ids_BS, out_BSNV, lse_BNS, dout_BSNV)
    dqs, dk_GHS, dv_GVS = _by_groups(group, arrays, (2, 2, 2, None, 2, 1, 2), sizes)
    dk_GSH, dv_GSV = (jnp.swapaxes(a, 1, 2) for a in (dk_GHS, dv_GVS))
    return tuple(
        _heads_last(grad, len(q_BSNH)) for grad in (jnp.concatenate(dqs, axis=1), dk_GSH, dv_GSV)
    )


def _levels(length: int, block: int) -> list[Level]:
    """Whole blocks on at most LEVELS levels; what is left over is a level of its own."""
    block = min(block, length)
    blocks = length // block
    count = -(-blocks // LEVELS)
    out = [Level(i * block, block, min(count, blocks - i)) for i in range(0, blocks, count)]
    return out + [Level(blocks * block, length % block, 1)] * (length % block > 0)


def _block_of(level: Level, i: int | jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Cuts the i-th block of a level out of [., S, ...]."""
    return lambda a: lax.dynamic_slice_in_dim(a, level.start + i * level.block, level.block, axis=1)


def _bias(segments_bS: jax.Array, level: Level, i: int | jax.Array) -> jax.Array:
    """float32 [b, Q, K]: 0 where a query sees a key, -inf elsewhere. Every query sees itself."""
    q_1Q = _block_of(level, i)(jnp.arange(segments_bS.shape[1])[None])
    seen = (jnp.arange(level.end) <= q_1Q[..., None]) & (
        segments_bS[:, None, : level.end] == _block_of(level, i)(segments_bS)[..., None]
    )
    # Not jnp.where: XLA's CPU compiler would compute the mask again for every head, at the cost of
    # a matrix product. A division it computes once.
    return 1 - 1 / seen.astype(jnp.float32)


def _scores(q_GQH: jax.Array, k_GKH: jax.Array, scale: float, bias_bQK: jax.Array) -> jax.Array:
    score = _dot(q_GQH, k_GKH, 2, 2)
    score_bnQK = score.reshape(bias_bQK.shape[0], -1, *score.shape[1:]) * scale + bias_bQK[:, None]
    return score_bnQK.reshape(score.shape)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """One matrix product per head, in float32; the axes are those that are summed over."""
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )


def _each(block: Callable, count: int) -> tuple[jax.Array, ...]:
    """Results [G, Q, .] of all blocks of a level, as [G, count * Q, .]."""
    return block(0) if count == 1 else tuple(map(_joined, lax.map(block, jnp.arange(count))))


def _each_summed(block: Callable, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of three results, the first as `_each` does, the others added up."""
    if count == 1:
        return block(0)

    def step(sums, i):
        first, *more = block(i)
        return [a + b for a, b in zip(sums, more, strict=True)], first

    zeros = [jnp.zeros_like(a, shape=a.shape) for a in jax.eval_shape(block, 0)[1:]]
    sums, firsts = lax.scan(step, zeros, jnp.arange(count))
    return (_joined(firsts), *sums)


def _joined(a: jax.Array) -> jax.Array:
    """[count, G, Q, .] to [G, count * Q, .]."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])


def _heads_first(a_bSnH: jax.Array) -> jax.Array:
    """[b * n, S, H]: the products of all heads are then one batch of contiguous matrices."""
    b, s, n, h = a_bSnH.shape
    return jnp.swapaxes(a_bSnH, 1, 2).reshape(b * n, s, h)


def _repeated(a_GSH: jax.Array, times: int) -> jax.Array:
    """Every head of keys or values for the `times` query heads that it belongs to."""
    return a_GSH if times == 1 else jnp.repeat(a_GSH, times, axis=0)


def _heads_last(a_GSH: jax.Array, b: int) -> jax.Array:
    return jnp.swapaxes(a_GSH.reshape(b, -1, *a_GSH.shape[1:]), 1, 2)


def _by_groups(
    f: Callable, arrays: tuple[jax.Array, ...], heads: tuple[int | None, ...], sizes: Sizes
) -> Any:
    """f of all heads of some sequences, or of some heads of one sequence, at a time.

    Args:
      f: takes parts of the arrays and returns arrays [G, ...].
      arrays: [B, ...], the first [B, S, N, .], the second keys with as many heads or fewer.
      heads: the axis of the heads in each; None: it has none.
      sizes: how much to work on at a time.

    Returns:
      What f returns, for all heads of all sequences: [B * N, ...]. Not transposed within f: XLA on CPUs
      writes what a loop collects by one thread, and element by element if the layout differs.
    """
    sequences, length, heads_in_all = arrays[0].shape[:3]
    fit = max(1, sizes.scores // (min(sizes.block, length) * length))
    share = heads_in_all // arrays[1].shape[2]  # query heads that share their keys stay together
    n = _divisor(heads_in_all // share, fit // share) * share
    b = _divisor(sequences, fit // n) if n == heads_in_all else 1
    if (b, n) == (sequences, heads_in_all):
        return f(*arrays)

    def one(i):
        def cut(a, axis):
            a = lax.dynamic_slice_in_dim(a, i // (heads_in_all // n) * b, b, axis=0)
            if axis is None:
                return a
            heads = a.shape[axis] * n // heads_in_all
            return lax.dynamic_slice_in_dim(a, i % (heads_in_all // n) * heads, heads, axis=axis)

        return f(*map(cut, arrays, heads))

    return jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]),
        lax.map(one, jnp.arange(sequences * heads_in_all // (b * n))),
    )


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, at least 1."""
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)
