"""The loss of distillation as functions of a token's logits (logit_functions.py): cross-entropy and a
divergence of the student's softmax from the teacher's, with hand-made gradients, in one walk of the
vocabulary.

    loss = (1 - alpha) CE + alpha T^2 D        CE at temperature 1, D of both softmaxes at temperature T

D is one of three, by beta, as TRL's GKDTrainer has them (generalized_jsd_loss), in nats:

    forward   beta 0   KL(teacher || student)
    reverse   beta 1   KL(student || teacher)
    mixture            beta KL(teacher || m) + (1 - beta) KL(student || m)
                       of m = beta teacher + (1 - beta) student

The mixture goes to 0 as beta nears an end, where the other two take its place. T^2 keeps the gradient's size
as the temperature rises (Hinton et al. 2015, arXiv:1503.02531).

A teacher is known by all its logits, or by its K likeliest words. Of these, `bucket` makes K + 1 outcomes,
the last one all other words, of teacher and student: its gradient falls on the words outside as the student
has them. `renormalise` takes the K words for all there are, of both: what the student gives to others is
left to the cross-entropy. With all words in the list both are the whole divergence.

Shape letters: layers.py, and C tokens of a chunk, V this device's words, K words of a teacher's list, N
outcomes: V, or K and the bucket.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.logit_functions import (
    Logits,
    Targets,
    log_sum_exp,
    of_targets,
    p_log,
    sum_words,
)

# What a teacher's list leaves to all other words, at least: float32 has no smaller difference from 1. TRL's
# _add_tail_bucket has the same.
LEAST_TAIL = 1e-7
Sum = Callable[[jax.Array], jax.Array]  # [C, N] to [C, 1], over all outcomes


def kind_of(beta: float, scheduled: bool) -> str:
    """Which divergence a run computes; `mixture` holds the other two as its ends."""
    if scheduled:
        return "mixture"
    return {0.0: "forward", 1.0: "reverse"}.get(beta, "mixture")


def divergence(
    kind: str, log_s_CN: jax.Array, log_t_CN: jax.Array, beta: jax.Array | float, total: Sum
) -> tuple[jax.Array, jax.Array]:
    """A divergence of two distributions, and its derivative by the logits whose softmax the student's is.

    Args:
      kind: forward, reverse or mixture.
      log_s_CN, log_t_CN: float32, of student and teacher.
      beta: from 0 to 1; read by `mixture` alone.
      total: the sum over all outcomes, on all devices.

    Returns:
      ([C, 1], [C, N]), float32. Both exactly 0 where the distributions are equal to the last bit.
    """
    s_CN, t_CN = jnp.exp(log_s_CN), jnp.exp(log_t_CN)
    if kind == "forward":
        return total(p_log(t_CN, log_t_CN - log_s_CN)), s_CN - t_CN
    if kind == "reverse":
        value_C1 = total(p_log(s_CN, log_s_CN - log_t_CN))
        return value_C1, p_log(s_CN, log_s_CN - log_t_CN - value_C1)
    return _mixture(log_s_CN, log_t_CN, beta, total)


def _mixture(log_s_CN, log_t_CN, beta, total: Sum) -> tuple[jax.Array, jax.Array]:
    s_CN, t_CN = jnp.exp(log_s_CN), jnp.exp(log_t_CN)
    first, last = beta == 0, beta == 1
    more_CN = log_t_CN - log_s_CN
    # log m from the likelier of the two: exact where they are equal, and no exp overflows.
    likelier = jnp.where(more_CN > 0, beta, 1 - beta)
    log_m_CN = jnp.log(likelier + (1 - likelier) * jnp.exp(-jnp.abs(more_CN)))
    s_to_m_CN = -log_m_CN - jnp.maximum(more_CN, 0.0)  # log s - log m
    t_to_m_CN = -log_m_CN - jnp.maximum(-more_CN, 0.0)
    # At the ends m is one of the two, and the rounding of log m would be all there is.
    s_to_m_CN = jnp.where(first, 0.0, jnp.where(last, -more_CN, s_to_m_CN))
    t_to_m_CN = jnp.where(first, more_CN, jnp.where(last, 0.0, t_to_m_CN))
    of_t, of_s = jnp.where(first, 1.0, beta), jnp.where(last, 1.0, 1 - beta)
    kl_s_C1 = total(p_log(s_CN, s_to_m_CN))
    value_C1 = of_t * total(p_log(t_CN, t_to_m_CN)) + of_s * kl_s_C1
    moved_CN = of_s * p_log(s_CN, s_to_m_CN - kl_s_C1)
    return value_C1, jnp.where(first, s_CN - t_CN, moved_CN)


@dataclasses.dataclass(frozen=True)
class WholeTeacher:
    """Of a teacher whose logits are there, the first frozen ones.

    Attributes:
      kind: of the divergence.
      words: the ids that both have in the divergence, 0 to words - 1; None: all of the student's.
    """

    kind: str
    words: int | None = None

    def __call__(
        self,
        logits: Logits,
        teacher: Logits,
        targets_C: jax.Array,
        alpha: jax.Array | float,
        temperature: jax.Array | float,
        beta: jax.Array | float,
    ):
        """(loss, CE, divergence, the teacher's CE, 1 where no word is likelier than the target). The last
        four unweighted, all 0 where the target is -100.
        """
        found, teacher = of_targets(logits, targets_C), teacher.cut(self.words)
        log_s_CV, log_t_CV = (
            z.scaled(1 / temperature).log_probabilities() for z in (logits.cut(self.words), teacher)
        )
        value_C1, moved_CV = divergence(self.kind, log_s_CV, log_t_CV, beta, sum_words)
        kl_C = jnp.where(found.counts_C, value_C1[:, 0], 0.0)
        reported = (found.nll_C, kl_C, of_targets(teacher, targets_C).nll_C, _correct(found))
        return _weighted(found, kl_C, moved_CV, alpha, temperature, reported)

    def held_out(self, logits: Logits, teacher: Logits, targets_C: jax.Array):
        """(CE, KL(teacher || student) at temperature 1, the teacher's CE, 1 where no word is likelier)."""
        found, teacher = of_targets(logits, targets_C), teacher.cut(self.words)
        log_s_CV, log_t_CV = (z.log_probabilities() for z in (logits.cut(self.words), teacher))
        value_C1, _ = divergence("forward", log_s_CV, log_t_CV, 0.0, sum_words)
        kl_C = jnp.where(found.counts_C, value_C1[:, 0], 0.0)
        teacher_C = of_targets(teacher, targets_C).nll_C
        return (found.nll_C, kl_C, teacher_C, _correct(found)), found.dlogits_CV


@dataclasses.dataclass(frozen=True)
class TopTeacher:
    """Of a teacher of which the K likeliest words are known.

    Attributes:
      kind: of the divergence.
      tail: bucket or renormalise.
    """

    kind: str
    tail: str = "bucket"

    def __call__(
        self,
        logits: Logits,
        ids_CK: jax.Array,
        values_CK: jax.Array,
        lse_C: jax.Array,
        targets_C: jax.Array,
        alpha: jax.Array | float,
        temperature: jax.Array | float,
        beta: jax.Array | float,
    ):
        """(loss, CE, divergence, 1 where no word is likelier than the target), as WholeTeacher.

        Args:
          ids_CK: int32, distinct words.
          values_CK: the teacher's logits of these, but for a constant of the token; any float dtype.
          lse_C: float32, log-sum-exp of all its logits / temperature, with the same constant.
        """
        found = of_targets(logits, targets_C)
        outcomes = _Outcomes(logits, ids_CK, values_CK, lse_C, temperature, self.tail)
        value_C1, moved_CN = divergence(
            self.kind, outcomes.log_s_CN, outcomes.log_t_CN, beta, _sum_outcomes
        )
        kl_C = jnp.where(found.counts_C, value_C1[:, 0], 0.0)
        reported = (found.nll_C, kl_C, _correct(found))
        moved_CV = outcomes.of_words(moved_CN)
        return _weighted(found, kl_C, moved_CV, alpha, temperature, reported)

    def held_out(self, logits: Logits, ids_CK, values_CK, lse_C, targets_C: jax.Array):
        """(CE, KL(teacher || student) at temperature 1, 1 where no word is likelier), by the lse_C of
        temperature 1.
        """
        found = of_targets(logits, targets_C)
        outcomes = _Outcomes(logits, ids_CK, values_CK, lse_C, 1.0, self.tail)
        value_C1, _ = divergence(
            "forward", outcomes.log_s_CN, outcomes.log_t_CN, 0.0, _sum_outcomes
        )
        kl_C = jnp.where(found.counts_C, value_C1[:, 0], 0.0)
        return (found.nll_C, kl_C, _correct(found)), found.dlogits_CV


class _Outcomes:
    """The words of a teacher's list and what is left of the vocabulary, as two distributions over N outcomes.
    The same on all devices of the tensor axis.
    """

    def __init__(self, logits: Logits, ids_CK, values_CK, lse_C, temperature, tail: str):
        self._log_s_CV = logits.scaled(1 / temperature).log_probabilities()
        local_CK = ids_CK - logits.first
        here_CK = (local_CK >= 0) & (local_CK < logits.words)
        self._row_C1 = jnp.arange(ids_CK.shape[0])[:, None]
        # Past the end scatters drop it.
        self._place_CK = jnp.where(here_CK, local_CK, logits.words)
        log_s_CK = jnp.take_along_axis(self._log_s_CV, jnp.where(here_CK, local_CK, 0), axis=1)
        log_s_CN = lax.psum(jnp.where(here_CK, log_s_CK, 0.0), "tensor")
        log_t_CN = values_CK.astype(jnp.float32) / temperature - lse_C[:, None]
        everything = ids_CK.shape[1] >= logits.words * lax.axis_size("tensor")
        self._bucket = tail == "bucket" and not everything
        if self._bucket:
            # The student's tail by its own words: 1 - sum would lose all digits where the K words have
            # nearly everything.
            rest_CV = self._set(self._log_s_CV, -jnp.inf)
            self._log_rest_C1 = log_sum_exp(rest_CV)
            rest_t_C1 = 1 - jnp.sum(jnp.exp(log_t_CN), axis=1, keepdims=True)
            log_rest_t_C1 = jnp.log(jnp.maximum(rest_t_C1, LEAST_TAIL))
            log_s_CN = jnp.concatenate([log_s_CN, self._log_rest_C1], axis=1)
            log_t_CN = jnp.concatenate([log_t_CN, log_rest_t_C1], axis=1)
        elif not everything:
            log_s_CN = jax.nn.log_softmax(log_s_CN)
        self.log_s_CN = log_s_CN
        # Values of float16 do not add up to 1 of themselves.
        self.log_t_CN = jax.nn.log_softmax(log_t_CN)

    def of_words(self, moved_CN: jax.Array) -> jax.Array:
        """[C, V]: a derivative by the outcomes' logits as one by the words'."""
        if not self._bucket:
            return self._set(jnp.zeros_like(self._log_s_CV), moved_CN)
        moved_CK, rest_C1 = moved_CN[:, :-1], moved_CN[:, -1:]
        share_CV = jnp.exp(self._log_s_CV - self._log_rest_C1)  # of the words in the list: unused
        return self._set(rest_C1 * share_CV, moved_CK)

    def _set(self, a_CV: jax.Array, values) -> jax.Array:
        """With other values for the words of the list."""
        return a_CV.at[self._row_C1, self._place_CK].set(values, mode="drop")


def _sum_outcomes(a_CN: jax.Array) -> jax.Array:
    return jnp.sum(a_CN, axis=-1, keepdims=True)


def _correct(found: Targets) -> jax.Array:
    return jnp.where(found.counts_C & found.likeliest_C, 1.0, 0.0)


def _weighted(found: Targets, kl_C, moved_CV, alpha, temperature, reported):
    """(values, dlogits_CV) of the loss, and what is reported beside it."""
    loss_C = (1 - alpha) * found.nll_C + alpha * temperature**2 * kl_C
    moved_CV = jnp.where(found.counts_C[:, None], moved_CV, 0.0)
    return (loss_C, *reported), (1 - alpha) * found.dlogits_CV + alpha * temperature * moved_CV
