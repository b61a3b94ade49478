"""Rows of a table, with a gradient whose sums have one order. Shape letters: layers.py.

The transpose of a look-up adds up a row for every occurrence of an index. XLA's scatter does that on a GPU
by atomic additions, in whatever order its threads come to them: the last bits of the embedding's gradient,
and some steps later the losses, would differ between two runs of one program. (XLA's option
xla_gpu_enable_scatter_determinism_expander sorts T*D numbers instead of T rows.) A CPU's scatter goes
through the rows one after another.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import on_cpu

BLOCK = 128  # rows


def rows(table_VD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """table_VD[index_BS], for indices in [0, V)."""
    if on_cpu():
        return table_VD[index_BS]
    size = table_VD.shape[0]

    @jax.custom_vjp
    def look_up(table_VD, index_BS):
        return table_VD[index_BS]

    def backward(index_BS, dout_BSD):
        return summed(dout_BSD.reshape(-1, dout_BSD.shape[-1]), index_BS.reshape(-1), size), None

    look_up.defvjp(lambda table_VD, index_BS: (table_VD[index_BS], index_BS), backward)
    return look_up(table_VD, index_BS)


def summed(row_TD: jax.Array, index_T: jax.Array, size: int) -> jax.Array:
    """[size, D]: the sum of the rows of every index in [0, size), zeros where it has none.

    Rows are sorted by index and added up by products with matrices of zeros and ones: first within blocks of
    BLOCK rows, then over the blocks that an index goes on through. Such sums have the order of the product's
    kernel. (`lax.associative_scan` would need no products, but XLA fuses its levels into kernels that take
    minutes to compile.)
    """
    t, width = row_TD.shape
    blocks = -(-t // BLOCK)
    padding = blocks * BLOCK - t
    index_T = jnp.pad(index_T, (0, padding), constant_values=size)
    row_TD = jnp.pad(row_TD, ((0, padding), (0, 0)))
    order_T = jnp.argsort(index_T, stable=True)
    index_T = index_T[order_T]
    index_nB, row_nBD = (
        index_T.reshape(blocks, BLOCK),
        row_TD[order_T].reshape(blocks, BLOCK, width),
    )
    dot = functools.partial(
        jnp.matmul, precision=lax.Precision.HIGHEST
    )  # not TF32, which rounds to 10 bits

    same_nBB = (index_nB[:, :, None] == index_nB[:, None, :]) & jnp.tri(BLOCK, dtype=bool)
    sum_nBD = dot(
        same_nBB.astype(row_TD.dtype), row_nBD
    )  # of an index's rows in the block, up to each row
    first_n, last_n = index_nB[:, 0], index_nB[:, -1]
    goes_on_nn = (first_n[:, None] == last_n[None, :]) & jnp.tri(blocks, k=-1, dtype=bool)
    before_nD = dot(goes_on_nn.astype(row_TD.dtype), sum_nBD[:, -1])
    sum_nBD += jnp.where((index_nB == first_n[:, None])[:, :, None], before_nD[:, None], 0)

    # The last row of an index has its sum; the others go nowhere, each to a place of its own: unique.
    ends_T = jnp.pad(index_T[1:] != index_T[:-1], (0, 1), constant_values=True) & (index_T < size)
    place_T = jnp.where(ends_T, index_T, size + jnp.arange(index_T.shape[0], dtype=index_T.dtype))
    zeros = jnp.zeros((size, width), row_TD.dtype)
    rows_TD = sum_nBD.reshape(-1, width)
    return zeros.at[place_T].set(rows_TD, mode="drop", unique_indices=True)
