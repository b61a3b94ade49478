"""The largest of many numbers, exactly: `lax.top_k` without a sort of all of them.

XLA sorts whole rows for `lax.top_k` on GPUs, and walks them with a heap on one core of a CPU. Here rows are
cut into blocks. Those of the K largest maxima hold the K largest numbers: an element of any other block is
smaller than the maxima of these K blocks, or equal to one that stands before it. So two rows of about
sqrt(V K) numbers are sorted in place of one of V.

Shape letters: C rows, V numbers of each, N blocks of L numbers, K that are wanted.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

FEW = 128  # numbers for each that is wanted: of fewer a CPU's heap is as fast in one go


def largest(a_CV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest numbers of each row and their places, as `lax.top_k`: by falling size, of equal
    ones the first (of 0.0 and -0.0, either).

    Returns:
      [C, K] in the dtype of a_CV; int32 [C, K].
    """
    rows, size = a_CV.shape
    length = block_length(size, count)
    if length == 1:
        return lax.top_k(a_CV, count)
    blocks = -(-size // length)
    # What fills up the last block comes after everything else, equal numbers included.
    padded_CV = jnp.pad(a_CV, ((0, 0), (0, blocks * length - size)), constant_values=-jnp.inf)
    a_CNL = padded_CV.reshape(rows, blocks, length)
    _, block_CK = lax.top_k(jnp.max(a_CNL, axis=2), count)
    block_CK = jnp.sort(block_CK, axis=1)  # places keep their order, which decides between equals
    found_CKL = jnp.take_along_axis(a_CNL, block_CK[:, :, None], axis=1)
    values_CK, place_CK = lax.top_k(found_CKL.reshape(rows, -1), count)
    block_CK = jnp.take_along_axis(block_CK, place_CK // length, axis=1)
    return values_CK, (block_CK * length + place_CK % length).astype(jnp.int32)


def block_length(size: int, count: int) -> int:
    """L, a power of two: the two sorted rows are of about the same length. 1: one sort of all is as fast."""
    if size <= FEW * count:
        return 1
    return 1 << round(math.log2(math.sqrt(size / count)))
