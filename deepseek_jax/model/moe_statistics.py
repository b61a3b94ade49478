"""What a MoE layer counts: where assignments went, and the sums that the router's losses are made of. Shape
letters: layers.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.router import Routing
from deepseek_jax.parallel.mesh import TOKEN_AXES


class Load(NamedTuple):
    """Where the assignments of the global batch went: integers, the same on every device, without gradient.

    W: the devices of data x fsdp x expert, row-major. Padding counts nowhere. Stacked over layers,
    leaves have a leading [L].
    """

    expert_counts: jax.Array  # int32 [E]: assignments as the router chose, dropped ones included
    rounds: jax.Array  # int32 []: most dispatch rounds that any device ran
    dropped_counts: jax.Array  # int32 [E]: assignments dropped, by expert
    received: jax.Array  # int32 [W]: assignments that arrived at each device's experts
    dropped_from: jax.Array  # int32 [W]: assignments dropped, by the device of their token
    # int32 []: assignments, not dropped, whose expert lies on another device than their token
    left: jax.Array


class MoEStats(NamedTuple):
    """Routing statistics of the global batch: summed over all devices, the same on each.

    Stacked over layers by the scan, leaves have a leading [L].

    The sums are differentiable in the router's scores; objectives/routing.py turns them into losses.
    """

    load: Load
    # float32 []: sum over sequences of sum_i f_i P_i (V3, equations 17 to 20)
    sequence_balance: jax.Array
    score_sum: jax.Array  # float32 [E]: sum over tokens of the normalised scores
    z_sum: jax.Array  # float32 []: sum over tokens of logsumexp(logits)^2


def merge_loads(loads: Load, axis: int = 0) -> Load:
    """The load of several micro-batches, stacked along `axis`, as one: sums; of the rounds the most."""
    return jax.tree.map(lambda a: jnp.sum(a, axis=axis), loads)._replace(
        rounds=jnp.max(loads.rounds, axis=axis)
    )


def merge_stats(stats: MoEStats | None, axis: int) -> MoEStats | None:
    """Statistics of parts of a batch, stacked along an axis, to those of all of it."""
    if stats is None:
        return None
    return jax.tree.map(lambda a: jnp.sum(a, axis), stats)._replace(
        load=merge_loads(stats.load, axis)
    )


def join_layers(stats: MoEStats | None, more: MoEStats | None) -> MoEStats | None:
    """Statistics [L, ...] of layers and of those after them; either may be None."""
    if stats is None or more is None:
        return more if stats is None else stats
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stats, more)


def load_of(chosen_E: jax.Array, kept_E: jax.Array, rounds: jax.Array) -> Load:
    """The global load.

    Args:
      chosen_E: int32, this device's assignments of each expert.
      kept_E: int32, those not dropped.
      rounds: int32 [], the most that any device ran.
    """
    groups, devices = lax.axis_size(("data", "fsdp")), lax.axis_size("expert")
    group, device = lax.axis_index(("data", "fsdp")), lax.axis_index("expert")
    # To each device of this one's expert group.
    sent_X = jnp.sum(kept_E.reshape(devices, -1), axis=1)
    mine_YX = (jnp.arange(groups) == group)[:, None] & (jnp.arange(devices) == device)

    def total(a: jax.Array) -> jax.Array:
        return lax.psum(a, TOKEN_AXES)

    return Load(
        expert_counts=total(chosen_E),
        rounds=rounds,
        dropped_counts=total(chosen_E - kept_E),
        received=total(jnp.where((jnp.arange(groups) == group)[:, None], sent_X, 0).reshape(-1)),
        dropped_from=total(jnp.where(mine_YX, jnp.sum(chosen_E - kept_E), 0).reshape(-1)),
        left=total(jnp.sum(sent_X) - sent_X[device]),
    )


def count_per_sequence(expert_BN: jax.Array, experts: int) -> jax.Array:
    """int32 [B, E]: how often each expert is in each sequence; numbers out of range are not counted."""
    sequences = expert_BN.shape[0]
    sequence_B1 = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    sequence_BN = jnp.broadcast_to(sequence_B1, expert_BN.shape)
    zeros_BE = jnp.zeros_like(expert_BN, shape=(sequences, experts))
    return zeros_BE.at[sequence_BN, expert_BN].add(1, mode="drop")


@jax.named_scope("route")
def statistics_of(
    routing: Routing, count_BE: jax.Array, valid_BS: jax.Array, load: Load, m: ModelConfig
) -> MoEStats:
    b, s = valid_BS.shape
    valid_BS1 = valid_BS[:, :, None].astype(jnp.float32)
    score_BSE = (
        routing.score_TE / (jnp.sum(routing.score_TE, axis=-1, keepdims=True) + 1e-20)
    ).reshape(b, s, -1) * valid_BS1
    length_B1 = jnp.maximum(jnp.sum(valid_BS1, axis=1), 1.0)
    f_BE = count_BE.astype(jnp.float32) * m.n_routed_experts / (m.num_experts_per_tok * length_B1)
    p_BE = jnp.sum(score_BSE, axis=1) / length_B1
    z_T = jax.nn.logsumexp(routing.logit_TE, axis=-1) ** 2 * valid_BS1.reshape(-1)
    return MoEStats(
        load=load,
        sequence_balance=lax.psum(jnp.sum(f_BE * p_BE), TOKEN_AXES),
        score_sum=lax.psum(jnp.sum(score_BSE, axis=(0, 1)), TOKEN_AXES),
        z_sum=lax.psum(jnp.sum(z_T), TOKEN_AXES),
    )
