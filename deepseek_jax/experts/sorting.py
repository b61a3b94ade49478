"""Assignments of tokens to experts, sorted by expert.

Shape letters: T tokens, K experts per token, M = T*K assignments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import on_cpu


class SortedAssignments(NamedTuple):
    """Assignments sorted by expert, and within an expert in token order; G experts."""

    order_M: jax.Array  # int32: assignment (token * K + choice) at each sorted position
    rank_TK: jax.Array  # int32: an assignment's rank among those of its expert
    expert_TK: jax.Array  # int32: G for assignments that go nowhere: padding, dropped ones
    start_G: jax.Array  # int32: first sorted position of each expert
    count_G: jax.Array  # int32: assignments of each expert


def sort_assignments(expert_TK: jax.Array, experts: int) -> SortedAssignments:
    """Of int32 choices in [0, experts]; `experts` itself means nowhere."""
    order_M, bound, rank_TK = sort_by_expert(expert_TK, experts)
    return SortedAssignments(order_M, rank_TK, expert_TK, bound[:-1], jnp.diff(bound))


def sort_by_expert(
    expert_TK: jax.Array, experts: int, weight_TK: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by expert; within an expert by falling weight if weights are given; then by position.

    Args:
      expert_TK: int32, each in [0, experts]; `experts` itself means nowhere.
      experts: their number.
      weight_TK: float32.

    Returns:
      order_M: int32, the assignment at each sorted position.
      bound: int32 [experts + 1], the first sorted position of each expert, and of nowhere.
      rank_TK: int32, an assignment's rank among those of its expert.
    """
    m = expert_TK.size
    expert_M = expert_TK.reshape(m)
    if weight_TK is not None:
        order_M = jnp.lexsort((-weight_TK.reshape(m), expert_M)).astype(jnp.int32)
        sorted_M = expert_M[order_M]
    elif m * (experts + 1) < 2**31:
        # One sort of packed keys is several times faster than argsort and scatter. They differ, so that
        # stability, for which GPUs sort a second array, has no meaning.
        key_M = jnp.sort(expert_M * m + jnp.arange(m, dtype=jnp.int32), stable=False)
        order_M, sorted_M = key_M % m, key_M // m
    else:
        order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
        sorted_M = expert_M[order_M]
    # On a GPU bisection is a loop of some 17 turns, each several kernels; all comparisons are one kernel.
    method = "scan" if on_cpu() else "compare_all"
    bound = jnp.searchsorted(sorted_M, jnp.arange(experts + 1, dtype=jnp.int32), method=method)
    bound = bound.astype(jnp.int32)
    sorted_rank_M = jnp.arange(m, dtype=jnp.int32) - bound[sorted_M]
    rank_M = jnp.zeros_like(sorted_rank_M).at[order_M].set(sorted_rank_M, unique_indices=True)
    return order_M, bound, rank_M.reshape(expert_TK.shape)
