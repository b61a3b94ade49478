"""What LoRA adds to the two products of an expert, and the gradients of its factors.

An expert's update of a weight W [I, O] is scale * A B, with A [I, R] and B [R, O]. It is never multiplied
out: a row x adds (x A) B to x W, 2 R (I + O) FLOPs in place of the 2 I O of W, and the gradient of W, a third
of an expert's training FLOPs, is not made at all, since nobody asks for it. Multiplied out it would be E D F
numbers and 2 E R D F FLOPs per layer and pass, whatever the tokens, and the gradient of the product as large
as full training's.

Every way that experts are computed on a device (swiglu.py says which) hands in its own products, so that the
formulas stand here once:

    mul(rows, weights [G, I, O], transpose)   rows times the matrix of their expert, or its transpose
    outer(rows, other rows)                   float32 [G, I, O]: the sum of an expert's outer products

Shape letters: swiglu.py, and R the rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Multiply = Callable[..., jax.Array]
Outer = Callable[[jax.Array, jax.Array], jax.Array]


class Pair(NamedTuple):
    """The factors of this device's experts in the compute dtype, A times the scale: of gate and up together
    [G, D, 2, R] and [G, 2, R, F], of down [G, F, R] and [G, R, D].
    """

    a: jax.Array
    b: jax.Array


class ExpertWeights(NamedTuple):
    """This device's experts, in the compute dtype."""

    gate_up_GDPF: jax.Array  # [G, D, 2, F], gate first
    down_GFD: jax.Array
    gate_up_lora: Pair | None = None  # what LoRA adds to them, if anything
    down_lora: Pair | None = None


def gate_up(mul: Multiply, x: jax.Array, pair: Pair) -> jax.Array:
    """[..., 2F], gate first: what is added to the rows [..., D] times gate and up."""
    return mul(mul(x, _flat(pair.a)), _block_diagonal(pair.b))


def gate_up_gradients(
    mul: Multiply, outer: Outer, x: jax.Array, dhidden: jax.Array, pair: Pair
) -> tuple[jax.Array, Pair]:
    """(what is added to the gradient of the rows, float32 gradients of the factors).

    Args:
      mul, outer: products of rows.
      x: [..., D].
      dhidden: [..., 2F], of gate and up.
      pair: the factors.
    """
    a, (_, _, r, f) = _flat(pair.a), pair.b.shape
    low = mul(x, a)
    dlow = mul(dhidden, _block_diagonal(pair.b), transpose=True)
    da = outer(x, dlow).reshape(pair.a.shape)
    db = outer(low, dhidden)
    db = jnp.stack([db[:, :r, :f], db[:, r:, f:]], axis=1)
    return mul(dlow, a, transpose=True), Pair(da, db)


def down(mul: Multiply, act: jax.Array, pair: Pair) -> jax.Array:
    """[..., D]: what is added to the rows [..., F] times down."""
    return mul(mul(act, pair.a), pair.b)


def down_transposed(mul: Multiply, dy: jax.Array, pair: Pair) -> tuple[jax.Array, jax.Array]:
    """(what is added to dy [..., D] times down transposed, dy B^T [..., R])."""
    dlow = mul(dy, pair.b, transpose=True)
    return mul(dlow, pair.a, transpose=True), dlow


def down_gradients(
    mul: Multiply, outer: Outer, act: jax.Array, dy: jax.Array, dlow: jax.Array, pair: Pair
) -> Pair:
    """Float32 gradients of the factors.

    Args:
      mul, outer: products of rows.
      act: [..., F], times the weight of each row.
      dy: [..., D], without it.
      dlow: of `down_transposed`.
      pair: the factors.
    """
    return Pair(outer(act, dlow), outer(mul(act, pair.a), dy))


def _block_diagonal(b_GPRF: jax.Array) -> jax.Array:
    """[G, 2R, 2F]: one product in place of two, at the cost of R F zeros twice."""
    gate, up = b_GPRF[:, 0], b_GPRF[:, 1]
    zeros = jnp.zeros_like(gate)
    rows = [jnp.concatenate(halves, axis=2) for halves in ((gate, zeros), (zeros, up))]
    return jnp.concatenate(rows, axis=1)


def _flat(a_GDPR: jax.Array) -> jax.Array:
    return a_GDPR.reshape(*a_GDPR.shape[:2], -1)
