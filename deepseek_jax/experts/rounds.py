"""Experts in bounded memory, on one device: the rounds that every method of dispatch.py is made of.

Every expert has a static capacity C for each device's tokens and round. A round dispatches up to C
tokens per expert to the experts (places.py), runs their SwiGLU (swiglu.py), and combines: the results
return, and each token adds its weighted rows. Round r takes the tokens whose rank within their
expert is in [rC, rC + C), so nothing is lost, whatever the routing: the number of rounds is
ceil(largest load / C), and memory does not depend on it. (A device that has all experts needs no
rounds where there are grouped products for it: sorted_rows.py.)

The backward pass runs the same rounds. The first round, nearly always the only one, keeps what it
exchanged and computed (`checkpoint_name`s "exchange" and "experts_hidden", for the remat policies);
later rounds recompute theirs. Token rows move by gathers in both directions, so sums have one order
and results do not depend on scheduling.

Shape letters: T tokens of this device, K experts per token, M = T*K assignments, E all experts, G
experts of this device, X devices on the expert axis (E = G*X), C capacity, S = X*G*C places at the
experts, J rows there (S, or, for kernels, blocks of one expert each), P gate and up, D hidden_size, F
expert width (this device's part of it, where a tensor axis divides it).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import fp8, places, swiglu
from deepseek_jax.experts.low_rank import ExpertWeights
from deepseek_jax.experts.places import How, Plan, Round


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def exchange_and_compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    plan: Plan,
    capacity: int,
    devices: int,
    how: How,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x).

    Tokens and weights must vary over the same mesh axes (`lax.pcast`), so that the transposes
    reduce their gradients.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      weights: of this device's experts.
      plan: from `places.make_plan`, with the same capacity and devices.
      capacity: C.
      devices: X, over which the experts of the plan are divided; 1 where all of them are here.
      how: what multiplies, and in which numbers.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, weights, plan, capacity, devices, how)[0]


def _forward(x_TD, weight_TK, weights, plan, capacity, devices, how):
    travelling = _travelling(x_TD, devices, how)

    def one_round(number, y_TD):
        """dispatch > experts > combine; also what backward reads."""
        round_ = Round(plan, number, capacity, devices, how)
        products = round_.products()
        rows = places.dispatch(travelling, round_)
        if devices > 1:  # rows that did not travel are cheaper to gather again than to keep
            rows = checkpoint_name(rows, "exchange")
        rows_JD = _arrived(rows, x_TD)
        with jax.named_scope("experts"):
            hidden = checkpoint_name(swiglu.hidden(products, rows_JD, weights), "experts_hidden")
            out_JD = swiglu.output(products, hidden, weights)
        return places.combine(y_TD, out_JD, round_, weight_TK), rows_JD, hidden

    y_TD, rows_JD, hidden = one_round(jnp.int32(0), jnp.zeros_like(x_TD, jnp.float32))

    def more(carry):
        number, y_TD = carry
        return number + 1, one_round(number, y_TD)[0]

    _, y_TD = lax.while_loop(lambda carry: carry[0] < plan.rounds, more, (_second(plan), y_TD))
    return y_TD.astype(x_TD.dtype), (x_TD, weight_TK, weights, plan, rows_JD, hidden)


def _backward(capacity, devices, how, residuals, dy_TD):
    x_TD, weight_TK, weights, plan, rows_JD, hidden = residuals

    def one_round(round_, rows_JD, hidden, dx_TD, dw_TK):
        """(gradients of tokens, of their weights, float32 ones of the experts)."""
        products = round_.products()
        dy_JD = places.dispatch(dy_TD, round_)
        w_J1 = places.dispatch_weights(weight_TK, round_)
        with jax.named_scope("experts"):
            dx_JD, dw_J1, dweights = swiglu.gradients(
                products, rows_JD, hidden, dy_JD, w_J1, weights
            )
        dx_TD = places.combine(dx_TD, dx_JD, round_, None)
        return dx_TD, places.combine_weights(dw_TK, dw_J1, round_), dweights

    def round_of(number):
        return Round(plan, number, capacity, devices, how)

    zeros = jnp.zeros_like(x_TD, jnp.float32), jnp.zeros_like(weight_TK)
    grads = one_round(round_of(jnp.int32(0)), rows_JD, hidden, *zeros)

    def more(carry):
        number, (dx, dw, dweights) = carry
        round_ = round_of(number)
        rows = places.dispatch(_travelling(x_TD, devices, how), round_)
        rows = _arrived(rows, x_TD)
        with jax.named_scope("experts"):
            again = swiglu.hidden(round_.products(), rows, weights)
        dx, dw, dweights_r = one_round(round_, rows, again, dx, dw)
        with jax.named_scope("experts"):
            return number + 1, (dx, dw, jax.tree.map(jnp.add, dweights, dweights_r))

    _, (dx, dw, dweights) = lax.while_loop(
        lambda carry: carry[0] < plan.rounds, more, (_second(plan), grads)
    )
    # Integers have no gradient.
    dplan = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
    return (
        dx.astype(x_TD.dtype),
        dw.astype(weight_TK.dtype),
        jax.tree.map(lambda g, w: g.astype(w.dtype), dweights, weights),
        dplan,
    )


exchange_and_compute.defvjp(_forward, _backward)


@jax.named_scope("dispatch")
def _travelling(x_TD: jax.Array, devices: int, how: How) -> jax.Array:
    """Tokens as they are sent."""
    return fp8.encode(x_TD) if devices > 1 and how.fp8_tokens else x_TD


@jax.named_scope("dispatch")
def _arrived(rows: jax.Array, x_TD: jax.Array) -> jax.Array:
    """[J, D]: rows of what `_travelling` made, in the dtype of the tokens."""
    return rows if rows.dtype == x_TD.dtype else fp8.decode(rows, x_TD.dtype)


def _second(plan: Plan) -> jax.Array:
    """The number of the second round, 1, varying over the mesh axes that the number of rounds varies over."""
    return jnp.ones_like(plan.rounds)
