"""The kernels of fused.py in Pallas Mosaic GPU, for Hopper GPUs.

A block of the grid lives on one multiprocessor and computes one tile. Of its three warpgroups one brings
blocks of the other side into shared memory, some steps ahead; the other two have 64 rows of the tile
each, multiply them by wgmma, and keep their sums in registers. What they have done with is free for the
next block at once, each operand by itself.

Sizes follow from a multiprocessor's 227 KiB of shared memory and the 240 registers of a thread that
multiplies, at head widths of 192 and 128: forward holds 48 KiB of queries and two stages of 80 KiB. In the
gradient of keys a thread sums up 96 + 64 numbers; scores and their gradients, at 64 queries a step, take
another 32 each.

Shape letters: fused.py; mosaic_tiles.py.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from deepseek_jax.model.attention import mosaic_tiles
from deepseek_jax.model.attention.fused import LOG2_E
from deepseek_jax.model.attention.mosaic_tiles import (
    GRID,
    MULTIPLIERS,
    ROWS,
    TILE,
    WARPGROUP,
    WIDTH,
)
from deepseek_jax.model.attention.visible_blocks import ranges

QUERIES = TILE
KEYS = TILE
FORWARD_KEYS = 128  # of a step
BACKWARD_ROWS = 64  # of a step: queries or keys
FORWARD_STAGES = 2
BACKWARD_STAGES = 3
LOWEST = -1e30  # below every score: the highest of none


def forward(q, k, v, queries_B2Q, keys_B2K, *, scale, like, interpret):
    """As fused.forward, of padded operands."""
    b, length, heads, width = q.shape
    share = heads // k.shape[2]
    range_BT4, _ = ranges(queries_B2Q, keys_B2K, TILE, FORWARD_KEYS)
    parts, v_parts = width // WIDTH, v.shape[3] // WIDTH
    tiles = length // TILE

    def kernel(
        q, k, v, query_ids, key_ids, ranges, out, lse, q_here, ids_here, lse_here, arrived, staging
    ):
        sequence, head, turn = (lax.axis_index(name) for name in GRID)
        tile = tiles - 1 - turn  # late queries see the most keys, and come first
        range_ = mosaic_tiles.range_of(ranges.at[sequence, tile])
        me = lax.axis_index(WARPGROUP)
        rows = pl.ds(tile * TILE + me * ROWS, ROWS)

        def context(run):
            come = [*mosaic_tiles.pairs(q.at[sequence, rows, head], q_here.at[me], parts)]
            come += [(query_ids.at[sequence, :, rows], ids_here.at[me])]
            mosaic_tiles.bring(come, arrived.at[me])
            start = (
                jnp.zeros((ROWS, v.shape[3]), jnp.float32),
                jnp.full((ROWS,), LOWEST, jnp.float32),
                jnp.zeros((ROWS,), jnp.float32),
            )
            total, top, sum_ = run(start)
            inverse = 1 / jnp.where(sum_ > 0, sum_, 1.0)
            total = total * mosaic_tiles.down(inverse, total)
            # Of a query without keys: the logarithm of 0.
            lse_here[me] = (top + jnp.log2(sum_)) * (1 / LOG2_E)
            mosaic_tiles.put(total, q_here.at[me], v_parts)
            mosaic.commit_smem()
            for here, there in mosaic_tiles.pairs(
                q_here.at[me], out.at[sequence, rows, head], v_parts
            ):
                mosaic.copy_smem_to_gmem(here, there)
            mosaic.copy_smem_to_gmem(lse_here.at[me], lse.at[sequence, head, rows])
            mosaic.wait_smem_to_gmem(0)

        def step(index, k_block, v_block, ids_block, k_free, v_free, ids_free, carry):
            total, top, sum_ = carry
            score = mosaic_tiles.rows_by_rows(q_here.at[me], k_block, parts)
            mosaic.barrier_arrive(k_free)
            score = mosaic_tiles.masked(score, range_, index[0], ids_here.at[me], ids_block, True)
            mosaic.barrier_arrive(ids_free)
            factor = scale * LOG2_E
            new_top = jnp.maximum(top, jnp.max(score, axis=1) * factor)
            shrink = jnp.exp2(top - new_top)
            weight = jnp.exp2(score * factor - mosaic_tiles.down(new_top, score))
            sum_ = sum_ * shrink + jnp.sum(weight, axis=1)
            weight = weight.astype(v.dtype)

            def multiply(product):
                mosaic_tiles.add(product, weight, v_block, staging, me)
                return product[...]

            product = pl.run_scoped(multiply, mosaic.ACC(total.shape, jnp.float32))
            mosaic.barrier_arrive(v_free)
            return total * mosaic_tiles.down(shrink, total) + product, new_top, sum_

        first = range_.first
        specs = [
            mosaic_tiles.block((FORWARD_KEYS, width), lambda i: (first + i, 0), q.dtype),
            mosaic_tiles.block((FORWARD_KEYS, v.shape[3]), lambda i: (first + i, 0), q.dtype),
            mosaic.BlockSpec((2, FORWARD_KEYS), lambda i: (0, first + i)),
        ]
        there = lax.div(head, jnp.int32(share))
        operands = (k.at[sequence, :, there], v.at[sequence, :, there], key_ids.at[sequence])
        mosaic_tiles.pipeline(step, context, (range_.end - first,), specs, FORWARD_STAGES)(
            *operands
        )

    scratch = [
        mosaic_tiles.tile_of_parts(max(parts, v_parts), q.dtype),
        mosaic.SMEM((MULTIPLIERS, 2, ROWS), jnp.int32),
        mosaic.SMEM((MULTIPLIERS, ROWS), jnp.float32),
        mosaic.Barrier(num_arrivals=parts + 1, num_barriers=MULTIPLIERS),
    ]
    grid = (b, heads, tiles)
    call = mosaic_tiles.kernel_of(
        kernel, "attention_forward", like, grid, scratch, FORWARD_KEYS, q.dtype, interpret
    )
    return call(q, k, v, queries_B2Q, keys_B2K, range_BT4)


def gradient_of_queries(
    q, k, v, dout, statistics, queries_B2Q, keys_B2K, *, scale, like, interpret
):
    """As fused.backward, of padded operands: dq alone, as a tuple."""
    b, length, heads, width = q.shape
    share = heads // k.shape[2]
    range_BT4, _ = ranges(queries_B2Q, keys_B2K, TILE, BACKWARD_ROWS)
    parts, v_parts = width // WIDTH, v.shape[3] // WIDTH
    tiles = length // TILE

    def kernel(
        q, k, v, dout, statistics, query_ids, key_ids, ranges, dq,
        q_here, dout_here, statistics_here, ids_here, arrived, staging,
    ):  # fmt: skip
        sequence, head, turn = (lax.axis_index(name) for name in GRID)
        tile = tiles - 1 - turn
        range_ = mosaic_tiles.range_of(ranges.at[sequence, tile])
        me = lax.axis_index(WARPGROUP)
        rows = pl.ds(tile * TILE + me * ROWS, ROWS)

        def context(run):
            come = [*mosaic_tiles.pairs(q.at[sequence, rows, head], q_here.at[me], parts)]
            come += mosaic_tiles.pairs(dout.at[sequence, rows, head], dout_here.at[me], v_parts)
            come += [(statistics.at[sequence, head, :, rows], statistics_here.at[me])]
            come += [(query_ids.at[sequence, :, rows], ids_here.at[me])]
            mosaic_tiles.bring(come, arrived.at[me])

            @functools.partial(pl.run_scoped, total=mosaic.ACC((ROWS, width), jnp.float32))
            def _(total):
                run((total,))
                mosaic_tiles.put(total[...] * scale, q_here.at[me], parts)

            mosaic.commit_smem()
            for here, there in mosaic_tiles.pairs(
                q_here.at[me], dq.at[sequence, rows, head], parts
            ):
                mosaic.copy_smem_to_gmem(here, there)
            mosaic.wait_smem_to_gmem(0)

        def step(index, k_block, v_block, ids_block, k_free, v_free, ids_free, carry):
            (total,) = carry
            score = mosaic_tiles.rows_by_rows(q_here.at[me], k_block, parts)
            score = mosaic_tiles.masked(score, range_, index[0], ids_here.at[me], ids_block, True)
            mosaic.barrier_arrive(ids_free)
            base2, delta = statistics_here[me, 0], statistics_here[me, 1]
            weight = jnp.exp2(score * (scale * LOG2_E) - mosaic_tiles.down(base2, score))
            dweight = mosaic_tiles.rows_by_rows(dout_here.at[me], v_block, v_parts)
            mosaic.barrier_arrive(v_free)
            dscore = (weight * (dweight - mosaic_tiles.down(delta, score))).astype(q.dtype)
            mosaic_tiles.add(total, dscore, k_block, staging, me)
            mosaic.wgmma_wait(0)
            mosaic.barrier_arrive(k_free)
            return carry

        first = range_.first
        specs = [
            mosaic_tiles.block((BACKWARD_ROWS, width), lambda i: (first + i, 0), q.dtype),
            mosaic_tiles.block((BACKWARD_ROWS, v.shape[3]), lambda i: (first + i, 0), q.dtype),
            mosaic.BlockSpec((2, BACKWARD_ROWS), lambda i: (0, first + i)),
        ]
        there = lax.div(head, jnp.int32(share))
        operands = (k.at[sequence, :, there], v.at[sequence, :, there], key_ids.at[sequence])
        mosaic_tiles.pipeline(step, context, (range_.end - first,), specs, BACKWARD_STAGES)(
            *operands
        )

    scratch = [
        mosaic_tiles.tile_of_parts(parts, q.dtype),
        mosaic_tiles.tile_of_parts(v_parts, q.dtype),
        mosaic.SMEM((MULTIPLIERS, 2, ROWS), jnp.float32),
        mosaic.SMEM((MULTIPLIERS, 2, ROWS), jnp.int32),
        mosaic.Barrier(num_arrivals=parts + v_parts + 2, num_barriers=MULTIPLIERS),
    ]
    name, grid = "attention_queries_gradient", (b, heads, tiles)
    call = mosaic_tiles.kernel_of(
        kernel, name, like, grid, scratch, BACKWARD_ROWS, q.dtype, interpret
    )
    return call(q, k, v, dout, statistics, queries_B2Q, keys_B2K, range_BT4)


def gradient_of_keys(q, k, v, dout, statistics, queries_B2Q, keys_B2K, *, scale, like, interpret):
    """As fused.backward, of padded operands: (dk, dv)."""
    b, length, heads, width = k.shape
    share = q.shape[2] // heads
    _, range_BU4 = ranges(queries_B2Q, keys_B2K, BACKWARD_ROWS, TILE)
    parts, v_parts = width // WIDTH, v.shape[3] // WIDTH

    def kernel(
        q, k, v, dout, statistics, query_ids, key_ids, ranges, dk, dv,
        k_here, v_here, ids_here, arrived, staging,
    ):  # fmt: skip
        sequence, head, tile = (lax.axis_index(name) for name in GRID)
        range_ = mosaic_tiles.range_of(ranges.at[sequence, tile])
        me = lax.axis_index(WARPGROUP)
        rows = pl.ds(tile * TILE + me * ROWS, ROWS)

        def context(run):
            come = [*mosaic_tiles.pairs(k.at[sequence, rows, head], k_here.at[me], parts)]
            come += mosaic_tiles.pairs(v.at[sequence, rows, head], v_here.at[me], v_parts)
            come += [(key_ids.at[sequence, :, rows], ids_here.at[me])]
            mosaic_tiles.bring(come, arrived.at[me])

            @functools.partial(
                pl.run_scoped,
                dk_total=mosaic.ACC((ROWS, width), jnp.float32),
                dv_total=mosaic.ACC((ROWS, v.shape[3]), jnp.float32),
            )
            def _(dk_total, dv_total):
                run((dk_total, dv_total))
                mosaic_tiles.put(dk_total[...] * scale, k_here.at[me], parts)
                mosaic_tiles.put(dv_total[...], v_here.at[me], v_parts)

            mosaic.commit_smem()
            gone = [*mosaic_tiles.pairs(k_here.at[me], dk.at[sequence, rows, head], parts)]
            gone += mosaic_tiles.pairs(v_here.at[me], dv.at[sequence, rows, head], v_parts)
            for here, there in gone:
                mosaic.copy_smem_to_gmem(here, there)
            mosaic.wait_smem_to_gmem(0)

        def step(index, q_block, dout_block, statistics_block, ids_block, *free_and_carry):
            q_free, dout_free, statistics_free, ids_free, carry = free_and_carry
            dk_total, dv_total = carry
            score = mosaic_tiles.rows_by_rows(k_here.at[me], q_block, parts)
            score = mosaic_tiles.masked(score, range_, index[1], ids_here.at[me], ids_block, False)
            mosaic.barrier_arrive(ids_free)
            base2, delta = statistics_block[0], statistics_block[1]
            mosaic.barrier_arrive(statistics_free)
            weight = jnp.exp2(score * (scale * LOG2_E) - mosaic_tiles.along(base2, score))
            mosaic_tiles.add(dv_total, weight.astype(q.dtype), dout_block, staging, me)
            dweight = mosaic_tiles.rows_by_rows(v_here.at[me], dout_block, v_parts)
            mosaic.barrier_arrive(dout_free)
            dscore = (weight * (dweight - mosaic_tiles.along(delta, score))).astype(q.dtype)
            mosaic_tiles.add(dk_total, dscore, q_block, staging, me)
            mosaic.wgmma_wait(0)
            mosaic.barrier_arrive(q_free)
            return carry

        first, base = range_.first, head * share
        specs = [
            mosaic_tiles.block(
                (BACKWARD_ROWS, None, width), lambda g, i: (first + i, base + g, 0), q.dtype
            ),
            mosaic_tiles.block(
                (BACKWARD_ROWS, None, v.shape[3]), lambda g, i: (first + i, base + g, 0), q.dtype
            ),
            mosaic.BlockSpec((None, 2, BACKWARD_ROWS), lambda g, i: (base + g, 0, first + i)),
            mosaic.BlockSpec((2, BACKWARD_ROWS), lambda g, i: (0, first + i)),
        ]
        operands = (a.at[sequence] for a in (q, dout, statistics, query_ids))
        grid = (jnp.int32(share), range_.end - first)
        mosaic_tiles.pipeline(step, context, grid, specs, BACKWARD_STAGES)(*operands)

    scratch = [
        mosaic_tiles.tile_of_parts(parts, q.dtype),
        mosaic_tiles.tile_of_parts(v_parts, q.dtype),
        mosaic.SMEM((MULTIPLIERS, 2, ROWS), jnp.int32),
        mosaic.Barrier(num_arrivals=parts + v_parts + 1, num_barriers=MULTIPLIERS),
    ]
    name, grid = "attention_keys_gradient", (b, heads, length // TILE)
    call = mosaic_tiles.kernel_of(
        kernel, name, like, grid, scratch, BACKWARD_ROWS, q.dtype, interpret
    )
    return call(q, k, v, dout, statistics, queries_B2Q, keys_B2K, range_BU4)
