"""Distillation: cross-entropy of the scored tokens, and the divergence of the student's softmax from a
teacher's (model/divergences.py). Shape letters: model/layers.py, and K words of a teacher's list.

The teacher is a frozen model in the step, or a record in the batch: its K likeliest words
(fields.OF_TEACHER), made before the step by one program (distill.top_k) or read from a cache of what it
made.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config.options import IGNORE, Config
from deepseek_jax.data import fields
from deepseek_jax.model import head
from deepseek_jax.model.divergences import TopTeacher, WholeTeacher, kind_of
from deepseek_jax.model.transformer import Output, Transformer, tokens_ahead
from deepseek_jax.objectives import features
from deepseek_jax.objectives.base import Batch, Frozen, FrozenOutput, FrozenSource, Parts
from deepseek_jax.objectives.pretrain import Pretraining, text_figures
from deepseek_jax.objectives.pretrain import Totals as TextTotals


class Totals(NamedTuple):
    """Of the whole batch of a step."""

    text: TextTotals
    alpha: jax.Array  # float32, at this step, as the next two
    temperature: jax.Array
    beta: jax.Array
    inside: features.Totals | None


class Teacher(NamedTuple):
    """What is known of the teacher at each token: `inputs` [B, S, ...] before the targets, and `frozen` for
    model/head.py.
    """

    inputs: tuple[jax.Array, ...] = ()
    frozen: tuple[tuple[jax.Array, head.Head], ...] = ()

    def ahead(self, distance: int) -> "Teacher":
        """What it says `distance` positions further on. Past the end of a sequence: zeros."""
        move = functools.partial(_ahead, distance=distance)
        return Teacher(
            tuple(map(move, self.inputs)), tuple((move(hidden), h) for hidden, h in self.frozen)
        )


class Distillation:
    """(1 - alpha) CE + alpha T^2 D, each a mean over the scored tokens of a step's batch.

    Multi-token prediction layers learn by the same loss: of depth d, which predicts at a token what comes d
    further on, from what the teacher's main head predicts there.
    """

    def __init__(self, config: Config, teacher: FrozenSource | None = None):
        """
        Args:
          teacher: not read before `frozen(mesh).load()`; None where the batch has its record, or only the
            fields are asked for.
        """
        self.config = config
        self._text = Pretraining(config)
        self.fields = self._text.fields
        d = config.distill
        self._source = teacher
        self.recorded = bool(d.cache or d.top_k)
        if config.sft.neftune_noise_alpha or config.lora.dropout:
            self.fields |= {"row": fields.EXAMPLES["row"]}
        if self.recorded:
            self.fields |= fields.of_teacher(d.top_k)
        kind = kind_of(d.beta, "beta" in d.scheduled)
        words = None
        if teacher is not None and teacher.vocab_size < config.model.vocab_size:
            words = teacher.vocab_size  # the student's others are padding
        self._inside = None
        if teacher is not None and not self.recorded:
            self._inside = features.features_of(config, teacher.config.model, teacher.map)
        self.taps = self._inside.taps if self._inside else ()
        self._function = (
            TopTeacher(kind, d.tail_kind) if self.recorded else WholeTeacher(kind, words)
        )

    def frozen(self, mesh: jax.sharding.Mesh) -> Frozen | None:
        if self._source is None or self.recorded:
            return None
        placed = self._source.place(mesh)
        frozen = Frozen(placed, functools.partial(self._source.load, placed))
        return self._inside.ask(frozen, self.config.seed) if self._inside else frozen

    def totals(self, batch: Batch, step: jax.Array) -> Totals:
        names = "alpha", "temperature", "beta"
        alpha, temperature, beta = (scheduled(self.config, name, step) for name in names)
        inside = self._inside.totals(batch) if self._inside else None
        return Totals(self._text.totals(batch, step), alpha, temperature, beta, inside)

    @jax.named_scope("loss")
    def loss(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        totals: Totals,
        frozen_out: FrozenOutput | None = None,
    ) -> tuple[jax.Array, Parts]:
        """lm_loss: CE; kl: the divergence D, unweighted; token_accuracy; teacher_loss: the teacher's CE,
        where all its logits are there. mtp_loss: the loss of multi-token prediction, without its weight.
        hidden_loss and router_loss: as features.py has them.
        """
        teacher, text = self._teacher(batch, frozen_out), totals.text
        sums = self._sums(model, out.hidden_BSD, teacher, batch["targets"], totals)
        loss, lm, kl, *rest = (s / jnp.maximum(text.targets, 1) for s in sums)
        parts = {"lm_loss": lm, "kl": kl, "token_accuracy": rest[-1]}
        if not self.recorded:
            parts["teacher_loss"] = rest[0]
        if out.mtp_hidden_BSD:
            mtp = self._multi_token_prediction(model, out, batch, teacher, totals)
            loss, parts = loss + text.mtp_weight * mtp, parts | {"mtp_loss": mtp}
        if self._inside is None:
            return loss, parts
        assert frozen_out is not None and totals.inside is not None
        inside, found = self._inside.loss(out, batch, totals.inside, frozen_out)
        return loss + inside, parts | found

    def _multi_token_prediction(
        self, model: Transformer, out: Output, batch: Batch, teacher: Teacher, totals: Totals
    ) -> jax.Array:
        """A micro-batch's share of its loss: the mean over the depths."""
        mtp = jnp.float32(0)
        for depth, hidden_BSD in enumerate(out.mtp_hidden_BSD):
            ahead = tokens_ahead(batch["targets"], batch["segment_ids"], depth + 1, IGNORE)
            loss, *_ = self._sums(model, hidden_BSD, teacher.ahead(depth + 1), ahead, totals)
            count = jnp.maximum(totals.text.mtp_targets[depth], 1)
            mtp += loss / count / len(out.mtp_hidden_BSD)
        return mtp

    def _sums(
        self,
        model: Transformer,
        hidden_BSD: jax.Array,
        teacher: Teacher,
        targets_BS: jax.Array,
        totals: Totals,
    ) -> tuple[jax.Array, ...]:
        """The values of the loss function, summed up over the targets."""
        inputs = teacher.inputs
        if self.recorded:
            ids, values, lse = inputs
            inputs = ids, values, lse[..., 1]
        scalars = totals.alpha, totals.temperature, totals.beta
        return head.scan_vocab_sum(
            self._function,
            hidden_BSD,
            model.head,
            *inputs,
            targets_BS,
            *scalars,
            frozen=teacher.frozen,
        )

    def _teacher(self, batch: Batch, frozen_out: FrozenOutput | None) -> Teacher:
        if self.recorded:
            return Teacher(inputs=tuple(batch[name] for name in fields.OF_TEACHER))
        assert frozen_out is not None  # `frozen` gave one
        return Teacher(frozen=((frozen_out.out.hidden_BSD, frozen_out.head),))

    def measure(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        frozen_out: FrozenOutput | None = None,
    ) -> Parts:
        """Sums over the targets. nll: -log p; kl: KL(teacher || student) at temperature 1; correct: how many
        no word is likelier than; teacher_nll: the teacher's nll, where all its logits are there.
        """
        teacher = self._teacher(batch, frozen_out)
        inputs = teacher.inputs
        if self.recorded:
            ids, values, lse = inputs
            inputs = ids, values, lse[..., 0]
        nll, kl, *rest = head.scan_vocab_sum(
            self._function.held_out,
            out.hidden_BSD,
            model.head,
            *inputs,
            batch["targets"],
            frozen=teacher.frozen,
        )
        sums = {"nll": nll, "kl": kl, "correct": rest[-1]}
        return sums if self.recorded else sums | {"teacher_nll": rest[0]}

    def figures(self, sums: dict[str, float]) -> dict[str, Any]:
        count = sums["targets"]
        out = text_figures(sums) | {"eval_kl": sums["kl"] / count}
        if "teacher_nll" in sums:
            out["eval_teacher_loss"] = sums["teacher_nll"] / count
        return out | {"eval_token_accuracy": sums["correct"] / count}


def scheduled(config: Config, name: str, step: jax.Array) -> jax.Array:
    """float32: alpha, temperature or beta of config.distill at the step after `step` finished ones: its first
    value at the first step, its last at the last.
    """
    d = config.distill
    first, last = getattr(d, name), getattr(d, f"{name}_final")
    kind = getattr(d, f"{name}_schedule")
    if kind == "constant":
        return jnp.float32(first)
    share = jnp.clip(step / max(config.train.steps - 1, 1), 0.0, 1.0).astype(jnp.float32)
    if kind == "cosine":
        share = (1 - jnp.cos(jnp.pi * share)) / 2
    return first * (1 - share) + last * share  # both ends exact


def _ahead(a: jax.Array, distance: int) -> jax.Array:
    """a[:, i + distance] at i, for [B, S, ...]; zeros past the end."""
    padding = [(0, 0, 0)] * a.ndim
    padding[1] = -distance, distance, 0
    return lax.pad(a, jnp.zeros((), a.dtype), padding)
