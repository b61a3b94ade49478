"""From the model's output to one number. Shape letters: model/layers.py.

Every term is a sum over tokens or sequences divided by a total of the whole batch of the step (`Totals`), not of the
micro-batch: so micro-batches add up, and the gradient under accumulation equals that of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Model
from deepseek_jax.model.moe import MoEStats
from deepseek_jax.model.stages import through_stages
from deepseek_jax.model.transformer import Output, Transformer, tokens_ahead
from deepseek_jax.parallel.pipeline import make_schedule

IGNORE = -100  # target id of a position that predicts nothing, as in Hugging Face
LOSS_CHUNK = 512  # positions of a sequence whose logits are alive at a time

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions: int32 [B, S]


class Totals(NamedTuple):
    """Denominators over the whole batch of a step, and what the batch-level balance loss needs of it."""

    targets: jax.Array  # float32: positions that predict something
    mtp_targets: jax.Array  # float32 [depth]
    tokens: jax.Array  # float32: positions that are not padding
    sequences: jax.Array  # float32: sequences that are not all padding
    expert_counts: jax.Array | None  # int32 [L, E], only for seq_aux=False with aux_loss_alpha above 0

    def layer_tokens(self, model: Model) -> jax.Array:
        """float32 [L]: tokens that each MoE layer and then each MTP layer routes; an MTP layer lacks those without a next token."""
        main = jnp.full(model.num_hidden_layers - model.first_k_dense_replace, self.tokens)
        return jnp.maximum(jnp.concatenate([main, self.targets[None], self.mtp_targets])[: len(main) + len(self.mtp_targets)], 1)


class Losses(NamedTuple):
    """The loss and its parts, float32 scalars, as shares of the whole batch."""

    loss: jax.Array  # what is differentiated: all weighted parts
    lm_loss: jax.Array  # cross-entropy in nats a token
    mtp_loss: jax.Array  # the same of multi-token prediction, mean over depths
    balance_loss: jax.Array  # unweighted, mean over layers
    z_loss: jax.Array  # unweighted, mean over layers


def totals(batch: Batch, depths: int, expert_counts: jax.Array | None = None) -> Totals:
    """The denominators of a whole batch; its arrays may have any leading axes before S."""
    targets, segment_ids = batch["targets"], batch["segment_ids"]
    count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
    ahead = [count(tokens_ahead(targets, segment_ids, d + 1, IGNORE) != IGNORE) for d in range(depths)]
    valid = segment_ids > 0
    return Totals(count(targets != IGNORE), jnp.stack(ahead) if ahead else jnp.zeros(0), count(valid), count(jnp.any(valid, axis=-1)), expert_counts)


def cross_entropy_sum(hidden_BSD: jax.Array, kernel_DV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    """Sum of -log p(target) over positions with a target, in float32.

    Goes along the sequence in chunks of LOSS_CHUNK positions that are recomputed in the backward pass: the logits of the
    whole batch never exist.
    """

    @jax.checkpoint
    def chunk(hidden, targets):
        logits = jnp.einsum("bsd,dv->bsv", hidden, kernel_DV, preferred_element_type=jnp.float32)
        # A sum over a one-hot mask, not a gather: its transpose stays sharded as the logits are.
        here = targets[..., None] == jnp.arange(logits.shape[-1])
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
        return jnp.sum(jnp.where(targets == IGNORE, 0.0, nll))

    length = hidden_BSD.shape[1]
    return sum(chunk(hidden_BSD[:, i : i + LOSS_CHUNK], targets_BS[:, i : i + LOSS_CHUNK]) for i in range(0, length, LOSS_CHUNK))


def balance_loss(stats: MoEStats, total: Totals, config: Config) -> jax.Array:
    """Unweighted balance loss, mean over layers: 1 when the load is even.

    Per sequence (`seq_aux`): DeepSeek-V3 equations 17 to 20, and DeepSeek-V2's expert-level loss, which is the same formula
    with softmax scores. Over the whole batch: as DeepSeek-V2's released code with seq_aux=False; f comes from the whole
    step's counts and has no gradient.
    """
    m = config.model
    if m.seq_aux:
        return jnp.mean(stats.sequence_balance) / jnp.maximum(total.sequences, 1)
    if total.expert_counts is None:
        return jnp.float32(0)
    tokens_L1 = total.layer_tokens(m)[:, None]
    f_LE = total.expert_counts.astype(jnp.float32) * m.n_routed_experts / (m.num_experts_per_tok * tokens_L1)
    return jnp.mean(jnp.sum(f_LE * stats.score_sum / tokens_L1, axis=-1))


def next_token_loss(model: Transformer, out: Output, batch: Batch, total: Totals, config: Config,
                    mtp_weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of the next token and, weighted, of multi-token prediction: a micro-batch's share of the batch's.

    Returns:
      (loss, its next-token part, its unweighted multi-token part), float32.
    """
    targets, kernel = batch["targets"], model.head_kernel()
    lm = cross_entropy_sum(out.hidden_BSD, kernel, targets) / jnp.maximum(total.targets, 1)
    loss, mtp = lm, jnp.float32(0)
    for depth, hidden in enumerate(out.mtp_hidden_BSD):
        ahead = tokens_ahead(targets, batch["segment_ids"], depth + 1, IGNORE)
        mtp += cross_entropy_sum(hidden, kernel, ahead) / jnp.maximum(total.mtp_targets[depth], 1) / len(out.mtp_hidden_BSD)
    if out.mtp_hidden_BSD:
        loss += mtp_weight * mtp
    return loss, lm, mtp


def routing_loss(stats: MoEStats | None, total: Totals, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weighted sum of balance and z-loss, unweighted balance loss, unweighted z-loss), float32."""
    if stats is None:
        return jnp.float32(0), jnp.float32(0), jnp.float32(0)
    balance = balance_loss(stats, total, config)
    z = jnp.mean(stats.z_sum / total.layer_tokens(config.model))
    # The papers add the balance loss of every layer; the reported value is their mean.
    layers = stats.z_sum.shape[0]
    return layers * (config.model.aux_loss_alpha * balance + config.moe.router_z_loss_coef * z), balance, z


def pretraining_loss(model: Transformer, batch: Batch, total: Totals, config: Config, mtp_weight: jax.Array,
                     token_loss: Callable = next_token_loss) -> tuple[jax.Array, tuple[Losses, MoEStats | None]]:
    """The loss with all its terms.

    Args:
      batch: one micro-batch [B, S], or with stages all of a step's [A, B, S], which go through them as a pipeline.
      total: denominators of the whole batch. mtp_weight: float32 weight of the MTP loss.
      token_loss: what is made of the model's output, with the signature of `next_token_loss`.

    Returns:
      (loss, (all parts, statistics)).
    """

    def head(model, micro, out, given):
        return token_loss(model, out, micro, given[0], config, given[1])

    if batch["tokens"].ndim == 3:
        stages = jax.sharding.get_abstract_mesh().shape["stage"]
        given = (total._replace(expert_counts=None), mtp_weight)
        (loss, lm, mtp), stats = through_stages(model, make_schedule(config, stages, batch["tokens"].shape[0]), batch, given, head)
    else:
        out = model(batch["tokens"], batch["segment_ids"], batch["positions"], batch["targets"])
        (loss, lm, mtp), stats = head(model, batch, out, (total, mtp_weight)), out.stats
    extra, balance, z = routing_loss(stats, total, config)
    return loss + extra, (Losses(loss + extra, lm, mtp, balance, z), stats)
