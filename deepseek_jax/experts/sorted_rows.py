"""Experts on a device that has all of them: rows sorted by expert, without rounds and without places.

Every assignment of a token to an expert is a row; a grouped matmul (cpu_grouped_matmul.py on CPUs,
grouped_matmul.py on GPUs) multiplies each by the matrices of its expert. So work follows the routing, however
skewed, and memory does not depend on it. Rows are gathered before the products, from tokens to rows and back,
so sums have one order and results do not depend on scheduling.

Shape letters: swiglu.py; T tokens, K experts per token, M = T*K assignments.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import swiglu
from deepseek_jax.experts.low_rank import ExpertWeights


class Rows(Protocol):
    """Where the assignments are among the rows."""

    @property
    def row_TK(self) -> jax.Array:
        """int32: J where an assignment goes nowhere."""

    @property
    def assignment_J(self) -> jax.Array:
        """int32: token * K + choice; M where a row is empty."""


class Method(Protocol):
    """A way to multiply sorted rows; equal ones are one program."""

    def products(self, rows: Any) -> swiglu.Products:
        """The products of these `Rows`, which were made for the method."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    rows: Rows,
    method: Method,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x), all experts being here.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      weights: of all experts.
      rows: a pytree, made for the method.
      method: how rows are multiplied.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, weights, rows, method)[0]


def _forward(x_TD, weight_TK, weights, rows, method):
    products = method.products(rows)
    with jax.named_scope("dispatch"):
        x_JD = take(x_TD, rows, weight_TK.shape[1])
    with jax.named_scope("experts"):
        hidden = checkpoint_name(swiglu.hidden(products, x_JD, weights), "experts_hidden")
        out_JD = swiglu.output(products, hidden, weights, into=x_JD)
    with jax.named_scope("combine"):
        y_TD = combine(out_JD, rows, weight_TK).astype(x_TD.dtype)
    return y_TD, (x_TD, weight_TK, weights, rows, hidden)


def _backward(method, residuals, dy_TD):
    x_TD, weight_TK, weights, rows, hidden = residuals
    top_k = weight_TK.shape[1]
    products = method.products(rows)
    with jax.named_scope("dispatch"):
        x_JD, dy_JD = take(x_TD, rows, top_k), take(dy_TD, rows, top_k)
        w_J1 = weight_TK.reshape(-1).at[rows.assignment_J].get(mode="fill", fill_value=0)[:, None]
    with jax.named_scope("experts"):
        dx_JD, dw_J1, dweights = swiglu.gradients(products, x_JD, hidden, dy_JD, w_J1, weights)
    with jax.named_scope("combine"):
        dx_TD = combine(dx_JD, rows, None).astype(x_TD.dtype)
        dw_TK = dw_J1[:, 0].at[rows.row_TK].get(mode="fill", fill_value=0)
    # Integers have no gradient.
    drows = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), rows)
    dweights = jax.tree.map(lambda g, w: g.astype(w.dtype), dweights, weights)
    return dx_TD, dw_TK.astype(weight_TK.dtype), dweights, drows


compute.defvjp(_forward, _backward)


def take(a_TD: jax.Array, rows: Rows, top_k: int) -> jax.Array:
    """[J, D]: the token of each row, zeros in empty ones."""
    return a_TD.at[rows.assignment_J // top_k].get(mode="fill", fill_value=0)


def combine(rows_JD: jax.Array, rows: Rows, weight_TK: jax.Array | None) -> jax.Array:
    """float32 [T, D]: the sum of each token's rows, times their weights; None: 1.

    Rows of no assignment are not read: kernels may leave anything in them.
    """
    total = 0.0
    for k in range(rows.row_TK.shape[1]):
        here_TD = rows_JD.at[rows.row_TK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total = total + (here_TD if weight_TK is None else here_TD * weight_TK[:, k, None])
    return total
