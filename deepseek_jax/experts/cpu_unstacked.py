"""Experts as one array each, where all of them are on one CPU: how generation holds their weights.

A slice of stacked weights by an index that the router gives would be copied before it is
multiplied: three times the bytes, and bytes are what decoding costs. A `lax.switch` whose branches
each hold one expert reads the weights where they are, and only those of chosen experts.

Shape letters: rounds.py, cpu_grouped_matmul.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.experts import cpu_grouped_matmul, sorted_rows

# up to so many tokens each chosen expert computes all of them: reading it takes longer than the
# products
FEW = 16
BLOCK = 64  # most rows of a block, for more tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedExperts:
    """One of the two weights of a layer's experts: the value of a variable in place of an array [E, ...]."""

    arrays: tuple[jax.Array, ...]  # E of them: [D, 2F], gate first, or [F, D]

    @property
    def ndim(self) -> int:
        """Of the stacked array."""
        return self.arrays[0].ndim + 1


def compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    expert_TK: jax.Array,
    gate_up: UnstackedExperts,
    down: UnstackedExperts,
) -> jax.Array:
    """Sum over each token's choices of weight * expert(x), on one device.

    Args:
      x_TD: tokens, in the compute dtype.
      weight_TK: float32, weights of the choices.
      expert_TK: int32 in [0, E]; E means nowhere.
      gate_up: E matrices [D, 2F].
      down: E matrices [F, D].

    Returns:
      [T, D] in the dtype of x_TD.
    """
    branches = [
        functools.partial(_expert, g, d) for g, d in zip(gate_up.arrays, down.arrays, strict=True)
    ]
    method = _expert_by_expert if len(x_TD) <= FEW else _block_by_block
    return method(x_TD, weight_TK, expert_TK, branches).astype(x_TD.dtype)


def _expert(gate_up: jax.Array, down: jax.Array, x_TD: jax.Array) -> jax.Array:
    gate_TF, up_TF = jnp.split(x_TD @ gate_up.astype(x_TD.dtype), 2, axis=1)
    return (jax.nn.silu(gate_TF) * up_TF) @ down.astype(x_TD.dtype)


def _expert_by_expert(x_TD, weight_TK, expert_TK, branches):
    """Every expert that any token chose, once, for all tokens."""
    experts = len(branches)
    if len(x_TD) == 1:  # its choices are distinct, and if it is padding all of them are nowhere
        chosen = expert_TK[0]
        count = jnp.sum(chosen < experts)
    else:
        is_chosen_E = jnp.any(expert_TK.reshape(-1, 1) == jnp.arange(experts), axis=0)
        chosen = jnp.argsort(~is_chosen_E, stable=True)
        count = jnp.sum(is_chosen_E)

    def add(carry):
        i, y_TD = carry
        weight_T = jnp.sum(jnp.where(expert_TK == chosen[i], weight_TK, 0), axis=1)
        out_TD = lax.switch(chosen[i], branches, x_TD)
        return i + 1, y_TD + out_TD.astype(jnp.float32) * weight_T[:, None]

    start = jnp.zeros_like(count), jnp.zeros_like(x_TD, jnp.float32)
    return lax.while_loop(lambda carry: carry[0] < count, add, start)[1]


def _block_by_block(x_TD, weight_TK, expert_TK, branches):
    """Rows sorted by expert, in blocks.

    A block's last rows may be the next expert's: that one's blocks come after and write them again.
    """
    (tokens, top_k), experts = expert_TK.shape, len(branches)
    block = min(BLOCK, max(8, 1 << (tokens * top_k // experts).bit_length()))
    rows = cpu_grouped_matmul.sort_rows(expert_TK, experts, block)
    x_JD = sorted_rows.take(x_TD, rows, top_k)
    end_E = jnp.cumsum(-(-rows.count_G // block))  # blocks of each expert and those before it

    def multiply(carry):
        i, out_JD = carry
        expert = jnp.searchsorted(end_E, i, side="right", method="compare_all").astype(jnp.int32)
        nth = i - end_E[expert] + -(-rows.count_G[expert] // block)
        first = rows.start_G[expert] + nth * block
        here = lax.switch(expert, branches, lax.dynamic_slice_in_dim(x_JD, first, block))
        return i + 1, lax.dynamic_update_slice_in_dim(out_JD, here, first, 0)

    start = jnp.zeros_like(end_E[-1]), jnp.zeros_like(x_JD)
    out_JD = lax.while_loop(lambda carry: carry[0] < end_E[-1], multiply, start)[1]
    return sorted_rows.combine(out_JD, rows, weight_TK)
