"""From the model's output to one number. Shape letters: model/layers.py.

Every term is a sum over tokens or sequences divided by a total of the whole batch of the step (`Totals`), not of the
micro-batch: so micro-batches add up, and the gradient under accumulation equals that of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import IGNORE, Config, ModelConfig
from deepseek_jax.model.moe import MoEStats
from deepseek_jax.model.stages import through_stages
from deepseek_jax.model.transformer import Output, Transformer, tokens_ahead
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.parallel.weights import gathered, stored

LOSS_CHUNK = 1024  # tokens of a device whose logits are alive at a time

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions: int32 [B, S]


class Totals(NamedTuple):
    """Denominators over the whole batch of a step, and what the batch-level balance loss needs of it."""

    targets: jax.Array  # float32: positions that predict something
    mtp_targets: jax.Array  # float32 [depth]
    tokens: jax.Array  # float32: positions that are not padding
    sequences: jax.Array  # float32: sequences that are not all padding
    expert_counts: (
        jax.Array | None
    )  # int32 [L, E], only for seq_aux=False with aux_loss_alpha above 0

    def layer_tokens(self, model: ModelConfig) -> jax.Array:
        """float32 [L]: tokens that each MoE layer and then each MTP layer routes; an MTP layer lacks those without a next token."""
        main = jnp.full(model.num_hidden_layers - model.first_k_dense_replace, self.tokens)
        return jnp.maximum(
            jnp.concatenate([main, self.targets[None], self.mtp_targets])[
                : len(main) + len(self.mtp_targets)
            ],
            1,
        )


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
    ahead = [
        count(tokens_ahead(targets, segment_ids, d + 1, IGNORE) != IGNORE) for d in range(depths)
    ]
    valid = segment_ids > 0
    return Totals(
        count(targets != IGNORE),
        jnp.stack(ahead) if ahead else jnp.zeros(0),
        count(valid),
        count(jnp.any(valid, axis=-1)),
        expert_counts,
    )


def cross_entropy_sum(
    hidden_BSD: jax.Array, model: Transformer, targets_BS: jax.Array
) -> jax.Array:
    """Sum of -log p(target) over positions with a target, in float32; log p by the output head of the model.

    The logits of the whole batch never exist: every device goes through its tokens in chunks, and adds up the gradients of
    hidden states and head on the way, so that the head's is reduced over the mesh once.
    """
    arrays, specs = stored(model.head)

    def one_device(hidden_BSD, targets_BS, *arrays):
        weight = gathered(arrays, specs, hidden_BSD.dtype)
        kernel_DV = weight.T if model.config.tie_word_embeddings else weight
        hidden_TD = jax.lax.pcast(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), "tensor", to="varying"
        )
        return jax.lax.psum(_nll_sum(hidden_TD, kernel_DV, targets_BS.reshape(-1)), BATCH_AXES)

    batch = jax.P(BATCH_AXES)
    return per_device(one_device, (batch, batch, *specs), jax.P())(hidden_BSD, targets_BS, *arrays)


def token_nll(
    hidden_BSD: jax.Array, model: Transformer, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of every position: float32 -log p(target), 0 without a target, and whether no token is likelier than it. Both [B, S].

    For evaluation: like `cross_entropy_sum` in chunks, without its gradients.
    """
    arrays, specs = stored(model.head)

    def one_device(hidden_BSD, targets_BS, *arrays):
        weight = gathered(arrays, specs, hidden_BSD.dtype)
        kernel_DV = weight.T if model.config.tie_word_embeddings else weight
        hidden_TD = jax.lax.pcast(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), "tensor", to="varying"
        )

        def step(carry, chunk):
            nll_C, _, _, likeliest_C = _nll(chunk[0], kernel_DV, chunk[1])
            return carry, (nll_C, likeliest_C)

        _, out = jax.lax.scan(step, None, _chunks(hidden_TD, targets_BS.reshape(-1)))
        return tuple(a.reshape(-1)[: targets_BS.size].reshape(targets_BS.shape) for a in out)

    batch = jax.P(BATCH_AXES)
    return per_device(one_device, (batch, batch, *specs), (batch, batch))(
        hidden_BSD, targets_BS, *arrays
    )


@jax.custom_vjp
def _nll_sum(hidden_TD: jax.Array, kernel_DV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """One device's part of `cross_entropy_sum`; V is its part of the vocabulary, T its tokens, C those of a chunk."""
    step = lambda total, chunk: (total + jnp.sum(_nll(chunk[0], kernel_DV, chunk[1])[0]), None)
    chunks = _chunks(hidden_TD, targets_T)
    return jax.lax.scan(step, _zero(hidden_TD), chunks)[0]


def _nll_sum_forward(hidden_TD, kernel_DV, targets_T):
    """The sum with its gradients: they need the logits, which would have to be made again later."""

    def step(carry, chunk):
        (total, dkernel_DV), (hidden_CD, targets_C) = carry, chunk
        nll_C, probability_CV, here_CV, _ = _nll(hidden_CD, kernel_DV, targets_C)
        dlogits_CV = jnp.where((targets_C == IGNORE)[:, None], 0.0, probability_CV - here_CV)
        dlogits_CV = (dlogits_CV * _lift(hidden_CD.dtype)).astype(hidden_CD.dtype)
        dhidden_CD = jnp.einsum("cv,dv->cd", dlogits_CV, kernel_DV)
        dkernel_DV += jnp.einsum(
            "cd,cv->dv", hidden_CD, dlogits_CV, preferred_element_type=jnp.float32
        )
        return (total + jnp.sum(nll_C), dkernel_DV), dhidden_CD

    zero = jnp.zeros_like(kernel_DV, jnp.float32)
    (total, dkernel_DV), dhidden = jax.lax.scan(
        step, (_zero(hidden_TD), zero), _chunks(hidden_TD, targets_T)
    )
    dhidden_TD = dhidden.reshape(-1, hidden_TD.shape[-1])[: hidden_TD.shape[0]]
    # Float16 would overflow: this is the sum over all tokens, not yet divided by their number.
    return total, (
        dhidden_TD,
        dkernel_DV if kernel_DV.dtype == jnp.float16 else dkernel_DV.astype(kernel_DV.dtype),
    )


def _lift(dtype) -> float:
    """A power of two that lifts probabilities, 1e-5 for a word of 100,000, out of what float16 keeps few bits of; the sums stay far from its end."""
    return 1024.0 if dtype == jnp.float16 else 1.0


def _nll_sum_backward(gradients, cotangent):
    dtype = gradients[0].dtype  # of hidden states and head
    return *((g * (cotangent / _lift(dtype))).astype(dtype) for g in gradients), None


_nll_sum.defvjp(_nll_sum_forward, _nll_sum_backward)


def _nll(hidden_CD, kernel_DV, targets_C):
    """(-log p(target), probabilities, which of them is the target's, whether no word is likelier), probabilities of this device's words only."""
    logit_CV = jnp.einsum("cd,dv->cv", hidden_CD, kernel_DV, preferred_element_type=jnp.float32)
    most_C1 = jax.lax.pmax(jnp.max(logit_CV, axis=-1, keepdims=True), "tensor")
    exp_CV = jnp.exp(logit_CV - most_C1)
    total_C1 = jax.lax.psum(jnp.sum(exp_CV, axis=-1, keepdims=True), "tensor")
    words = kernel_DV.shape[1]
    here_CV = (targets_C - jax.lax.axis_index("tensor") * words)[:, None] == jnp.arange(words)
    target_C = jax.lax.psum(jnp.sum(jnp.where(here_CV, logit_CV, 0.0), axis=-1), "tensor")
    nll_C = jnp.log(total_C1[:, 0]) + most_C1[:, 0] - target_C
    return (
        jnp.where(targets_C == IGNORE, 0.0, nll_C),
        exp_CV / total_C1,
        here_CV,
        target_C >= most_C1[:, 0],
    )


def _chunks(hidden_TD, targets_T):
    """Both in chunks of LOSS_CHUNK tokens, the last one filled up with tokens that predict nothing."""
    size = min(LOSS_CHUNK, len(targets_T))
    missing = -len(targets_T) % size
    hidden_TD = jnp.pad(hidden_TD, ((0, missing), (0, 0)))
    targets_T = jnp.pad(targets_T, (0, missing), constant_values=IGNORE)
    return hidden_TD.reshape(-1, size, hidden_TD.shape[1]), targets_T.reshape(-1, size)


def _zero(hidden_TD):
    """A float32 0 for the sum, which differs between devices of the batch, not of the tensor axis."""
    return jax.lax.pmax(jnp.zeros_like(hidden_TD, jnp.float32, shape=()), "tensor")


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
    f_LE = (
        total.expert_counts.astype(jnp.float32)
        * m.n_routed_experts
        / (m.num_experts_per_tok * tokens_L1)
    )
    return jnp.mean(jnp.sum(f_LE * stats.score_sum / tokens_L1, axis=-1))


@jax.named_scope("loss")
def next_token_loss(
    model: Transformer,
    out: Output,
    batch: Batch,
    total: Totals,
    config: Config,
    mtp_weight: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of the next token and, weighted, of multi-token prediction: a micro-batch's share of the batch's.

    Returns:
      (loss, its next-token part, its unweighted multi-token part), float32.
    """
    targets = batch["targets"]
    lm = cross_entropy_sum(out.hidden_BSD, model, targets) / jnp.maximum(total.targets, 1)
    loss, mtp = lm, jnp.float32(0)
    for depth, hidden in enumerate(out.mtp_hidden_BSD):
        ahead = tokens_ahead(targets, batch["segment_ids"], depth + 1, IGNORE)
        mtp += (
            cross_entropy_sum(hidden, model, ahead)
            / jnp.maximum(total.mtp_targets[depth], 1)
            / len(out.mtp_hidden_BSD)
        )
    if out.mtp_hidden_BSD:
        loss += mtp_weight * mtp
    return loss, lm, mtp


@jax.named_scope("loss")
def routing_loss(
    stats: MoEStats | None, total: Totals, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weighted sum of balance and z-loss, unweighted balance loss, unweighted z-loss), float32."""
    if stats is None:
        return jnp.float32(0), jnp.float32(0), jnp.float32(0)
    balance = balance_loss(stats, total, config)
    z = jnp.mean(stats.z_sum / total.layer_tokens(config.model))
    # The papers add the balance loss of every layer; the reported value is their mean.
    layers = stats.z_sum.shape[0]
    return (
        layers * (config.model.aux_loss_alpha * balance + config.moe.router_z_loss_coef * z),
        balance,
        z,
    )


def pretraining_loss(
    model: Transformer,
    batch: Batch,
    total: Totals,
    config: Config,
    mtp_weight: jax.Array,
    token_loss: Callable = next_token_loss,
) -> tuple[jax.Array, tuple[Losses, MoEStats | None]]:
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
        (loss, lm, mtp), stats = through_stages(
            model, make_schedule(config, stages, batch["tokens"].shape[0]), batch, given, head
        )
    else:
        out = model(batch["tokens"], batch["segment_ids"], batch["positions"], batch["targets"])
        (loss, lm, mtp), stats = head(model, batch, out, (total, mtp_weight)), out.stats
    extra, balance, z = routing_loss(stats, total, config)
    return loss + extra, (Losses(loss + extra, lm, mtp, balance, z), stats)
