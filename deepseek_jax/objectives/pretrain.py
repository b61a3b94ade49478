"""Pretraining: cross-entropy of the next token and, weighted, of multi-token prediction. Shape letters:
model/layers.py.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import IGNORE, Config
from deepseek_jax.data import fields
from deepseek_jax.model import head, logit_functions
from deepseek_jax.model.taps import Asked
from deepseek_jax.model.transformer import Output, Transformer, tokens_ahead
from deepseek_jax.objectives.base import Batch, Frozen, FrozenOutput, Parts
from deepseek_jax.objectives.routing import count


class Totals(NamedTuple):
    """Of the whole batch of a step."""

    targets: jax.Array  # float32: positions that predict something
    mtp_targets: jax.Array  # float32 [depth]: the same of each prediction depth
    mtp_weight: jax.Array  # float32: of multi-token prediction at this step


class Pretraining:
    """Mean cross-entropy over the scored tokens (`targets`) of a step's batch."""

    taps: Asked = ()

    def __init__(self, config: Config):
        self.config = config
        self.depths = config.model.num_nextn_predict_layers
        read = [*fields.INPUTS, "targets", *(["next_tokens"] if self.depths else [])]
        self.fields = {name: fields.TEXT[name] for name in read}

    def frozen(self, mesh: jax.sharding.Mesh) -> Frozen | None:
        return None

    def totals(self, batch: Batch, step: jax.Array) -> Totals:
        targets, segment_ids = batch["targets"], batch["segment_ids"]
        ahead = [
            count(tokens_ahead(targets, segment_ids, depth + 1, IGNORE) != IGNORE)
            for depth in range(self.depths)
        ]
        t = self.config.train
        mtp_weight = jnp.where(
            step < round(t.mtp_switch_fraction * t.steps),
            t.mtp_loss_weight,
            t.mtp_loss_weight_final,
        )
        mtp_targets = jnp.stack(ahead) if ahead else jnp.zeros(0)
        return Totals(count(targets != IGNORE), mtp_targets, mtp_weight)

    @jax.named_scope("loss")
    def loss(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        totals: Totals,
        frozen_out: FrozenOutput | None = None,
    ) -> tuple[jax.Array, Parts]:
        """lm_loss and mtp_loss are unweighted, in nats per token; depth d of multi-token prediction is scored
        where the target of its own position, d further on, is.
        """
        total = cross_entropy_sum(out.hidden_BSD, model, batch["targets"])
        lm = total / jnp.maximum(totals.targets, 1)
        if not out.mtp_hidden_BSD:
            return lm, {"lm_loss": lm}
        mtp = self.multi_token_prediction(model, out, batch, totals)
        return lm + totals.mtp_weight * mtp, {"lm_loss": lm, "mtp_loss": mtp}

    def multi_token_prediction(
        self, model: Transformer, out: Output, batch: Batch, totals: Totals
    ) -> jax.Array:
        """A micro-batch's share of its loss: the mean over the depths, unweighted."""
        mtp = jnp.float32(0)
        for depth, hidden in enumerate(out.mtp_hidden_BSD):
            ahead = tokens_ahead(batch["targets"], batch["segment_ids"], depth + 1, IGNORE)
            mtp += (
                cross_entropy_sum(hidden, model, ahead)
                / jnp.maximum(totals.mtp_targets[depth], 1)
                / len(out.mtp_hidden_BSD)
            )
        return mtp

    def measure(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        frozen_out: FrozenOutput | None = None,
    ) -> Parts:
        """nll: the sum of -log p over the targets, of the main head only."""
        return {"nll": cross_entropy_sum(out.hidden_BSD, model, batch["targets"])}

    def figures(self, sums: dict[str, float]) -> dict[str, Any]:
        return text_figures(sums)


def cross_entropy_sum(
    hidden_BSD: jax.Array, model: Transformer, targets_BS: jax.Array
) -> jax.Array:
    """Sum of -log p(target) over positions with a target, float32; by the output head of the model."""
    return head.scan_vocab_sum(logit_functions.cross_entropy, hidden_BSD, model.head, targets_BS)[0]


def text_figures(sums: dict[str, float]) -> dict[str, Any]:
    """Nats per token and, where the tokenizer knows its bytes, bits per byte, from the sum `nll`."""
    out = {"eval_loss": sums["nll"] / sums["targets"], "eval_tokens": int(sums["targets"])}
    if sums["text_bytes"]:
        out["eval_bits_per_byte"] = sums["nll"] / math.log(2) / sums["text_bytes"]
    return out
