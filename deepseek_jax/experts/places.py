"""Where assignments are in a round: their places, the exchange of the places, and the way back.

A round dispatches up to C tokens per expert: every expert has C places for each device's tokens, [E, C, D],
whatever the routing. With several devices on the expert axis an all-to-all brings each device the places of
its experts. What the products take of them depends on how they multiply:

    batched    the places themselves, expert by expert: empty ones are zeros, and cost as much as filled ones
    kernels    rows in blocks (block_rows.py), gathered from the places that are filled: empty ones cost bytes
               on the way, and nothing here. Without an exchange there are no places: a round takes the next
               G*C assignments, whosever they are, and gathers their rows from the tokens.

Shape letters: rounds.py.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.experts.block_rows import ArrivedRows, BlockRows, rows_of_places, some_rows
from deepseek_jax.experts.fp8 import Fp8
from deepseek_jax.experts.grouped_matmul import GroupedMatmul
from deepseek_jax.experts.sorting import SortedAssignments, sort_assignments
from deepseek_jax.experts.swiglu import Products

# Of gradients in FP8: XLA then adds up a few products at a time in float32, where a matrix unit alone keeps
# fewer bits of a sum.
EXACT_SUMS = lax.Precision.HIGHEST


class Plan(NamedTuple):
    """This device's assignments, to all experts, and their rounds."""

    assignments: SortedAssignments
    # int32 []: what this device needs; devices that exchange rows must agree on it
    rounds: jax.Array
    # int32: assignments that come from each device of the expert axis for each of this device's experts
    count_XG: jax.Array


@dataclasses.dataclass(frozen=True)
class How:
    """How a device computes its experts; equal ones are one program."""

    kernels: GroupedMatmul | None = None  # None: batched products of all places
    fp8: Fp8 | None = None  # None: products in the compute dtype
    fp8_tokens: bool = False  # tokens travel to their experts in FP8


def expert_capacity(tokens: int, top_k: int, experts: int, capacity_factor: float) -> int:
    """C: capacity_factor times the mean load of an expert; at most every token, at least one."""
    return max(1, min(tokens, math.ceil(capacity_factor * tokens * top_k / experts)))


@jax.named_scope("dispatch")
def make_plan(
    expert_TK: jax.Array, experts: int, capacity: int, devices: int, kernels: bool
) -> Plan:
    """The plan of a device's assignments.

    Args:
      expert_TK: int32 in [0, experts]; `experts` itself means nowhere.
      experts: E.
      capacity: C.
      devices: X, over which the experts are divided; 1 where all of them are here.
      kernels: whether they multiply.
    """
    assignments = sort_assignments(expert_TK, experts)
    count_E = assignments.count_G
    if kernels and devices == 1:
        rounds = -(-jnp.sum(count_E) // (experts * capacity))
    else:
        rounds = (jnp.max(count_E) + capacity - 1) // capacity
    return Plan(assignments, rounds, count_E.reshape(devices, experts // devices))


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of a plan."""

    plan: Plan
    number: jax.Array  # int32 []
    capacity: int
    devices: int  # X
    how: How

    @property
    def top_k(self) -> int:
        """K."""
        return self.plan.assignments.expert_TK.shape[1]

    @property
    def is_local(self) -> bool:
        """Whether rows are gathered from the tokens at once."""
        return self.how.kernels is not None and self.devices == 1

    @functools.cached_property
    def local(self) -> BlockRows:
        """The rows of this round, if it `is_local`."""
        assignments = self.plan.assignments
        most = min(len(assignments.count_G) * self.capacity, assignments.order_M.size)
        return some_rows(assignments, self.number * most, most)

    @functools.cached_property
    def arrived(self) -> ArrivedRows:
        """The rows of this round at the experts, for kernels after an exchange."""
        left_XG = self.plan.count_XG - self.number * self.capacity
        return rows_of_places(jnp.clip(left_XG, 0, self.capacity), self.capacity)

    def products(self) -> Products:
        """Of the rows that `to_experts` gives."""
        raw = self._batched()
        if self.how.kernels:
            raw = self.how.kernels.products(self.local if self.is_local else self.arrived)
        return self.how.fp8.products(raw) if self.how.fp8 else raw

    def _batched(self) -> Products:
        experts = self.plan.count_XG.shape[1]
        outer = functools.partial(_outer, experts)
        largest = functools.partial(_largest, experts)
        # Places lie expert by expert, as many for each.
        places = self.devices * self.capacity
        of_expert = functools.partial(jnp.repeat, repeats=places, axis=0)
        return Products(_multiply, outer, _multiply, outer, largest, of_expert)


@jax.named_scope("dispatch")
def dispatch(x_TD: jax.Array, round_: Round) -> jax.Array:
    """The rows of the round's tokens at the experts: [J, D]. Zeros where there is no token. In any dtype."""
    if round_.is_local:
        token_J = round_.local.assignment_J // round_.top_k
        return x_TD.at[token_J].get(mode="fill", fill_value=0)
    assignment_EC, filled_EC = _assignments(round_)
    rows_ECD = jnp.where(filled_EC[:, :, None], x_TD[assignment_EC // round_.top_k], 0)
    return _to_experts(rows_ECD, round_)


@jax.named_scope("dispatch")
def dispatch_weights(weight_TK: jax.Array, round_: Round) -> jax.Array:
    """The weight of each row at the experts, 0 where there is no token: [J, 1]."""
    if round_.is_local:
        weight_M = weight_TK.reshape(-1)
        return weight_M.at[round_.local.assignment_J].get(mode="fill", fill_value=0)[:, None]
    assignment_EC, filled_EC = _assignments(round_)
    weight_EC = jnp.where(filled_EC, weight_TK.reshape(-1)[assignment_EC], 0.0)
    return _to_experts(weight_EC[:, :, None], round_)


@jax.named_scope("combine")
def combine(
    acc_TD: jax.Array, rows_JD: jax.Array, round_: Round, weight_TK: jax.Array | None
) -> jax.Array:
    """Adds each token's rows of this round, times their weights, in float32.

    One choice at a time: never are there T*K rows.
    """
    rows, index_TK, here_TK = _from_experts(rows_JD, round_)
    for k in range(index_TK.shape[1]):
        here_TD = _read(rows, index_TK[:, k], round_).astype(jnp.float32)
        if weight_TK is None:
            factor_T = here_TK[:, k].astype(jnp.float32)
        else:
            factor_T = jnp.where(here_TK[:, k], weight_TK[:, k], 0.0)
        acc_TD = acc_TD + here_TD * factor_T[:, None]
    return acc_TD


@jax.named_scope("combine")
def combine_weights(acc_TK: jax.Array, rows_J1: jax.Array, round_: Round) -> jax.Array:
    """Adds a number of each row to its assignment."""
    rows, index_TK, here_TK = _from_experts(rows_J1, round_)
    return acc_TK + jnp.where(here_TK, _read(rows[:, 0], index_TK, round_), 0.0)


def _read(rows: jax.Array, index: jax.Array, round_: Round) -> jax.Array:
    """Zeros beyond the last row. What kernels leave in rows of nobody is never read."""
    if round_.is_local:
        return rows.at[index].get(mode="fill", fill_value=0)
    return rows[index]


def _assignments(round_: Round) -> tuple[jax.Array, jax.Array]:
    """The assignment of each place of the round, int32 [E, C], and whether it has one, bool [E, C]."""
    order_M, _, _, start_E, count_E = round_.plan.assignments
    rank_C = round_.number * round_.capacity + jnp.arange(round_.capacity, dtype=jnp.int32)
    filled_EC = rank_C[None] < count_E[:, None]
    position_EC = jnp.minimum(start_E[:, None] + rank_C[None], order_M.shape[0] - 1)
    return order_M[position_EC], filled_EC


def _to_experts(places_ECI: jax.Array, round_: Round) -> jax.Array:
    """[E, C, I] on every device to [J, I] on the experts' devices."""
    devices, width = round_.devices, places_ECI.shape[-1]
    if round_.how.kernels:
        places = places_ECI.reshape(devices, -1, width)
        places = lax.all_to_all(places, "expert", split_axis=0, concat_axis=0)
        places_SI = places.reshape(-1, width)
        return places_SI.at[round_.arrived.place_J].get(mode="fill", fill_value=0)
    if devices > 1:  # already grouped by expert: [G, X, C, I]
        e, c = places_ECI.shape[:2]
        places = places_ECI.reshape(devices, e // devices, c, -1)
        places_ECI = lax.all_to_all(places, "expert", split_axis=0, concat_axis=1)
    return places_ECI.reshape(-1, width)


def _from_experts(rows_JI: jax.Array, round_: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `_to_experts`, and where in it each assignment is.

    Returns:
      Rows; the row of each assignment, int32 [T, K], possibly one beyond the last; whether the assignment is
      in this round, bool [T, K].
    """
    if round_.is_local:
        row_TK = round_.local.row_TK
        return rows_JI, row_TK, row_TK < len(rows_JI)
    _, rank_TK, expert_TK, _, count_E = round_.plan.assignments
    capacity, devices = round_.capacity, round_.devices
    experts, width = len(count_E), rows_JI.shape[-1]
    nth_TK = rank_TK - round_.number * capacity
    here_TK = (nth_TK >= 0) & (nth_TK < capacity) & (expert_TK < experts)
    place_TK = jnp.where(here_TK, expert_TK * capacity + nth_TK, 0)
    if round_.how.kernels:
        places_SI = rows_JI.at[round_.arrived.row_S].get(mode="fill", fill_value=0)
        places = places_SI.reshape(devices, -1, width)
        places = lax.all_to_all(places, "expert", split_axis=0, concat_axis=0)
        return places.reshape(-1, width), place_TK, here_TK
    if devices > 1:
        places = rows_JI.reshape(experts // devices, devices, capacity, width)
        rows_JI = lax.all_to_all(places, "expert", split_axis=1, concat_axis=0)
    return rows_JI.reshape(-1, width), place_TK, here_TK


def _multiply(
    rows_JI: jax.Array,
    weight_GIO: jax.Array,
    transpose: bool = False,
    into: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """As swiglu.Products.multiply, of all places."""
    rows_GJI = rows_JI.reshape(len(weight_GIO), -1, rows_JI.shape[1])
    if dtype is not None:
        precision = EXACT_SUMS if transpose else None
        inner = 2 if transpose else 1
        numbers = (((2,), (inner,)), ((0,), (0,)))
        out_GJO = lax.dot_general(rows_GJI, weight_GIO, numbers, precision, dtype)
        return out_GJO.reshape(len(rows_JI), -1)
    formula = "gji,goi->gjo" if transpose else "gji,gio->gjo"
    out_GJO = jnp.einsum(formula, rows_GJI, weight_GIO)
    return out_GJO.reshape(len(rows_JI), -1)


def _outer(experts: int, rows_JI: jax.Array, rows_JO: jax.Array) -> jax.Array:
    """As swiglu.Products.outer, of all places."""
    left_GJI, right_GJO = (a.reshape(experts, -1, a.shape[1]) for a in (rows_JI, rows_JO))
    if rows_JI.dtype != rows_JO.dtype:  # both are FP8
        numbers = (((1,), (1,)), ((0,), (0,)))
        return lax.dot_general(left_GJI, right_GJO, numbers, EXACT_SUMS, jnp.float32)
    return jnp.einsum("gji,gjo->gio", left_GJI, right_GJO, preferred_element_type=jnp.float32)


def _largest(experts: int, rows_JI: jax.Array) -> jax.Array:
    """As swiglu.Products.largest, of all places."""
    return jnp.max(jnp.abs(rows_JI.reshape(experts, -1, rows_JI.shape[1])), axis=1)
