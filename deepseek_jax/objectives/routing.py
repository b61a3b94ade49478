"""The router's losses, the same for all objectives: balance and z-loss. Shape letters: model/layers.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.model.moe_statistics import MoEStats
from deepseek_jax.model.transformer import tokens_ahead
from deepseek_jax.objectives.base import Batch, Parts


class RoutingTotals(NamedTuple):
    """Denominators over the whole batch of a step, and what the batch-level balance loss needs of it."""

    tokens: jax.Array  # float32: positions that are not padding
    sequences: jax.Array  # float32: sequences that are not all padding
    # float32 [depth]: tokens that each MTP layer routes: those with a next token that far ahead
    mtp_tokens: jax.Array
    # int32 [L, E], only for seq_aux=False with aux_loss_alpha above 0
    expert_counts: jax.Array | None

    def layer_tokens(self, model: ModelConfig) -> jax.Array:
        """float32 [L]: tokens that each MoE layer and then each MTP layer routes, at least 1."""
        main = jnp.full(model.num_hidden_layers - model.first_k_dense_replace, self.tokens)
        return jnp.maximum(jnp.concatenate([main, self.mtp_tokens]), 1)


def routing_totals(
    batch: Batch, model: ModelConfig, expert_counts: jax.Array | None = None
) -> RoutingTotals:
    """Of a whole batch, whose arrays may have any axes before S."""
    segment_ids, next_tokens = batch["segment_ids"], batch.get("next_tokens")
    depths = 0 if next_tokens is None else model.num_nextn_predict_layers
    mtp_tokens = [
        count(tokens_ahead(next_tokens, segment_ids, depth, -1) >= 0) for depth in range(depths)
    ]
    valid = segment_ids > 0
    return RoutingTotals(
        count(valid),
        count(jnp.any(valid, axis=-1)),
        jnp.stack(mtp_tokens) if mtp_tokens else jnp.zeros(0),
        expert_counts,
    )


def count(mask: jax.Array) -> jax.Array:
    """How many are true, float32."""
    return jnp.sum(mask, dtype=jnp.float32)


def balance_loss(stats: MoEStats, total: RoutingTotals, config: Config) -> jax.Array:
    """Unweighted balance loss, mean over layers: 1 when the load is even.

    Per sequence (`seq_aux`): DeepSeek-V3 equations 17 to 20, and DeepSeek-V2's expert-level loss, which is
    the same formula with softmax scores. Over the whole batch: as DeepSeek-V2's released code with
    seq_aux=False; f comes from the whole step's counts and has no gradient.
    """
    m = config.model
    if m.seq_aux:
        return jnp.mean(stats.sequence_balance) / jnp.maximum(total.sequences, 1)
    if total.expert_counts is None:
        return jnp.float32(0)
    tokens_L1 = total.layer_tokens(m)[:, None]
    f_LE = (
        total.expert_counts.astype(jnp.float32)
        * m.n_routed_experts
        / (m.num_experts_per_tok * tokens_L1)
    )
    return jnp.mean(jnp.sum(f_LE * stats.score_sum / tokens_L1, axis=-1))


@jax.named_scope("loss")
def routing_loss(
    stats: MoEStats | None, total: RoutingTotals, config: Config
) -> tuple[jax.Array, Parts]:
    """(weighted sum of balance and z-loss, both unweighted as means over layers), float32. 0 for a model
    without experts.
    """
    if stats is None:
        return jnp.float32(0), {"balance_loss": jnp.float32(0), "z_loss": jnp.float32(0)}
    balance = balance_loss(stats, total, config)
    z = jnp.mean(stats.z_sum / total.layer_tokens(config.model))
    # The papers add the balance loss of every layer; the reported value is their mean.
    layers = stats.z_sum.shape[0]
    weighted = layers * (config.model.aux_loss_alpha * balance + config.moe.router_z_loss_coef * z)
    return weighted, {"balance_loss": balance, "z_loss": z}
