"""Experts in bounded memory, on one device: the rounds that every method of dispatch.py is made of.

Every expert has a static capacity C for each device's tokens and round. A round dispatches up to C
tokens per expert as [E, C, D] to the experts, runs one batched SwiGLU over the local experts, and
combines: the results return, and each token adds its weighted rows. Round r takes the tokens whose
rank within their expert is in [rC, rC + C), so nothing is lost, whatever the routing: the number of
rounds is ceil(largest load / C), and memory does not depend on it. (A CPU that has all experts
needs no rounds: cpu_grouped_matmul.py.)

The backward pass runs the same rounds. The first round, nearly always the only one, keeps what it
exchanged and computed (`checkpoint_name`s "exchange" and "experts_hidden", for the remat policies);
later rounds recompute theirs. Token rows move by gathers in both directions, so sums have one order
and results do not depend on scheduling.

Shape letters: T tokens of this device, K experts per token, M = T*K assignments, E all experts, G
experts of this device, X devices on the expert axis (E = G*X), C capacity, J = X*C rows per expert
and round at the experts, P gate and up, D hidden_size, F expert width (this device's part of it,
where a tensor axis divides it).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import low_rank
from deepseek_jax.experts.low_rank import ExpertWeights


class Plan(NamedTuple):
    """This device's assignments, sorted by expert, and within an expert in token order."""

    order_M: jax.Array  # int32: assignment (token * K + choice) at each sorted position
    rank_TK: jax.Array  # int32: an assignment's rank among those of its expert
    expert_TK: jax.Array  # int32: E for assignments that go nowhere: padding, dropped ones
    start_E: jax.Array  # int32: first sorted position of each expert
    count_E: jax.Array  # int32: assignments of each expert
    # int32 []: what this device needs; devices that exchange rows must agree on it
    rounds: jax.Array


class Round(NamedTuple):
    """One round of a plan."""

    plan: Plan
    number: jax.Array  # int32 []
    capacity: int
    devices: int  # X

    @property
    def top_k(self) -> int:
        return self.plan.expert_TK.shape[1]


def expert_capacity(tokens: int, top_k: int, experts: int, capacity_factor: float) -> int:
    """C: capacity_factor times the mean load of an expert; at most every token, at least one."""
    return max(1, min(tokens, math.ceil(capacity_factor * tokens * top_k / experts)))


def sort_by_expert(
    expert_TK: jax.Array, experts: int, weight_TK: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by expert; within an expert by falling weight if weights are given; then by position.

    Args:
      expert_TK: int32, each in [0, experts]; `experts` itself means nowhere.
      experts: their number.
      weight_TK: float32.

    Returns:
      order_M: int32, the assignment at each sorted position.
      bound: int32 [experts + 1], the first sorted position of each expert, and of nowhere.
      rank_TK: int32, an assignment's rank among those of its expert.
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
    sorted_rank_M = jnp.arange(m, dtype=jnp.int32) - bound[sorted_M]
    rank_M = jnp.zeros_like(sorted_rank_M).at[order_M].set(sorted_rank_M, unique_indices=True)
    return order_M, bound, rank_M.reshape(expert_TK.shape)


@jax.named_scope("dispatch")
def make_plan(expert_TK: jax.Array, experts: int, capacity: int) -> Plan:
    """The plan of assignments to experts in [0, experts]; `experts` itself means nowhere."""
    order_M, bound, rank_TK = sort_by_expert(expert_TK, experts)
    count_E = jnp.diff(bound)
    rounds = (jnp.max(count_E) + capacity - 1) // capacity
    return Plan(order_M, rank_TK, expert_TK, bound[:-1], count_E, rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def exchange_and_compute(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    plan: Plan,
    capacity: int,
    devices: int,
) -> jax.Array:
    """The routed experts' output: sum over a token's choices of weight * expert(x).

    Tokens and weights must vary over the same mesh axes (`lax.pcast`), so that the transposes
    reduce their gradients.

    Args:
      x_TD: the tokens, in the compute dtype.
      weight_TK: float32 weights of the choices.
      weights: of this device's experts.
      plan: from `make_plan`, with the same capacity.
      capacity: C.
      devices: X, over which the experts of the plan are divided; 1 where all of them are here.

    Returns:
      [T, D] in the dtype of x_TD.
    """
    return _forward(x_TD, weight_TK, weights, plan, capacity, devices)[0]


def _forward(x_TD, weight_TK, weights, plan, capacity, devices):
    def one_round(number, y_TD):
        """dispatch > experts > combine; also what backward reads."""
        round_ = Round(plan, number, capacity, devices)
        rows_GJD = _dispatch(x_TD, round_)
        if devices > 1:  # rows that did not travel are cheaper to gather again than to keep
            rows_GJD = checkpoint_name(rows_GJD, "exchange")
        hidden_GJPF = checkpoint_name(_hidden(rows_GJD, weights), "experts_hidden")
        with jax.named_scope("experts"):
            act_GJF = jax.nn.silu(hidden_GJPF[:, :, 0]) * hidden_GJPF[:, :, 1]
            out_GJD = jnp.einsum("gjf,gfd->gjd", act_GJF, weights.down_GFD)
            if weights.down_lora:
                out_GJD = out_GJD + low_rank.down(_multiply, act_GJF, weights.down_lora)
        y_TD = _combine(y_TD, _from_experts(out_GJD, devices), round_, weight_TK)
        return y_TD, rows_GJD, hidden_GJPF

    y_TD, rows_GJD, hidden_GJPF = one_round(jnp.int32(0), jnp.zeros_like(x_TD, jnp.float32))

    def more(carry):
        number, y_TD = carry
        return number + 1, one_round(number, y_TD)[0]

    _, y_TD = lax.while_loop(lambda carry: carry[0] < plan.rounds, more, (_second(plan), y_TD))
    return y_TD.astype(x_TD.dtype), (x_TD, weight_TK, weights, plan, rows_GJD, hidden_GJPF)


def _backward(capacity, devices, residuals, dy_TD):
    x_TD, weight_TK, weights, plan, rows, hidden = residuals
    gate_up, down, gate_up_lora, down_lora = weights
    g, d, _, f = gate_up.shape

    def one_round(round_, rows_GJD, hidden_GJPF, dx_TD, dw_TK):
        """(gradients of tokens, of their weights, float32 ones of the experts)."""
        dy_GJD = _dispatch(dy_TD, round_)
        with jax.named_scope("dispatch"):
            assignment_EC, filled_EC = _assignments(round_)
            w_EC = jnp.where(filled_EC, weight_TK.reshape(-1)[assignment_EC], 0.0)
        w_GJ1 = _to_experts(w_EC[:, :, None], devices)
        with jax.named_scope("experts"):
            gate = hidden_GJPF[:, :, 0].astype(jnp.float32)
            up = hidden_GJPF[:, :, 1].astype(jnp.float32)
            sig = jax.nn.sigmoid(gate)
            act_GJF = gate * sig * up
            # The unweighted gradient goes to the experts, so that the weight's gradient <dy,
            # expert(x)> = <dy down^T, act> is found there and returns as one number per row: the
            # results themselves need no second exchange.
            dact = jnp.einsum("gjd,gfd->gjf", dy_GJD, down, preferred_element_type=jnp.float32)
            if down_lora:
                more, dlow = low_rank.down_transposed(_multiply, dy_GJD, down_lora)
                dact = dact + more
            dw_GJ1 = jnp.sum(dact * act_GJF, axis=-1, keepdims=True)
            dact = dact * w_GJ1
            dgate = dact * up * sig * (1 + gate * (1 - sig))
            dhidden = jnp.concatenate([dgate, dact * gate * sig], axis=-1).astype(x_TD.dtype)
            weighted_act = (act_GJF * w_GJ1).astype(x_TD.dtype)
            ddown = jnp.einsum(
                "gjf,gjd->gfd", weighted_act, dy_GJD, preferred_element_type=jnp.float32
            )
            dgate_up = jnp.einsum(
                "gjd,gjf->gdf", rows_GJD, dhidden, preferred_element_type=jnp.float32
            )
            drows_GJD = jnp.einsum("gjf,gdf->gjd", dhidden, gate_up.reshape(g, d, 2 * f))
            dweights = ExpertWeights(dgate_up, ddown)
            if down_lora:
                args = weighted_act, dy_GJD, dlow, down_lora
                dweights = dweights._replace(
                    down_lora=low_rank.down_gradients(_multiply, _outer, *args)
                )
            if gate_up_lora:
                more, dpair = low_rank.gate_up_gradients(
                    _multiply, _outer, rows_GJD, dhidden, gate_up_lora
                )
                drows_GJD = drows_GJD + more
                dweights = dweights._replace(gate_up_lora=dpair)
        dx_TD = _combine(dx_TD, _from_experts(drows_GJD, devices), round_, None)
        dw_EC = _from_experts(dw_GJ1, devices)
        with jax.named_scope("combine"):
            index_TK, here_TK = _rows_of(round_)
            dw_TK = dw_TK + jnp.where(here_TK, dw_EC.reshape(-1)[index_TK], 0.0)
        return dx_TD, dw_TK, dweights

    zeros = jnp.zeros_like(x_TD, jnp.float32), jnp.zeros_like(weight_TK)
    grads = one_round(Round(plan, jnp.int32(0), capacity, devices), rows, hidden, *zeros)

    def more(carry):
        number, (dx, dw, dweights) = carry
        round_ = Round(plan, number, capacity, devices)
        rows = _dispatch(x_TD, round_)
        dx, dw, dweights_r = one_round(round_, rows, _hidden(rows, weights), dx, dw)
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
        jax.tree.map(lambda g, w: g.reshape(w.shape).astype(w.dtype), dweights, weights),
        dplan,
    )


exchange_and_compute.defvjp(_forward, _backward)


def _second(plan: Plan) -> jax.Array:
    """The number of the second round, 1, varying over the mesh axes that the number of rounds varies over."""
    return jnp.ones_like(plan.rounds)


@jax.named_scope("dispatch")
def _dispatch(x_TD: jax.Array, round_: Round) -> jax.Array:
    """The rows of the round's tokens at the experts: [G, J, D].

    Zeros where an expert has fewer than its capacity.
    """
    assignment_EC, filled_EC = _assignments(round_)
    rows_ECD = jnp.where(filled_EC[:, :, None], x_TD[assignment_EC // round_.top_k], 0)
    return _to_experts(rows_ECD, round_.devices)


@jax.named_scope("experts")
def _hidden(rows_GJD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Gate and up projections in one matmul: [G, J, 2, F]."""
    g, d, _, f = weights.gate_up_GDPF.shape
    hidden = jnp.einsum("gjd,gdf->gjf", rows_GJD, weights.gate_up_GDPF.reshape(g, d, 2 * f))
    if weights.gate_up_lora:
        hidden = hidden + low_rank.gate_up(_multiply, rows_GJD, weights.gate_up_lora)
    return hidden.reshape(g, -1, 2, f)


def _multiply(rows_GJI: jax.Array, weights_GIO: jax.Array, transpose: bool = False) -> jax.Array:
    """[G, J, O]."""
    return jnp.einsum("gji,goi->gjo" if transpose else "gji,gio->gjo", rows_GJI, weights_GIO)


def _outer(rows_GJI: jax.Array, rows_GJO: jax.Array) -> jax.Array:
    """float32 [G, I, O]."""
    return jnp.einsum("gji,gjo->gio", rows_GJI, rows_GJO, preferred_element_type=jnp.float32)


@jax.named_scope("combine")
def _combine(
    acc_TD: jax.Array, rows_ECD: jax.Array, round_: Round, weight_TK: jax.Array | None
) -> jax.Array:
    """Adds each token's rows of this round, times their weights, in float32.

    One choice at a time: never are there T*K rows.
    """
    flat = rows_ECD.reshape(-1, rows_ECD.shape[-1])
    index_TK, here_TK = _rows_of(round_)
    for k in range(index_TK.shape[1]):
        if weight_TK is None:
            factor_T = here_TK[:, k].astype(jnp.float32)
        else:
            factor_T = jnp.where(here_TK[:, k], weight_TK[:, k], 0.0)
        acc_TD = acc_TD + flat[index_TK[:, k]].astype(jnp.float32) * factor_T[:, None]
    return acc_TD


def _assignments(round_: Round) -> tuple[jax.Array, jax.Array]:
    """The assignment of each row of the round, int32 [E, C], and whether it has one, bool [E, C]."""
    plan, capacity = round_.plan, round_.capacity
    rank_C = round_.number * capacity + jnp.arange(capacity, dtype=jnp.int32)
    filled_EC = rank_C[None] < plan.count_E[:, None]
    position_EC = jnp.minimum(plan.start_E[:, None] + rank_C[None], plan.order_M.shape[0] - 1)
    return plan.order_M[position_EC], filled_EC


def _rows_of(round_: Round) -> tuple[jax.Array, jax.Array]:
    """The row of each assignment, an index into the flat [E * C], and whether it is in this round.

    Both [T, K].
    """
    plan, capacity = round_.plan, round_.capacity
    row_TK = plan.rank_TK - round_.number * capacity
    here_TK = (row_TK >= 0) & (row_TK < capacity) & (plan.expert_TK < plan.count_E.shape[0])
    return jnp.where(here_TK, plan.expert_TK * capacity + row_TK, 0), here_TK


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
def _from_experts(rows_GJD: jax.Array, devices: int) -> jax.Array:
    """The inverse of `_to_experts`: [G, X*C, D] back to [E, C, D] on the devices that sent them."""
    if devices == 1:
        return rows_GJD
    g, j = rows_GJD.shape[:2]
    rows = lax.all_to_all(
        rows_GJD.reshape(g, devices, j // devices, -1), "expert", split_axis=1, concat_axis=0
    )
    return rows.reshape(g * devices, j // devices, -1)
