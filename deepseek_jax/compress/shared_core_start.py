"""Where the fit of a shared core begins, in closed form: the mean of the experts, and for each expert the
best wrappers around it, one side after the other.

With the outer side fixed, a wrapper is a reduced-rank regression: of all P Q^T of rank R the one that
minimises |T - M P Q^T| is known (Eckart and Young, after T is projected onto what M can reach). Each side is
therefore the best there is given the other, and the loss never rises. MoE_Factorize_Compress begins with the
mean alone (U = 0), which its thousand steps of Adam must find the way from.

Shape letters: E experts, I inputs and O outputs of a projection, R the rank; A, B, C, K sides of any matrix.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.shared_core import EXACT

# Directions in which the core is weaker than this share of its strongest are not used: reaching through them
# takes wrappers of a thousand times the size, and the eigenvalues of a float32 Gram matrix end at 1e-7.
WEAKEST = 2e-3


class Factors(NamedTuple):
    """One projection of all experts of a layer: the arguments of `model.shared_core.product`, float32."""

    core_IO: jax.Array
    u_in_EIR: jax.Array
    v_in_EIR: jax.Array
    u_out_EOR: jax.Array
    v_out_EOR: jax.Array


def guide(weights_EIO: jax.Array, rank: int, key: jax.Array) -> Factors:
    """The start of MoE_Factorize_Compress: U of zeros, V of variance 1 / R."""
    e, i, o = weights_EIO.shape
    first, second = jax.random.split(key)
    v_in_EIR = jax.random.normal(first, (e, i, rank)) * rank**-0.5
    v_out_EOR = jax.random.normal(second, (e, o, rank)) * rank**-0.5
    zeros = jnp.zeros_like(v_in_EIR), jnp.zeros_like(v_out_EOR)
    return Factors(jnp.mean(weights_EIO, axis=0), zeros[0], v_in_EIR, zeros[1], v_out_EOR)


@functools.partial(jax.jit, static_argnames="rank")
def closed_form(weights_EIO: jax.Array, rank: int, key: jax.Array) -> Factors:
    """The start of the fit.

    Args:
      weights_EIO: float32.
      rank: R, at most I and O.
      key: of the directions of wrappers that are nothing yet.
    """
    begin = guide(weights_EIO, rank, key)
    _, i, o = weights_EIO.shape
    # First the side on which one wrapper reaches every matrix of rank R, if the core has full rank.
    sides = ("out", "in") if i <= o else ("in", "out")

    def of_one(given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w_IO, v_in_IR, v_out_OR = given
        made = {
            "in": (jnp.zeros_like(v_in_IR), v_in_IR),
            "out": (jnp.zeros_like(v_out_OR), v_out_OR),
        }
        for side in sides:
            u_in_IR, v_in_IR = made["in"]
            u_out_OR, v_out_OR = made["out"]
            if side == "out":
                m_IO = begin.core_IO + _mul(v_in_IR, _mul(u_in_IR.T, begin.core_IO))
                v, u = regression(m_IO, w_IO - m_IO, rank)
                made["out"] = alive(u, v, made["out"][1])
            else:
                m_IO = begin.core_IO + _mul(_mul(begin.core_IO, v_out_OR), u_out_OR.T)
                u, v = regression(m_IO.T, (w_IO - m_IO).T, rank)
                made["in"] = alive(u, v, made["in"][1])
        return *made["in"], *made["out"]

    found = jax.lax.map(of_one, (weights_EIO, begin.v_in_EIR, begin.v_out_EOR))
    return Factors(begin.core_IO, *found)


def regression(m_AB: jax.Array, t_AC: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(P [B, R], Q [C, R]) that minimise |t - m P Q^T|, the columns of both of the same length.

    Args:
      m_AB, t_AC: float32.
      rank: R.
    """
    a, b = m_AB.shape
    gram = _mul(m_AB, m_AB.T) if a <= b else _mul(m_AB.T, m_AB)
    values_K, vectors = jnp.linalg.eigh(gram)
    used_K = values_K > WEAKEST**2 * jnp.maximum(values_K[-1], 1e-30)
    inverse_K = jnp.where(used_K, 1 / jnp.where(used_K, values_K, 1), 0)
    if a <= b:
        reached_KC = _mul((vectors * used_K).T, t_AC)
        through_BK = _mul(m_AB.T, vectors * inverse_K)
    else:
        through_BK = vectors * jnp.sqrt(inverse_K)
        reached_KC = _mul(through_BK.T, _mul(m_AB.T, t_AC))
    k, c = reached_KC.shape
    if k <= c:
        _, vectors = jnp.linalg.eigh(_mul(reached_KC, reached_KC.T))
        first_KR = vectors[:, : -rank - 1 : -1]
        p_BR, q_CR = _mul(through_BK, first_KR), _mul(reached_KC.T, first_KR)
    else:
        _, vectors = jnp.linalg.eigh(_mul(reached_KC.T, reached_KC))
        q_CR = vectors[:, : -rank - 1 : -1]
        p_BR = _mul(through_BK, _mul(reached_KC, q_CR))
    return _balanced(p_BR, q_CR)


def _balanced(p_BR: jax.Array, q_CR: jax.Array) -> tuple[jax.Array, jax.Array]:
    p_R, q_R = (jnp.linalg.norm(x, axis=0) for x in (p_BR, q_CR))
    scale_R = jnp.sqrt(jnp.where((p_R > 0) & (q_R > 0), q_R / jnp.where(p_R > 0, p_R, 1), 0))
    return p_BR * scale_R, q_CR / jnp.where(scale_R > 0, scale_R, jnp.inf)


def alive(u_WR: jax.Array, v_WR: jax.Array, random_WR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same wrappers, with a random V where a column is zero on both sides: no gradient would reach it."""
    dead_R = jnp.linalg.norm(v_WR, axis=0) < 1e-12
    return jnp.where(dead_R, 0, u_WR), jnp.where(dead_R, random_WR, v_WR)


def _mul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=EXACT)
