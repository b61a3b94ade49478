"""An expert's SwiGLU on rows, and its gradients: what every way to compute experts has in common.

A way is how rows lie and how they are multiplied by the matrices of their experts; it hands in its `Products`
(rounds.py: batched; cpu_grouped_matmul.py, grouped_matmul.py: grouped), so that the formulas stand here once.
All numbers are in the compute dtype, but for gradients of weights and the elementwise part of backward, which
are float32.

Shape letters: J rows, G experts of this device, D hidden_size, P gate and up, F expert width (this device's
part of it, where a tensor axis divides it), I inner and O outer width of any product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.experts import low_rank
from deepseek_jax.experts.low_rank import ExpertWeights


class Products(NamedTuple):
    """Products of rows and experts.

    Attributes:
      multiply: (rows [J, I], weights [G, I, O], transpose=False, into=None, dtype=None) -> [J, O]: each row
        times the matrix of its expert, or, of gradients and weights [G, O, I], times the transposed one.
        `into`: an array [J, O] that is not needed afterwards; its memory may be used. `dtype`: of the result,
        where rows and weights are FP8.
      outer: (rows [J, I], gradients [J, O]) -> float32 [G, I, O]: the sum of an expert's outer products.
      low_multiply, low_outer: the same, for the narrow factors of LoRA.
      largest: rows [J, I] -> [G, I], the largest magnitude of each column among the rows of an expert.
      of_expert: [G, I] -> [J, I], those of each row's expert; anything in rows of nobody.
    """

    multiply: Callable[..., jax.Array]
    outer: low_rank.Outer
    low_multiply: low_rank.Multiply
    low_outer: low_rank.Outer
    largest: Callable[[jax.Array], jax.Array]
    of_expert: Callable[[jax.Array], jax.Array]


def hidden(products: Products, x_JD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """[J, 2F]: gate and up projections in one product, gate first."""
    out = products.multiply(x_JD, _flat(weights.gate_up_GDPF))
    if weights.gate_up_lora:
        out = out + low_rank.gate_up(products.low_multiply, x_JD, weights.gate_up_lora)
    return out


def output(
    products: Products, hidden: jax.Array, weights: ExpertWeights, into: jax.Array | None = None
) -> jax.Array:
    """[J, D]: silu(gate) * up times down.

    Args:
      products: of the rows.
      hidden: [J, 2F].
      weights: of this device's experts.
      into: as of `Products.multiply`.
    """
    gate_JF, up_JF = jnp.split(hidden, 2, axis=1)
    act_JF = jax.nn.silu(gate_JF) * up_JF
    out_JD = products.multiply(act_JF, weights.down_GFD, into=into)
    if weights.down_lora:
        out_JD = out_JD + low_rank.down(products.low_multiply, act_JF, weights.down_lora)
    return out_JD


def gradients(
    products: Products,
    x_JD: jax.Array,
    hidden: jax.Array,
    dy_JD: jax.Array,
    weight_J1: jax.Array,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """Gradients of rows, of the weights of their choices, and of the experts (float32).

    Args:
      products: of the rows.
      x_JD: the rows.
      hidden: [J, 2F], of `hidden`.
      dy_JD: gradients of the tokens' sums. Without the weights of the choices, so that a weight's gradient
        <dy, expert(x)> = <dy down^T, act> is found here and returns as one number per row: the results
        themselves need no second way.
      weight_J1: float32 weights of the choices.
      weights: of this device's experts.
    """
    gate_up, down, gate_up_lora, down_lora = weights
    low = products.low_multiply, products.low_outer
    dtype = x_JD.dtype
    gate_JF, up_JF = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    sig_JF = jax.nn.sigmoid(gate_JF)
    act_JF = gate_JF * sig_JF * up_JF
    dact_JF = products.multiply(dy_JD, down, transpose=True).astype(jnp.float32)
    if down_lora:
        more_JF, dlow_JR = low_rank.down_transposed(products.low_multiply, dy_JD, down_lora)
        dact_JF = dact_JF + more_JF
    dweight_J1 = jnp.sum(dact_JF * act_JF, axis=1, keepdims=True)
    dact_JF = dact_JF * weight_J1
    dgate_JF = dact_JF * up_JF * sig_JF * (1 + gate_JF * (1 - sig_JF))
    dup_JF = dact_JF * gate_JF * sig_JF
    dhidden = jnp.concatenate([dgate_JF, dup_JF], axis=1).astype(dtype)
    weighted_JF = (act_JF * weight_J1).astype(dtype)
    ddown = products.outer(weighted_JF, dy_JD)
    dgate_up = products.outer(x_JD, dhidden).reshape(gate_up.shape)
    dweights = ExpertWeights(dgate_up, ddown)
    if down_lora:
        dpair = low_rank.down_gradients(*low, weighted_JF, dy_JD, dlow_JR, down_lora)
        dweights = dweights._replace(down_lora=dpair)
    dx_JD = products.multiply(dhidden, _flat(gate_up), transpose=True, into=dy_JD)
    if gate_up_lora:
        more_JD, dpair = low_rank.gate_up_gradients(*low, x_JD, dhidden, gate_up_lora)
        dx_JD = dx_JD + more_JD
        dweights = dweights._replace(gate_up_lora=dpair)
    return dx_JD, dweight_J1, dweights


def _flat(gate_up_GDPF: jax.Array) -> jax.Array:
    """[G, D, 2F]."""
    return gate_up_GDPF.reshape(*gate_up_GDPF.shape[:2], -1)
