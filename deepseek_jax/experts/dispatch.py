"""How tokens meet experts: pure functions that run on one device, inside the one per_device of model/moe.py.

Three methods, the same numbers (`config.moe.dispatch`):
- all_to_all: each token's rows are sent to the devices of its experts, and the results back, round by round.
- all_gather: every device gathers the tokens of the whole expert axis and runs its experts on those
  that chose them; a reduce-scatter adds the weighted outputs and gives each device its own tokens'.
- ring: tokens travel around the expert axis with the sum of their weighted outputs, to which each
  device's experts add.

All work by the rounds of rounds.py, so none ever drops a token or lets memory depend on the
routing. Tokens that visit other devices bring their choices: the experts of other devices are
nowhere there, and the rounds exchange nothing. Where a device has all experts, and there are grouped
products for it, there is no exchange and there are no rounds (sorted_rows.py).

Shape letters: rounds.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import block_rows, cpu_grouped_matmul, implementations, sorted_rows
from deepseek_jax.experts.fp8 import InFp8, decode, encode
from deepseek_jax.experts.low_rank import ExpertWeights
from deepseek_jax.experts.places import How, expert_capacity, make_plan
from deepseek_jax.experts.rounds import exchange_and_compute
from deepseek_jax.experts.sorting import sort_by_expert
from deepseek_jax.parallel.mesh import TOKEN_AXES, on_cpu


class Tokens(NamedTuple):
    """Tokens and where they want to go."""

    x_TD: jax.Array  # in the compute dtype
    weight_TK: jax.Array  # float32: weights of the choices
    expert_TK: jax.Array  # int32 in [0, E]; E means nowhere and costs nothing


def drop(
    expert_TK: jax.Array, weight_TK: jax.Array, experts: int, capacity: int, policy: str
) -> jax.Array:
    """Sends nowhere what is beyond the capacity of each expert for this device's tokens.

    Args:
      expert_TK: int32, `experts` for padding.
      weight_TK: float32 weights of the choices.
      experts: their number, on all devices.
      capacity: assignments that each expert keeps.
      policy: "position" keeps the earliest tokens; "probability" (or "probs") the highest weights, of
        equal ones the earliest.

    Returns:
      expert_TK with `experts` for the dropped. As it happens before any exchange, all methods drop the same.
    """
    by_weight = None if policy == "position" else lax.stop_gradient(weight_TK)
    _, _, rank_TK = sort_by_expert(expert_TK, experts, by_weight)
    return jnp.where(rank_TK < capacity, expert_TK, experts)


class Rounds(NamedTuple):
    """What the rounds of a device are like."""

    capacity_of: Callable[[int], int]  # by the number of tokens
    how: How


def dispatch(
    method: str,
    tokens: Tokens,
    weights: ExpertWeights,
    capacity_factor: float,
    implementation: str = "auto",
    fp8: str = "none",
    fp8_tokens: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sum over each token's choices of weight * expert(x), wherever on the expert axis the experts are.

    Tokens and weights must vary over the same mesh axes; where that includes `tensor`, the result
    is this device's part of a sum over it.

    Args:
      method: all_to_all, all_gather or ring; the same numbers.
      tokens: of this device.
      weights: of this device's experts.
      capacity_factor: capacity of a round, as a multiple of the mean load.
      implementation: `config.moe.experts_implementation`; the same numbers.
      fp8: `config.train.fp8`.
      fp8_tokens: `config.moe.fp8_dispatch`.

    Returns:
      [T, D] in the dtype of x_TD; int32 [], the most rounds that any device ran (in the ring: for one
      device's tokens).

    Raises:
      UserError: kernels were asked for that do not run here.
    """
    chex.assert_rank([*tokens, *weights[:2]], [2, 2, 2, 4, 3])
    chex.assert_equal_shape([tokens.weight_TK, tokens.expert_TK])
    chex.assert_type([tokens.weight_TK, tokens.expert_TK], [jnp.float32, jnp.int32])
    devices = lax.axis_size("expert")
    how = How(*implementations.choose(implementation, tokens.x_TD.dtype, fp8), fp8_tokens)
    if devices == 1:
        if how.kernels:
            return _by_kernels(tokens, weights, how)
        if implementation == "auto" and on_cpu():
            return _on_one_cpu(tokens, weights, how)
    capacity_of = functools.partial(
        expert_capacity,
        top_k=tokens.expert_TK.shape[1],
        experts=devices * weights.gate_up_GDPF.shape[0],
        capacity_factor=capacity_factor,
    )
    exchange = METHODS[method if devices > 1 else "all_to_all"]
    return exchange(tokens, weights, Rounds(capacity_of, how))


def _by_kernels(tokens: Tokens, weights: ExpertWeights, how: How) -> tuple[jax.Array, jax.Array]:
    """All experts are here: no exchange, no rounds."""
    with jax.named_scope("dispatch"):
        rows = block_rows.sort_rows(tokens.expert_TK, weights.gate_up_GDPF.shape[0])
    rounds = _one_if_any(rows.blocks.first_G1[-1])
    assert how.kernels is not None
    return _sorted(tokens, weights, rows, how.kernels, how), rounds


def _on_one_cpu(tokens: Tokens, weights: ExpertWeights, how: How) -> tuple[jax.Array, jax.Array]:
    """The same with rows that fit a CPU."""
    experts = weights.gate_up_GDPF.shape[0]
    count, top_k = tokens.expert_TK.shape
    block = cpu_grouped_matmul.block_size(count, top_k, experts)
    rows = cpu_grouped_matmul.sort_rows(tokens.expert_TK, experts, block)
    rounds = _one_if_any(rows.count_G)
    by_blocks = cpu_grouped_matmul.CpuGroupedMatmul(block)
    return _sorted(tokens, weights, rows, by_blocks, how), rounds


def _sorted(
    tokens: Tokens,
    weights: ExpertWeights,
    rows: sorted_rows.Rows,
    method: sorted_rows.Method,
    how: How,
) -> jax.Array:
    if how.fp8:
        method = InFp8(method, how.fp8)
    return sorted_rows.compute(tokens.x_TD, tokens.weight_TK, weights, rows, method)


def _one_if_any(counts: jax.Array) -> jax.Array:
    """The number of rounds where there are none to run: 1, or 0 if no device has an assignment."""
    return lax.pmax(jnp.any(counts > 0).astype(jnp.int32), TOKEN_AXES)


def _all_to_all(
    tokens: Tokens, weights: ExpertWeights, given: Rounds
) -> tuple[jax.Array, jax.Array]:
    devices, how = lax.axis_size("expert"), given.how
    capacity = given.capacity_of(tokens.x_TD.shape[0])
    experts = devices * weights.gate_up_GDPF.shape[0]
    plan = make_plan(tokens.expert_TK, experts, capacity, devices, how.kernels is not None)
    rounds = lax.pmax(plan.rounds, TOKEN_AXES)
    if devices > 1:
        # A round is a collective: every device must run as many as the one that needs most.
        plan = plan._replace(rounds=rounds)
        if how.kernels:  # they skip places that are empty
            with jax.named_scope("dispatch"):
                count_XG = lax.all_to_all(plan.count_XG, "expert", split_axis=0, concat_axis=0)
            plan = plan._replace(count_XG=count_XG)
    y_TD = exchange_and_compute(
        tokens.x_TD, tokens.weight_TK, weights, plan, capacity, devices, how
    )
    return y_TD, rounds


def _all_gather(
    tokens: Tokens, weights: ExpertWeights, given: Rounds
) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("dispatch"):
        visiting = _moved(tokens, _gathered, _scattered, given.how.fp8_tokens)
    y_TD, rounds = _local_experts(visiting, weights, given)
    with jax.named_scope("combine"):
        y_TD = lax.psum_scatter(y_TD, "expert", tiled=True)
    return y_TD, lax.pmax(rounds, TOKEN_AXES)


def _ring(tokens: Tokens, weights: ExpertWeights, given: Rounds) -> tuple[jax.Array, jax.Array]:
    # In float32, because the scan adds up the weights' gradients over its steps in the dtype it
    # holds them in.
    held = jax.tree.map(lambda w: w.astype(jnp.float32), weights)

    def visit(travelling, _):
        visiting, y_TD = travelling
        here = jax.tree.map(lambda w: w.astype(visiting.x_TD.dtype), held)
        more_TD, rounds = _local_experts(visiting, here, given)
        with jax.named_scope("dispatch"):
            visiting = _moved(visiting, _to_next, _to_last, given.how.fp8_tokens)
        with jax.named_scope("combine"):
            y_TD = _to_next(y_TD + more_TD)
        return (visiting, y_TD), rounds

    start = tokens, jnp.zeros_like(tokens.x_TD)
    (_, y_TD), rounds = lax.scan(visit, start, length=lax.axis_size("expert"))
    return y_TD, lax.pmax(jnp.max(rounds), TOKEN_AXES)


METHODS = {"all_to_all": _all_to_all, "all_gather": _all_gather, "ring": _ring}


Move = Callable[[jax.Array], jax.Array]


def _moved(tokens: Tokens, move: Move, back: Move, in_fp8: bool) -> Tokens:
    """Tokens and their choices at other devices.

    Args:
      move: what each array goes through.
      back: its transpose.
      in_fp8: tokens go in FP8; their gradients come back in the compute dtype.
    """
    x_TD, *choices = tokens
    there = [checkpoint_name(move(a), "exchange") for a in choices]
    if not in_fp8:
        return Tokens(checkpoint_name(move(x_TD), "exchange"), *there)

    def forward(x_TD):
        bytes_TW = checkpoint_name(move(encode(x_TD)), "exchange")
        return decode(bytes_TW, x_TD.dtype)

    def forward_and_nothing(x_TD):
        return forward(x_TD), None

    def backward(_, dx_TD):
        return (back(dx_TD),)

    sent = jax.custom_vjp(forward)
    sent.defvjp(forward_and_nothing, backward)
    return Tokens(sent(x_TD), *there)


def _gathered(a: jax.Array) -> jax.Array:
    """The arrays of all devices of the expert axis."""
    return lax.all_gather(a, "expert", tiled=True)


def _scattered(a: jax.Array) -> jax.Array:
    """The sum of all devices' arrays, each device its part: the transpose of `_gathered`."""
    return lax.psum_scatter(a, "expert", tiled=True)


def _to_next(a: jax.Array) -> jax.Array:
    """Each device's array to the next device of the expert axis."""
    devices = lax.axis_size("expert")
    return lax.ppermute(a, "expert", [(i, (i + 1) % devices) for i in range(devices)])


def _to_last(a: jax.Array) -> jax.Array:
    """To the one before it: the transpose of `_to_next`."""
    devices = lax.axis_size("expert")
    return lax.ppermute(a, "expert", [((i + 1) % devices, i) for i in range(devices)])


def _local_experts(
    tokens: Tokens, weights: ExpertWeights, given: Rounds
) -> tuple[jax.Array, jax.Array]:
    """What this device's experts add to tokens from anywhere, and the rounds they took.

    Nothing is exchanged in these rounds, so devices need not agree on their number.
    """
    local = weights.gate_up_GDPF.shape[0]
    here_TK = tokens.expert_TK - lax.axis_index("expert") * local
    here_TK = jnp.where((here_TK >= 0) & (here_TK < local), here_TK, local)
    capacity = given.capacity_of(tokens.x_TD.shape[0])
    plan = make_plan(here_TK, local, capacity, 1, given.how.kernels is not None)
    y_TD = exchange_and_compute(
        tokens.x_TD, tokens.weight_TK, weights, plan, capacity, 1, given.how
    )
    return y_TD, plan.rounds
