"""Rows in blocks of one expert each: the layout that grouped kernels multiply.

Rows are sorted by expert, and every expert's rows begin with a block. So a tile of a product needs one
matrix, no tile masks anything, and what is padded is the last block of an expert, half a block on average.
Blocks of no expert come last; kernels skip them and leave in them what was there.

Shape letters: T tokens, K experts per token, M = T*K assignments, G experts of this device, N blocks, J = N *
BLOCK rows; X devices on the expert axis, C capacity, S = X*G*C places (rounds.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.experts.sorting import SortedAssignments, sort_assignments

BLOCK = 128


class Blocks(NamedTuple):
    """Whose rows each block has."""

    expert_N: jax.Array  # int32: G where a block is nobody's
    first_G1: jax.Array  # int32 [G + 1]: the first block of each expert; last, how many have one


class BlockRows(NamedTuple):
    """Assignments as rows: sorted_rows.Rows, with the blocks."""

    row_TK: jax.Array  # int32: J where an assignment goes nowhere
    assignment_J: jax.Array  # int32: token * K + choice; M where a row is empty
    blocks: Blocks


class ArrivedRows(NamedTuple):
    """Places of a round as rows."""

    row_S: jax.Array  # int32: J where a place is empty
    place_J: jax.Array  # int32: S where a row is empty
    blocks: Blocks


def sort_rows(expert_TK: jax.Array, experts: int) -> BlockRows:
    """Rows of all assignments, sorted by expert, and within an expert in token order.

    Args:
      expert_TK: int32 in [0, experts]; `experts` itself means nowhere.
      experts: G.
    """
    everything = sort_assignments(expert_TK, experts)
    return some_rows(everything, jnp.zeros_like(everything.count_G[0]), expert_TK.size)


def some_rows(sorted_: SortedAssignments, first: jax.Array, most: int) -> BlockRows:
    """Rows of the assignments at sorted positions from `first` to `first + most`.

    Args:
      sorted_: all assignments.
      first: int32 [].
      most: rows that are there at most.
    """
    order_M, rank_TK, expert_TK, start_G, count_G = sorted_
    end_G = start_G + count_G
    begins_G, ends_G = (jnp.clip(a - first, 0, most) for a in (start_G, end_G))
    here_G = ends_G - begins_G
    before_G = jnp.clip(first - start_G, 0, count_G)  # ranks of assignments that came earlier
    blocks = _blocks_of(here_G, most)
    size = len(blocks.expert_N) * BLOCK
    nth_TK = rank_TK - before_G.at[expert_TK].get(mode="clip")
    is_here_TK = (nth_TK >= 0) & (nth_TK < jnp.pad(here_G, (0, 1))[expert_TK])
    row_TK = jnp.where(is_here_TK, blocks.first_G1[expert_TK] * BLOCK + nth_TK, size)
    expert_J, nth_J, is_filled_J = _ranks(blocks, here_G)
    position_J = (start_G + before_G).at[expert_J].get(mode="clip") + nth_J
    assignment_J = order_M.at[position_J].get(mode="clip")
    return BlockRows(row_TK, jnp.where(is_filled_J, assignment_J, order_M.size), blocks)


def rows_of_places(here_XG: jax.Array, capacity: int) -> ArrivedRows:
    """Rows of what arrived for this device's experts, sorted by expert, then by the device that sent it.

    Args:
      here_XG: int32, how many places of each device and expert are filled, from the first on.
      capacity: C, places of a device and expert; they lie as [X, G, C].
    """
    devices, experts = here_XG.shape
    places = devices * experts * capacity
    count_G = jnp.sum(here_XG, axis=0)
    blocks = _blocks_of(count_G, places)
    size = len(blocks.expert_N) * BLOCK
    through_XG = jnp.cumsum(here_XG, axis=0)
    before_XG = through_XG - here_XG
    nth_C = jnp.arange(capacity, dtype=jnp.int32)
    row_XGC = (before_XG + blocks.first_G1[:-1] * BLOCK)[:, :, None] + nth_C
    row_S = jnp.where(nth_C < here_XG[:, :, None], row_XGC, size).reshape(-1)
    expert_J, rank_J, is_filled_J = _ranks(blocks, count_G)
    through_XJ = through_XG.at[:, expert_J].get(mode="clip")
    source_J = jnp.sum(rank_J >= through_XJ, axis=0, dtype=jnp.int32)
    nth_J = rank_J - before_XG.at[source_J, expert_J].get(mode="clip")
    place_J = (source_J * experts + expert_J) * capacity + nth_J
    return ArrivedRows(row_S, jnp.where(is_filled_J, place_J, places), blocks)


def block_count(rows: int, experts: int) -> int:
    """N: as many blocks as rows can need, however they are divided among the experts."""
    fullest = min(experts, rows)  # experts that have rows, one in a block of its own each
    return max(1, (rows + fullest * (BLOCK - 1)) // BLOCK)


def _blocks_of(count_G: jax.Array, rows: int) -> Blocks:
    """Of experts with so many rows each.

    Args:
      count_G: int32.
      rows: the most that all experts together can have.
    """
    needed_G = (count_G + BLOCK - 1) // BLOCK
    first_G1 = jnp.pad(jnp.cumsum(needed_G), (1, 0)).astype(jnp.int32)
    block_N = jnp.arange(block_count(rows, len(count_G)), dtype=jnp.int32)
    expert_N = jnp.sum(block_N[:, None] >= first_G1[1:], axis=1, dtype=jnp.int32)
    return Blocks(expert_N, first_G1)


def _ranks(blocks: Blocks, count_G: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row: its expert (G: none), its rank among the expert's rows, and whether it is one of them."""
    expert_J = jnp.repeat(blocks.expert_N, BLOCK)
    first_J = blocks.first_G1[expert_J] * BLOCK
    rank_J = jnp.arange(len(expert_J), dtype=jnp.int32) - first_J
    count_J = jnp.pad(count_G, (0, 1))[expert_J]
    return expert_J, rank_J, rank_J < count_J
