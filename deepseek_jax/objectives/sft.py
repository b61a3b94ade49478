"""Fine-tuning: the scored tokens of examples, which `targets` has; all others are -100. Shape letters:
model/layers.py.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import Config
from deepseek_jax.data import fields
from deepseek_jax.model import head, logit_functions
from deepseek_jax.model.transformer import Output, Transformer
from deepseek_jax.objectives.base import Batch, FrozenOutput, Parts
from deepseek_jax.objectives.pretrain import Pretraining, Totals, text_figures


class FineTuning(Pretraining):
    """Mean loss over the scored tokens of a step's whole batch: however they are divided over examples, rows,
    micro-batches and devices, each counts the same.

    Multi-token prediction is as in pretraining, by cross-entropy: it reads the tokens that follow, and is
    scored where they are.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        if config.sft.neftune_noise_alpha or config.lora.dropout:
            self.fields |= {"row": fields.EXAMPLES["row"]}

    @jax.named_scope("loss")
    def loss(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        totals: Totals,
        frozen_out: FrozenOutput | None = None,
    ) -> tuple[jax.Array, Parts]:
        """As Pretraining; lm_loss is the cross-entropy whatever is minimised, token_accuracy the share of
        scored tokens that no word is likelier than, entropy that of the predictions, in nats.
        """
        loss, lm, accuracy, entropy = (
            s / jnp.maximum(totals.targets, 1) for s in self._sums(model, out, batch["targets"])
        )
        parts = {"lm_loss": lm, "token_accuracy": accuracy, "entropy": entropy}
        if out.mtp_hidden_BSD:
            mtp = self.multi_token_prediction(model, out, batch, totals)
            loss, parts = loss + totals.mtp_weight * mtp, parts | {"mtp_loss": mtp}
        return loss, parts

    def _sums(
        self, model: Transformer, out: Output, targets_BS: jax.Array
    ) -> tuple[jax.Array, ...]:
        """(what is minimised, cross-entropy, correct tokens, entropy), summed up over the targets."""
        s = self.config.sft
        args = out.hidden_BSD, model.head, targets_BS
        if s.loss_type == "dft":
            return head.scan_vocab_sum(logit_functions.dynamic_fine_tuning, *args)
        if s.label_smoothing:
            smoothing = jnp.float32(s.label_smoothing)
            return head.scan_vocab_sum(logit_functions.smoothed_cross_entropy, *args, smoothing)
        nll, *reported = head.scan_vocab_sum(logit_functions.scored_tokens, *args)
        return nll, nll, *reported

    def measure(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        frozen_out: FrozenOutput | None = None,
    ) -> Parts:
        """nll: the sum of -log p over the targets; correct: how many of them no word is likelier than."""
        nll, correct, _ = head.scan_vocab_sum(
            logit_functions.scored_tokens, out.hidden_BSD, model.head, batch["targets"]
        )
        return {"nll": nll, "correct": correct}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return text_figures(sums) | {"eval_token_accuracy": sums["correct"] / sums["targets"]}
