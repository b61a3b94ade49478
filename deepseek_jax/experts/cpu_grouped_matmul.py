"""Experts on a CPU that has all of them: a grouped matmul over rows sorted by expert.

There are no rounds, and no capacity to pad to. The assignments are sorted by expert into one array
of rows without gaps. A matmul walks over it expert by expert, in whole blocks. The last block of an
expert also covers rows of the next one, which writes them again; only sums over rows have to leave
them out. So work follows the routing, however skewed, and memory does not depend on it. On CPUs
XLA's `ragged_dot` would multiply every row by every expert, and batched matmuls over equal
capacities (rounds.py) work on empty places too.

Shape letters: T tokens, K experts per token, M = T*K assignments, G experts here, J = M + block
rows, the last of which are zeros; D hidden_size, F expert width, P gate and up; I inner and O outer
width of any matmul.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import low_rank
from deepseek_jax.experts.low_rank import ExpertWeights
from deepseek_jax.experts.rounds import sort_by_expert

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


def take(a_TD: jax.Array, rows: SortedRows, top_k: int) -> jax.Array:
    """[J, D]: the token of each row, zeros in empty ones."""
    return a_TD.at[rows.assignment_J // top_k].get(mode="fill", fill_value=0)


def combine(rows_JD: jax.Array, rows: SortedRows, weight_TK: jax.Array | None) -> jax.Array:
    """float32 [T, D]: the sum of each token's rows, times their weights; None: 1."""
    total = 0.0
    for k in range(rows.row_TK.shape[1]):
        here_TD = rows_JD.at[rows.row_TK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total = total + (here_TD if weight_TK is None else here_TD * weight_TK[:, k, None])
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    rows: SortedRows,
    block: int,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x), all experts being here.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      weights: of all experts.
      rows: from `sort_rows`, with the same block.
      block: rows per block.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, weights, rows, block)[0]


def _flat(gate_up_GDPF: jax.Array) -> jax.Array:
    """[G, D, 2F]."""
    return gate_up_GDPF.reshape(*gate_up_GDPF.shape[:2], -1)


def _products(rows: SortedRows, block: int) -> tuple[low_rank.Multiply, low_rank.Outer]:
    """As low_rank.py wants them: few FLOPs each, so that one size of product does."""

    def multiply(rows_JI, weight_GIO, transpose=False):
        return matmul(rows_JI, weight_GIO, rows, block, transpose, blocks=(1,))

    def outer(rows_JI, rows_JO):
        return weight_gradient(rows_JI, rows_JO, rows, block, blocks=1)

    return multiply, outer


def _forward(x_TD, weight_TK, weights, rows, block):
    top_k = weight_TK.shape[1]
    multiply, _ = _products(rows, block)
    with jax.named_scope("dispatch"):
        x_JD = take(x_TD, rows, top_k)
    with jax.named_scope("experts"):
        hidden = matmul(x_JD, _flat(weights.gate_up_GDPF), rows, block)
        if weights.gate_up_lora:
            hidden = hidden + low_rank.gate_up(multiply, x_JD, weights.gate_up_lora)
        hidden = checkpoint_name(hidden, "experts_hidden")
        gate_JF, up_JF = jnp.split(hidden, 2, axis=1)
        act_JF = jax.nn.silu(gate_JF) * up_JF
        out_JD = matmul(act_JF, weights.down_GFD, rows, block, into=x_JD)
        if weights.down_lora:
            out_JD = out_JD + low_rank.down(multiply, act_JF, weights.down_lora)
    with jax.named_scope("combine"):
        y_TD = combine(out_JD, rows, weight_TK).astype(x_TD.dtype)
    return y_TD, (x_TD, weight_TK, weights, rows, hidden)


def _backward(block, residuals, dy_TD):
    x_TD, weight_TK, weights, rows, hidden = residuals
    gate_up, down, gate_up_lora, down_lora = weights
    top_k = weight_TK.shape[1]
    multiply, outer = _products(rows, block)
    with jax.named_scope("dispatch"):
        x_JD, dy_JD = take(x_TD, rows, top_k), take(dy_TD, rows, top_k)
        w_J1 = weight_TK.reshape(-1).at[rows.assignment_J].get(mode="fill", fill_value=0)[:, None]
    with jax.named_scope("experts"):
        gate_JF, up_JF = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        sig_JF = jax.nn.sigmoid(gate_JF)
        act_JF = gate_JF * sig_JF * up_JF
        dact_JF = matmul(dy_JD, down, rows, block, transpose=True).astype(jnp.float32)
        if down_lora:
            more_JF, dlow_JR = low_rank.down_transposed(multiply, dy_JD, down_lora)
            dact_JF = dact_JF + more_JF
        dw_J = jnp.sum(dact_JF * act_JF, axis=1)
        dact_JF = dact_JF * w_J1
        dgate_JF = dact_JF * up_JF * sig_JF * (1 + gate_JF * (1 - sig_JF))
        dup_JF = dact_JF * gate_JF * sig_JF
        dhidden = jnp.concatenate([dgate_JF, dup_JF], axis=1).astype(x_TD.dtype)
        weighted_JF = (act_JF * w_J1).astype(x_TD.dtype)
        ddown = weight_gradient(weighted_JF, dy_JD, rows, block)
        dgate_up = weight_gradient(x_JD, dhidden, rows, block).reshape(gate_up.shape)
        dweights = ExpertWeights(dgate_up, ddown)
        if down_lora:
            args = weighted_JF, dy_JD, dlow_JR, down_lora
            dweights = dweights._replace(down_lora=low_rank.down_gradients(multiply, outer, *args))
        dx_JD = matmul(dhidden, _flat(gate_up), rows, block, transpose=True, into=dy_JD)
        if gate_up_lora:
            more_JD, dpair = low_rank.gate_up_gradients(
                multiply, outer, x_JD, dhidden, gate_up_lora
            )
            dx_JD = dx_JD + more_JD
            dweights = dweights._replace(gate_up_lora=dpair)
    with jax.named_scope("combine"):
        dx_TD = combine(dx_JD, rows, None).astype(x_TD.dtype)
        dw_TK = dw_J.at[rows.row_TK].get(mode="fill", fill_value=0).astype(weight_TK.dtype)
    # Integers have no gradient.
    drows = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), rows)
    dweights = jax.tree.map(lambda g, w: g.astype(w.dtype), dweights, weights)
    return dx_TD, dw_TK, dweights, drows


compute.defvjp(_forward, _backward)
