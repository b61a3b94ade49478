"""Experts at work where nothing is exchanged, on a CPU: each expert's rows in blocks, and only as many blocks as there are rows.

The assignments are sorted by expert into one array of rows, without gaps. A matmul walks over it expert by expert, in whole blocks: what
an expert's last block has of the next one's rows, that one writes again; only a sum over rows has to leave them out. So work
follows the routing, however skewed, memory does not depend on it, and there are no rounds. XLA's `ragged_dot` would multiply
every row by every expert on a CPU; batched matmuls over equal slots (experts/rounds.py) work on empty places too.

Shape letters: T tokens, K experts per token, M = T*K assignments, G experts here, R = M + block rows, the last of which are
zeros; D hidden_size, F expert width, P gate and up; I inner and O outer width of any matmul.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts.rounds import sort_by_expert

SIZES = (4, 2, 1)  # blocks that are one product, where an expert has rows in all of them
PIECES = 8  # blocks that one product of a weight gradient takes, at most


class Rows(NamedTuple):
    """Where the assignments are among the rows."""

    row_TK: jax.Array  # int32: R where it goes nowhere
    assignment_R: jax.Array  # int32: token * K + choice; M where a row is empty
    start_G: jax.Array  # int32: first row of each expert
    count_G: jax.Array  # int32: assignments of each expert


def lay_out(expert_TK: jax.Array, experts: int, block: int) -> Rows:
    """Rows of assignments to experts in [0, experts]; `experts` itself means nowhere. Within an expert in token order."""
    m, size = expert_TK.size, expert_TK.size + block
    order_M, bound, rank_TK = sort_by_expert(expert_TK, experts)
    row_TK = jnp.where(expert_TK < experts, bound.at[expert_TK].get(mode="clip") + rank_TK, size)
    assignment_R = jnp.where(jnp.arange(size) < bound[-1], jnp.pad(order_M, (0, block)), m)
    return Rows(row_TK, assignment_R, bound[:-1], jnp.diff(bound))


def block_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows of a block: at most a quarter of an expert's mean load, so that about a tenth of the work is on empty rows."""
    mean = tokens * top_k / experts
    return int(min(max(2 ** int(np.log2(max(mean, 1) / 4)), 8), 64))


def matmul(
    rows_RI: jax.Array,
    weight_GIO: jax.Array,
    rows: Rows,
    block: int,
    transpose: bool = False,
    into: jax.Array | None = None,
) -> jax.Array:
    """[R, O]: each row times the matrix of its expert, or its transpose (weight [G, O, I]). Rows of no expert must be zeros, and stay so.

    `into` [R, O]: an array with zeros in rows of no expert, which is not needed afterwards: its memory is used, and need not be cleared.
    """
    if into is None:
        into = jnp.zeros_like(
            rows_RI, shape=(rows_RI.shape[0], weight_GIO.shape[1 if transpose else 2])
        )

    def expert(out, given):
        weight, start, count = given

        def multiply(done, size, out):
            here = lax.dynamic_slice_in_dim(rows_RI, start + done, size) @ (
                weight.T if transpose else weight
            )
            return lax.dynamic_update_slice_in_dim(out, here, start + done, 0)

        done = jnp.zeros_like(count)
        for size in (
            n * block for n in SIZES if n * block <= len(rows_RI)
        ):  # a larger slice would be an error, though it is never taken
            go_on = lambda c, size=size: count - c[0] > size - block
            step = lambda c, size=size: (c[0] + size, multiply(c[0], size, c[1]))
            done, out = lax.while_loop(go_on, step, (done, out))
        return out, None

    return lax.scan(expert, into, (weight_GIO, rows.start_G, rows.count_G))[0]


def weight_gradient(rows_RI: jax.Array, rows_RO: jax.Array, rows: Rows, block: int) -> jax.Array:
    """float32 [G, I, O]: sum over an expert's rows of their outer products."""
    zeros = jnp.zeros_like(rows_RI, jnp.float32, shape=(rows_RI.shape[1], rows_RO.shape[1]))
    pieces = min(PIECES, len(rows_RI) // block)
    most = pieces * block

    def products(start, count, size):
        """Of `size` rows, of which only the first `count` count."""
        left, right = (lax.dynamic_slice_in_dim(a, start, size) for a in (rows_RI, rows_RO))
        mine = (jnp.arange(size) < count)[:, None]
        left, right = (
            (jnp.where(mine, left, 0), right)
            if left.shape[1] < right.shape[1]
            else (left, jnp.where(mine, right, 0))
        )
        return jnp.einsum("ri,ro->io", left, right, preferred_element_type=jnp.float32)

    def expert(_, given):
        start, count = given
        whole = count // most * most
        # What does not fill all the pieces first: a product that nothing needs to be added to, and for most experts the only one.
        branches = [
            lambda: zeros,
            *(
                functools.partial(products, start + whole, count - whole, n * block)
                for n in range(1, pieces + 1)
            ),
        ]
        total = lax.switch((count - whole + block - 1) // block, branches)
        add = lambda c: (c[0] + most, c[1] + products(start + c[0], most, most))
        return None, lax.while_loop(lambda c: c[0] < whole, add, (jnp.zeros_like(count), total))[1]

    return lax.scan(expert, None, (rows.start_G, rows.count_G))[1]


def take(a_TD: jax.Array, rows: Rows, top_k: int) -> jax.Array:
    """[R, D]: the token of each row, zeros in empty ones."""
    return a_TD.at[rows.assignment_R // top_k].get(mode="fill", fill_value=0)


def collect(rows_RD: jax.Array, rows: Rows, weight_TK: jax.Array | None) -> jax.Array:
    """float32 [T, D]: the sum of each token's rows, times their weights."""
    total = 0.0
    for k in range(rows.row_TK.shape[1]):
        here_TD = rows_RD.at[rows.row_TK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total = total + (here_TD if weight_TK is None else here_TD * weight_TK[:, k, None])
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    gate_up_GDPF: jax.Array,
    down_GFD: jax.Array,
    rows: Rows,
    block: int,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x), all experts being here.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      gate_up_GDPF: [G, D, 2, F], gate first; down_GFD: [G, F, D]: all experts, in the compute dtype.
      rows: from `lay_out`, with the same block.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, gate_up_GDPF, down_GFD, rows, block)[0]


def _flat(gate_up_GDPF: jax.Array) -> jax.Array:
    return gate_up_GDPF.reshape(*gate_up_GDPF.shape[:2], -1)


def _forward(x_TD, weight_TK, gate_up, down, rows, block):
    top_k = weight_TK.shape[1]
    with jax.named_scope("dispatch"):
        x_RD = take(x_TD, rows, top_k)
    with jax.named_scope("experts"):
        hidden = checkpoint_name(matmul(x_RD, _flat(gate_up), rows, block), "experts_hidden")
        gate_RF, up_RF = jnp.split(hidden, 2, axis=1)
        out_RD = matmul(jax.nn.silu(gate_RF) * up_RF, down, rows, block, into=x_RD)
    with jax.named_scope("combine"):
        y_TD = collect(out_RD, rows, weight_TK).astype(x_TD.dtype)
    return y_TD, (x_TD, weight_TK, gate_up, down, rows, hidden)


def _backward(block, residuals, dy_TD):
    x_TD, weight_TK, gate_up, down, rows, hidden = residuals
    top_k = weight_TK.shape[1]
    with jax.named_scope("dispatch"):
        x_RD, dy_RD = take(x_TD, rows, top_k), take(dy_TD, rows, top_k)
        w_R1 = weight_TK.reshape(-1).at[rows.assignment_R].get(mode="fill", fill_value=0)[:, None]
    with jax.named_scope("experts"):
        gate_RF, up_RF = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        sig_RF = jax.nn.sigmoid(gate_RF)
        act_RF = gate_RF * sig_RF * up_RF
        dact_RF = matmul(dy_RD, down, rows, block, transpose=True).astype(jnp.float32)
        dw_R = jnp.sum(dact_RF * act_RF, axis=1)
        dact_RF = dact_RF * w_R1
        dhidden = jnp.concatenate(
            [dact_RF * up_RF * sig_RF * (1 + gate_RF * (1 - sig_RF)), dact_RF * gate_RF * sig_RF],
            axis=1,
        ).astype(x_TD.dtype)
        ddown = weight_gradient((act_RF * w_R1).astype(x_TD.dtype), dy_RD, rows, block)
        dgate_up = weight_gradient(x_RD, dhidden, rows, block).reshape(gate_up.shape)
        dx_RD = matmul(dhidden, _flat(gate_up), rows, block, transpose=True, into=dy_RD)
    with jax.named_scope("combine"):
        dx_TD = collect(dx_RD, rows, None).astype(x_TD.dtype)
        dw_TK = dw_R.at[rows.row_TK].get(mode="fill", fill_value=0).astype(weight_TK.dtype)
    drows = jax.tree.map(
        lambda a: np.zeros(a.shape, jax.dtypes.float0), rows
    )  # integers have no gradient
    return dx_TD, dw_TK, dgate_up.astype(gate_up.dtype), ddown.astype(down.dtype), drows


compute.defvjp(_forward, _backward)
