"""How tokens meet experts: pure functions that run on one device, inside the one per_device of model/moe.py.

Three methods, the same numbers (`config.moe.dispatch`):
- all_to_all: each token's rows are sent to the devices of its experts, and the results back, round by round.
- all_gather: every device gathers the tokens of the whole expert axis and runs its experts on those that chose them; a
  reduce-scatter adds the weighted outputs and gives each device its own tokens'.
- ring: tokens travel around the expert axis with the sum of their weighted outputs, to which each device's experts add.

All work by the rounds of experts/rounds.py, so none ever drops a token or lets memory depend on the routing. Tokens that visit
other devices bring their choices: the experts of other devices are nowhere there, and the rounds exchange nothing.
Shape letters: experts/rounds.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.experts import cpu_blocks
from deepseek_jax.experts.rounds import (
    exchange_and_compute,
    make_plan,
    slots_per_round,
    sort_by_expert,
)
from deepseek_jax.parallel.mesh import TOKEN_AXES, on_cpu


def drop(
    expert_TK: jax.Array, weight_TK: jax.Array, experts: int, slots: int, policy: str
) -> jax.Array:
    """Sends nowhere what is beyond the first `slots` assignments of each expert on this device.

    Args:
      expert_TK: int32, `experts` for padding.
      policy: "position" keeps the earliest tokens; "probability" (or "probs") the highest weights, of equal ones the earliest.

    Returns:
      expert_TK with `experts` for the dropped. As it happens before any exchange, all methods drop the same.
    """
    by_weight = None if policy == "position" else lax.stop_gradient(weight_TK)
    rank_TK = sort_by_expert(expert_TK, experts, by_weight)[2]
    return jnp.where(rank_TK < slots, expert_TK, experts)


def dispatch(
    method: str,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    expert_TK: jax.Array,
    gate_up_GDPF: jax.Array,
    down_GFD: jax.Array,
    capacity_factor: float,
) -> tuple[jax.Array, jax.Array]:
    """Sum over each token's choices of weight * expert(x), wherever on the expert axis the experts are.

    Args:
      x_TD: tokens in the compute dtype. weight_TK: float32.
      expert_TK: int32 in [0, E]; E means nowhere and costs nothing.
      gate_up_GDPF, down_GFD: this device's experts, in the compute dtype. They, x_TD and weight_TK must vary over the same mesh
        axes; where that includes `tensor`, the result is this device's part of a sum over it.
      capacity_factor: places of a round, as a multiple of the mean load.

    Returns:
      (y [T, D] in the dtype of x_TD; int32, the most rounds that any device ran, in the ring for one device's tokens)
    """
    devices, local = lax.axis_size("expert"), gate_up_GDPF.shape[0]
    if devices == 1 and on_cpu():
        return _here(x_TD, weight_TK, expert_TK, gate_up_GDPF, down_GFD)
    method = (
        _all_to_all
        if devices == 1
        else {"all_to_all": _all_to_all, "all_gather": _all_gather, "ring": _ring}[method]
    )
    top_k, experts = expert_TK.shape[1], devices * local
    places = functools.partial(
        slots_per_round, top_k=top_k, experts=experts, capacity_factor=capacity_factor
    )
    return method(x_TD, weight_TK, expert_TK, gate_up_GDPF, down_GFD, places, devices)


def _here(x_TD, weight_TK, expert_TK, gate_up, down):
    """All experts are here, on a CPU."""
    experts = gate_up.shape[0]
    block = cpu_blocks.block_rows(*expert_TK.shape, experts)
    rows = cpu_blocks.lay_out(expert_TK, experts, block)
    rounds = lax.pmax(jnp.any(rows.count_G > 0).astype(jnp.int32), TOKEN_AXES)
    return cpu_blocks.compute(x_TD, weight_TK, gate_up, down, rows, block), rounds


def _all_to_all(x_TD, weight_TK, expert_TK, gate_up, down, places, devices):
    slots = places(x_TD.shape[0])
    plan = make_plan(expert_TK, devices * gate_up.shape[0], slots)
    rounds = lax.pmax(plan.rounds, TOKEN_AXES)
    if devices > 1:
        plan = plan._replace(
            rounds=rounds
        )  # a round is a collective: every device must run as many as the one that needs most
    return exchange_and_compute(x_TD, weight_TK, gate_up, down, plan, slots, devices), rounds


def _all_gather(x_TD, weight_TK, expert_TK, gate_up, down, places, devices):
    with jax.named_scope("dispatch"):
        visiting = [
            checkpoint_name(lax.all_gather(a, "expert", tiled=True), "exchange")
            for a in (x_TD, weight_TK, expert_TK)
        ]
    y, rounds = _visited(*visiting, gate_up, down, places)
    with jax.named_scope("combine"):
        y = lax.psum_scatter(y, "expert", tiled=True)
    return y, lax.pmax(rounds, TOKEN_AXES)


def _ring(x_TD, weight_TK, expert_TK, gate_up, down, places, devices):
    # The scan adds up the weights' gradients over its steps in the dtype it holds them in.
    held = gate_up.astype(jnp.float32), down.astype(jnp.float32)

    def visit(travelling, _):
        x, weight, expert, y = travelling
        more, rounds = _visited(x, weight, expert, *(w.astype(x.dtype) for w in held), places)
        with jax.named_scope("dispatch"):
            tokens = [
                checkpoint_name(_to_next(a, devices), "exchange") for a in (x, weight, expert)
            ]
        with jax.named_scope("combine"):
            y = _to_next(y + more, devices)
        return (*tokens, y), rounds

    (_, _, _, y), rounds = lax.scan(
        visit, (x_TD, weight_TK, expert_TK, jnp.zeros_like(x_TD)), length=devices
    )
    return y, lax.pmax(jnp.max(rounds), TOKEN_AXES)


def _to_next(a: jax.Array, devices: int) -> jax.Array:
    """What the device before on the expert axis has."""
    return lax.ppermute(a, "expert", [(i, (i + 1) % devices) for i in range(devices)])


def _visited(x_TD, weight_TK, expert_TK, gate_up, down, places):
    """What this device's experts add to tokens from anywhere, and the rounds they took: nothing is exchanged in them, so devices
    need not agree on their number."""
    local = gate_up.shape[0]
    here_TK = expert_TK - lax.axis_index("expert") * local
    here_TK = jnp.where((here_TK >= 0) & (here_TK < local), here_TK, local)
    slots = places(x_TD.shape[0])
    plan = make_plan(here_TK, local, slots)
    return exchange_and_compute(x_TD, weight_TK, gate_up, down, plan, slots, 1), plan.rounds
