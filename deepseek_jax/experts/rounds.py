"""Experts at work in bounded memory, on one device: the rounds that every method of experts/dispatch.py is made of.
(On a CPU that has all experts itself there is nothing to exchange, and experts/cpu_blocks.py does without rounds.)

Every expert has C static places for each device's tokens and round. A round gathers up to C tokens an expert into [E, C, D],
brings them to the experts, runs one batched SwiGLU over the local experts, brings the results back, and each token adds its
weighted rows. Round r takes the tokens whose rank within their expert is in [rC, rC + C), so nothing is lost, whatever the
routing: the number of rounds is ceil(largest load / C), and memory does not depend on it.

The backward pass runs the same rounds. The first round, nearly always the only one, keeps what it exchanged and computed
(`checkpoint_name`s "exchange" and "experts_hidden", for the remat policies); later rounds recompute theirs.
Token rows move by gathers in both directions, so sums have one order and results do not depend on scheduling.

Shape letters: T tokens of this device, K experts per token, M = T*K assignments, E all experts, G experts of this device,
X devices on the expert axis (E = G*X), C places per expert and round, R = X*C rows of an expert and round, P gate and up,
D hidden_size, F expert width (this device's part of it, where a tensor axis divides it).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class Plan(NamedTuple):
    """This device's assignments, sorted by expert; stable, so that within an expert they are in token order."""

    order_M: jax.Array  # int32: assignment (token * K + choice) at each sorted position
    rank_TK: jax.Array  # int32: an assignment's place among those of its expert
    expert_TK: jax.Array  # int32: E for assignments that go nowhere: padding, dropped ones
    start_E: jax.Array  # int32: first sorted position of each expert
    count_E: jax.Array  # int32: assignments of each expert
    rounds: (
        jax.Array
    )  # int32 scalar: what this device needs; devices that exchange rows must agree on it


def slots_per_round(tokens: int, top_k: int, experts: int, capacity_factor: float) -> int:
    """C: capacity_factor times the mean load of an expert from `tokens` tokens; at most every token, at least one."""
    return max(1, min(tokens, math.ceil(capacity_factor * tokens * top_k / experts)))


def sort_by_expert(
    expert_TK: jax.Array, experts: int, weight_TK: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by expert; within an expert by falling weight if weights are given; then by position.

    Args:
      expert_TK: int32, each in [0, experts]; `experts` itself means nowhere.

    Returns:
      order_M: int32, the assignment at each sorted position.
      bound: int32 [experts + 1], the first sorted position of each expert, and of nowhere.
      rank_TK: int32, an assignment's place among those of its expert.
    """
    m = expert_TK.size
    expert_M = expert_TK.reshape(m)
    if weight_TK is not None:
        order_M = jnp.lexsort((-weight_TK.reshape(m), expert_M)).astype(jnp.int32)
        sorted_M = expert_M[order_M]
    elif m * (experts + 1) < 2**31:
        # One sort of packed keys is several times faster than argsort and scatter.
        key_M = jnp.sort(expert_M * m + jnp.arange(m, dtype=jnp.int32))
        order_M, sorted_M = key_M % m, key_M // m
    else:
        order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
        sorted_M = expert_M[order_M]
    bound = jnp.searchsorted(sorted_M, jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    rank_M = jnp.arange(m, dtype=jnp.int32) - bound[sorted_M]
    return (
        order_M,
        bound,
        jnp.zeros_like(rank_M)
        .at[order_M]
        .set(rank_M, unique_indices=True)
        .reshape(expert_TK.shape),
    )


@jax.named_scope("dispatch")
def make_plan(expert_TK: jax.Array, experts: int, slots: int) -> Plan:
    """The plan of assignments to experts in [0, experts]; `experts` itself means nowhere."""
    order_M, bound, rank_TK = sort_by_expert(expert_TK, experts)
    count_E = jnp.diff(bound)
    return Plan(
        order_M, rank_TK, expert_TK, bound[:-1], count_E, (jnp.max(count_E) + slots - 1) // slots
    )


def _round_tokens(plan: Plan, r: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Which assignment sits in each place of round r: (assignment [E, C] int32, filled [E, C] bool)."""
    rank_C = r * slots + jnp.arange(slots, dtype=jnp.int32)
    filled_EC = rank_C[None] < plan.count_E[:, None]
    position_EC = jnp.minimum(plan.start_E[:, None] + rank_C[None], plan.order_M.shape[0] - 1)
    return plan.order_M[position_EC], filled_EC


@jax.named_scope("dispatch")
def _to_experts(rows_ECD: jax.Array, devices: int) -> jax.Array:
    """[E, C, D] on every device to [G, X*C, D] on the experts' devices: already grouped by expert."""
    if devices == 1:
        return rows_ECD
    e, c = rows_ECD.shape[:2]
    rows = lax.all_to_all(
        rows_ECD.reshape(devices, e // devices, c, -1), "expert", split_axis=0, concat_axis=1
    )
    return rows.reshape(e // devices, devices * c, -1)


@jax.named_scope("combine")
def _from_experts(rows_GRD: jax.Array, devices: int) -> jax.Array:
    """The inverse of `_to_experts`: [G, X*C, D] back to [E, C, D] on the devices that sent them."""
    if devices == 1:
        return rows_GRD
    g, r = rows_GRD.shape[:2]
    rows = lax.all_to_all(
        rows_GRD.reshape(g, devices, r // devices, -1), "expert", split_axis=1, concat_axis=0
    )
    return rows.reshape(g * devices, r // devices, -1)


@jax.named_scope("dispatch")
def _send(
    x_TD: jax.Array, plan: Plan, r: jax.Array, top_k: int, slots: int, devices: int
) -> jax.Array:
    """The rows of round r's tokens, zeros in empty places, at the experts: [G, X*C, D]."""
    assignment_EC, filled_EC = _round_tokens(plan, r, slots)
    return _to_experts(jnp.where(filled_EC[:, :, None], x_TD[assignment_EC // top_k], 0), devices)


def _places(plan: Plan, r: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Where each assignment sits in round r: (index into the flat [E * C] places, whether it is in this round), both [T, K]."""
    place_TK = plan.rank_TK - r * slots
    here_TK = (place_TK >= 0) & (place_TK < slots) & (plan.expert_TK < plan.count_E.shape[0])
    return jnp.where(here_TK, plan.expert_TK * slots + place_TK, 0), here_TK


@jax.named_scope("combine")
def _collect(
    acc_TD: jax.Array,
    rows_ECD: jax.Array,
    plan: Plan,
    r: jax.Array,
    slots: int,
    weight_TK: jax.Array | None,
) -> jax.Array:
    """Adds each token's rows of this round, times their weights, in float32. One expert choice at a time: never T*K rows."""
    flat = rows_ECD.reshape(-1, rows_ECD.shape[-1])
    index_TK, here_TK = _places(plan, r, slots)
    for k in range(index_TK.shape[1]):
        factor = (
            here_TK[:, k].astype(jnp.float32)
            if weight_TK is None
            else jnp.where(here_TK[:, k], weight_TK[:, k], 0.0)
        )
        acc_TD = acc_TD + flat[index_TK[:, k]].astype(jnp.float32) * factor[:, None]
    return acc_TD


@jax.named_scope("experts")
def _hidden(rows_GRD: jax.Array, gate_up_GDPF: jax.Array) -> jax.Array:
    """Gate and up projections in one matmul: [G, R, 2, F]."""
    g, d, _, f = gate_up_GDPF.shape
    return jnp.einsum("grd,gdf->grf", rows_GRD, gate_up_GDPF.reshape(g, d, 2 * f)).reshape(
        g, -1, 2, f
    )


def _round_forward(x_TD, gate_up, down, plan, r, top_k, slots, devices):
    """One round up to the experts' results: (received rows, gate and up, results [E, C, D] back at their senders)."""
    rows_GRD = _send(x_TD, plan, r, top_k, slots, devices)
    if devices > 1:  # rows that did not travel are cheaper to gather again than to keep
        rows_GRD = checkpoint_name(rows_GRD, "exchange")
    hidden = checkpoint_name(_hidden(rows_GRD, gate_up), "experts_hidden")
    with jax.named_scope("experts"):
        act_GRF = jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1]
        out_GRD = jnp.einsum("grf,gfd->grd", act_GRF, down)
    return rows_GRD, hidden, _from_experts(out_GRD, devices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def exchange_and_compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    gate_up_GDPF: jax.Array,
    down_GFD: jax.Array,
    plan: Plan,
    slots: int,
    devices: int,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x), over as many rounds as the plan says.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      gate_up_GDPF: [G, D, 2, F], gate first; down_GFD: [G, F, D]: this device's experts, in the compute dtype.
        Tokens and weights must vary over the same mesh axes (`lax.pcast`), so that the transposes reduce their gradients.
      plan: from `make_plan`, with the same slots.
      slots: C. devices: X, over which the experts of the plan are divided; 1 where all of them are here.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, gate_up_GDPF, down_GFD, plan, slots, devices)[0]


def _forward(x_TD, weight_TK, gate_up, down, plan, slots, devices):
    top_k = weight_TK.shape[1]
    rows, hidden, out = _round_forward(
        x_TD, gate_up, down, plan, jnp.int32(0), top_k, slots, devices
    )
    y = _collect(jnp.zeros_like(x_TD, jnp.float32), out, plan, jnp.int32(0), slots, weight_TK)

    def more(carry):
        r, y = carry
        _, _, out = _round_forward(x_TD, gate_up, down, plan, r, top_k, slots, devices)
        return r + 1, _collect(y, out, plan, r, slots, weight_TK)

    _, y = lax.while_loop(lambda carry: carry[0] < plan.rounds, more, (_second(plan), y))
    return y.astype(x_TD.dtype), (x_TD, weight_TK, gate_up, down, plan, rows, hidden)


def _second(plan: Plan) -> jax.Array:
    """The number of the second round, 1, varying over the mesh axes that the number of rounds varies over."""
    return jnp.ones_like(plan.rounds)


def _backward(slots, devices, residuals, dy_TD):
    x_TD, weight_TK, gate_up, down, plan, rows, hidden = residuals
    top_k = weight_TK.shape[1]
    g, d, _, f = gate_up.shape

    def one_round(r, rows_GRD, hidden_GRPF, dx_TD, dw_TK):
        dy_GRD = _send(dy_TD, plan, r, top_k, slots, devices)
        with jax.named_scope("dispatch"):
            assignment_EC, filled_EC = _round_tokens(plan, r, slots)
            w_EC = jnp.where(filled_EC, weight_TK.reshape(-1)[assignment_EC], 0.0)
        w_GR1 = _to_experts(w_EC[:, :, None], devices)
        with jax.named_scope("experts"):
            gate, up = (
                hidden_GRPF[:, :, 0].astype(jnp.float32),
                hidden_GRPF[:, :, 1].astype(jnp.float32),
            )
            sig = jax.nn.sigmoid(gate)
            act_GRF = gate * sig * up
            # The unweighted gradient goes to the experts, so that the weight's gradient <dy, expert(x)> = <dy down^T, act> is
            # found there and returns as one number a row: the results themselves need no second exchange.
            dact = jnp.einsum("grd,gfd->grf", dy_GRD, down, preferred_element_type=jnp.float32)
            dw_GR1 = jnp.sum(dact * act_GRF, axis=-1, keepdims=True)
            dact = dact * w_GR1
            dgate = dact * up * sig * (1 + gate * (1 - sig))
            dhidden = jnp.concatenate([dgate, dact * gate * sig], axis=-1).astype(x_TD.dtype)
            weighted_act = (act_GRF * w_GR1).astype(x_TD.dtype)
            ddown = jnp.einsum(
                "grf,grd->gfd", weighted_act, dy_GRD, preferred_element_type=jnp.float32
            )
            dgate_up = jnp.einsum(
                "grd,grf->gdf", rows_GRD, dhidden, preferred_element_type=jnp.float32
            )
            drows_GRD = jnp.einsum("grf,gdf->grd", dhidden, gate_up.reshape(g, d, 2 * f))
        dx_TD = _collect(dx_TD, _from_experts(drows_GRD, devices), plan, r, slots, None)
        dw_EC = _from_experts(dw_GR1, devices)
        with jax.named_scope("combine"):
            index_TK, here_TK = _places(plan, r, slots)
            dw_TK = dw_TK + jnp.where(here_TK, dw_EC.reshape(-1)[index_TK], 0.0)
        return dx_TD, dw_TK, dgate_up, ddown

    zeros = jnp.zeros_like(x_TD, jnp.float32), jnp.zeros_like(weight_TK)
    grads = one_round(jnp.int32(0), rows, hidden, *zeros)

    def more(carry):
        r, (dx, dw, dgate_up, ddown) = carry
        rows = _send(x_TD, plan, r, top_k, slots, devices)
        dx, dw, dgate_up_r, ddown_r = one_round(r, rows, _hidden(rows, gate_up), dx, dw)
        with jax.named_scope("experts"):
            return r + 1, (dx, dw, dgate_up + dgate_up_r, ddown + ddown_r)

    _, (dx, dw, dgate_up, ddown) = lax.while_loop(
        lambda carry: carry[0] < plan.rounds, more, (_second(plan), grads)
    )
    dplan = jax.tree.map(
        lambda a: np.zeros(a.shape, jax.dtypes.float0), plan
    )  # integers have no gradient
    return (
        dx.astype(x_TD.dtype),
        dw.astype(weight_TK.dtype),
        dgate_up.reshape(gate_up.shape).astype(gate_up.dtype),
        ddown.astype(down.dtype),
        dplan,
    )


exchange_and_compute.defvjp(_forward, _backward)
