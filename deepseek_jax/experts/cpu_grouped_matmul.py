"""Experts on a CPU that has all of them: a grouped matmul over rows sorted by expert (sorted_rows.py).

The assignments are sorted by expert into one array of rows without gaps. A matmul walks over it
expert by expert, in whole blocks. The last block of an expert also covers rows of the next one,
which writes them again; only sums over rows have to leave them out. On CPUs XLA's `ragged_dot`
would multiply every row by every expert, and batched matmuls over equal capacities (rounds.py) work
on empty places too.

Shape letters: T tokens, K experts per token, M = T*K assignments, G experts here, J = M + block
rows, the last of which are zeros; I inner and O outer width of any matmul.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.experts.sorting import sort_by_expert
from deepseek_jax.experts.swiglu import Products

# A product takes so many blocks at once, where an expert has rows in all of them.
BLOCKS_PER_PRODUCT = (4, 2, 1)
BLOCKS_PER_GRADIENT = 8  # most blocks of one product of a weight gradient


class SortedRows(NamedTuple):
    """Where the assignments are among the rows."""

    row_TK: jax.Array  # int32: J where an assignment goes nowhere
    assignment_J: jax.Array  # int32: token * K + choice; M where a row is empty
    start_G: jax.Array  # int32: first row of each expert
    count_G: jax.Array  # int32: assignments of each expert


def sort_rows(expert_TK: jax.Array, experts: int, block: int) -> SortedRows:
    """Rows of assignments, sorted by expert, and within an expert in token order.

    Args:
      expert_TK: int32 in [0, experts]; `experts` itself means nowhere.
      experts: their number.
      block: rows per block.
    """
    assignments = expert_TK.size
    size = assignments + block
    order_M, bound, rank_TK = sort_by_expert(expert_TK, experts)
    row_TK = jnp.where(expert_TK < experts, bound.at[expert_TK].get(mode="clip") + rank_TK, size)
    is_filled_J = jnp.arange(size) < bound[-1]
    assignment_J = jnp.where(is_filled_J, jnp.pad(order_M, (0, block)), assignments)
    return SortedRows(row_TK, assignment_J, bound[:-1], jnp.diff(bound))


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """Rows per block: at most a quarter of an expert's mean load.

    Then about a tenth of the work is on rows of other experts.
    """
    mean = tokens * top_k / experts
    return int(min(max(2 ** int(np.log2(max(mean, 1) / 4)), 8), 64))


def matmul(
    rows_JI: jax.Array,
    weight_GIO: jax.Array,
    rows: SortedRows,
    block: int,
    transpose: bool = False,
    into: jax.Array | None = None,
    blocks: tuple[int, ...] = BLOCKS_PER_PRODUCT,
) -> jax.Array:
    """[J, O]: each row times the matrix of its expert.

    Args:
      rows_JI: rows of no expert must be zeros, and stay so.
      weight_GIO: a matrix per expert; [G, O, I] if `transpose`.
      rows: from `sort_rows`.
      block: rows per block.
      transpose: multiply by the transposed matrices.
      into: [J, O], not needed afterwards, with zeros in rows of no expert: its memory is used, and
        need not be cleared.
      blocks: that a product takes at once, falling to 1.
    """
    if into is None:
        width = weight_GIO.shape[1 if transpose else 2]
        into = jnp.zeros_like(rows_JI, shape=(rows_JI.shape[0], width))

    def expert(out, given):
        weight, start, count = given

        def multiply(done, size, out):
            here = lax.dynamic_slice_in_dim(rows_JI, start + done, size)
            # Transposed here, or the loop would carry a copy.
            here = here @ (weight.T if transpose else weight)
            return lax.dynamic_update_slice_in_dim(out, here, start + done, 0)

        done = jnp.zeros_like(count)
        for size in (n * block for n in blocks):
            if size > len(rows_JI):
                continue  # a slice of more rows than there are is an error, though it would never run

            def go_on(carry, size=size):
                return count - carry[0] > size - block

            def step(carry, size=size):
                done, out = carry
                return done + size, multiply(done, size, out)

            done, out = lax.while_loop(go_on, step, (done, out))
        return out, None

    return lax.scan(expert, into, (weight_GIO, rows.start_G, rows.count_G))[0]


def weight_gradient(
    rows_JI: jax.Array,
    rows_JO: jax.Array,
    rows: SortedRows,
    block: int,
    blocks: int = BLOCKS_PER_GRADIENT,
) -> jax.Array:
    """float32 [G, I, O]: sum over an expert's rows of their outer products."""
    zeros_IO = jnp.zeros_like(rows_JI, jnp.float32, shape=(rows_JI.shape[1], rows_JO.shape[1]))
    blocks = min(blocks, len(rows_JI) // block)
    most = blocks * block

    def product(start, count, size):
        """Of `size` rows from `start` on, of which only the first `count` count."""
        left = lax.dynamic_slice_in_dim(rows_JI, start, size)
        right = lax.dynamic_slice_in_dim(rows_JO, start, size)
        counts = (jnp.arange(size) < count)[:, None]
        if left.shape[1] < right.shape[1]:
            left = jnp.where(counts, left, 0)
        else:
            right = jnp.where(counts, right, 0)
        return jnp.einsum("ji,jo->io", left, right, preferred_element_type=jnp.float32)

    def expert(_, given):
        start, count = given
        whole = count // most * most
        # What does not fill all blocks comes first: a product that is added to nothing, and for
        # most experts the only one.
        branches = [lambda: zeros_IO]
        for n in range(1, blocks + 1):
            branches.append(functools.partial(product, start + whole, count - whole, n * block))
        total_IO = lax.switch((count - whole + block - 1) // block, branches)

        def add(carry):
            done, total_IO = carry
            return done + most, total_IO + product(start + done, most, most)

        first = jnp.zeros_like(count), total_IO
        return None, lax.while_loop(lambda carry: carry[0] < whole, add, first)[1]

    return lax.scan(expert, None, (rows.start_G, rows.count_G))[1]


@dataclasses.dataclass(frozen=True)
class CpuGroupedMatmul:
    """The method of sorted_rows.py for rows of `sort_rows`."""

    block: int  # rows per block, as the rows have it

    def products(self, rows: SortedRows) -> Products:
        """Those of these rows. LoRA's factors have few FLOPs, so that one size of product does."""
        multiply = functools.partial(_multiply, rows, self.block, BLOCKS_PER_PRODUCT)
        narrow = functools.partial(_multiply, rows, self.block, (1,))
        outer = functools.partial(weight_gradient, rows=rows, block=self.block)
        return Products(
            multiply,
            outer,
            narrow,
            functools.partial(outer, blocks=1),
            functools.partial(_largest, rows),
            functools.partial(_of_expert, rows),
        )


def _multiply(rows, block, blocks, rows_JI, weight_GIO, transpose=False, into=None):
    return matmul(rows_JI, weight_GIO, rows, block, transpose, into, blocks)


def _largest(rows: SortedRows, rows_JI: jax.Array) -> jax.Array:
    zeros_GI = jnp.zeros_like(rows_JI, shape=(len(rows.count_G), rows_JI.shape[1]))
    return zeros_GI.at[_expert(rows, len(rows_JI))].max(jnp.abs(rows_JI), mode="drop")


def _of_expert(rows: SortedRows, of_GI: jax.Array) -> jax.Array:
    return of_GI.at[_expert(rows, len(rows.assignment_J))].get(mode="clip")


def _expert(rows: SortedRows, size: int) -> jax.Array:
    """int32 [J]: the expert of each row; G where it is nobody's."""
    end_G = rows.start_G + rows.count_G
    row_J = jnp.arange(size, dtype=jnp.int32)
    return jnp.searchsorted(end_G, row_J, side="right").astype(jnp.int32)
