"""Functions of a token's logits over the vocabulary, each with its hand-made gradient, for model/head.py.

    function(logits, *frozen_logits, *inputs) -> (values, dlogits_CV)

  logits, frozen_logits: `Logits` of a chunk of tokens, of the head that is trained and of frozen ones.
  inputs: what belongs to each token, [C] or [C, ...], or scalars that are the same for all tokens. Tokens
    that fill up the last chunk have -100 in integers, 0 in floats and False in booleans: a function must give
    them the value 0.
  values: a tuple of float32 [C], the same on all devices of the tensor axis. The first is differentiated, the
    others are reported.
  dlogits_CV: float32, the derivative of the first value by the logits, 0 for tokens that do not count.

They run inside `per_device`: a device has the logits of its part of the vocabulary.

Shape letters: layers.py, and C tokens of a chunk, V this device's words. Divergences from a
teacher: divergences.py.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config.options import IGNORE
from deepseek_jax.model.largest import largest

NEVER = (
    -1e30
)  # the logit of a word without probability: finite, so that differences of two are none


class Logits(NamedTuple):
    """The logits of a chunk over this device's words, and reductions over the whole vocabulary."""

    logit_CV: jax.Array  # float32

    @property
    def words(self) -> int:
        return self.logit_CV.shape[1]

    @property
    def first(self) -> jax.Array:
        """int32: the id of the first word here."""
        return lax.axis_index("tensor") * self.words

    def scaled(self, factor: jax.Array | float) -> "Logits":
        return Logits(self.logit_CV * factor)

    def cut(self, words: int | None) -> "Logits":
        """Without the words from this id on, whose probability becomes 0; None: with all."""
        if words is None:
            return self
        inside_V = self.first + jnp.arange(self.words) < words
        return Logits(jnp.where(inside_V, self.logit_CV, NEVER))

    def is_word(self, ids_C: jax.Array) -> jax.Array:
        """bool [C, V]: which word here is the token's."""
        return (ids_C - self.first)[:, None] == jnp.arange(self.words)

    def at(self, ids_C: jax.Array) -> jax.Array:
        """float32 [C]: the logit of each token's word, 0 of an id that is no word. It is gathered: a sum over
        the words that are its own or 0 would be one more pass over all logits.
        """
        local_C = ids_C - self.first
        here_C = (local_C >= 0) & (local_C < self.words)
        place_C1 = jnp.where(here_C, local_C, 0)[:, None]
        found_C = jnp.take_along_axis(self.logit_CV, place_C1, axis=1, mode="promise_in_bounds")[
            :, 0
        ]
        return lax.psum(jnp.where(here_C, found_C, 0.0), "tensor")

    def softmax(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(largest logit [C, 1], exp(logit - largest) [C, V], its sum over all words [C, 1])."""
        most_C1 = lax.pmax(jnp.max(self.logit_CV, axis=-1, keepdims=True), "tensor")
        exp_CV = jnp.exp(self.logit_CV - most_C1)
        return most_C1, exp_CV, sum_words(exp_CV)

    def log_probabilities(self) -> jax.Array:
        """float32 [C, V]."""
        most_C1, _, total_C1 = self.softmax()
        return self.logit_CV - most_C1 - jnp.log(total_C1)


def sum_words(a_CV: jax.Array) -> jax.Array:
    """The sum over the whole vocabulary, [C, 1]."""
    return lax.psum(jnp.sum(a_CV, axis=-1, keepdims=True), "tensor")


def cross_entropy(logits: Logits, targets_C: jax.Array):
    """-log p(target) in nats. Inputs: int32 targets, -100 where there is none."""
    found = of_targets(logits, targets_C)
    return (found.nll_C,), found.dlogits_CV


def cross_entropy_and_rank(logits: Logits, targets_C: jax.Array):
    """`cross_entropy`, and whether no word is likelier than the target (bool)."""
    found = of_targets(logits, targets_C)
    return (found.nll_C, found.likeliest_C), found.dlogits_CV


def scored_tokens(logits: Logits, targets_C: jax.Array):
    """`cross_entropy`, and what is reported beside it of tokens with a target: 1 where no word is likelier,
    and the entropy of all words in nats.
    """
    found = of_targets(logits, targets_C)
    return (found.nll_C, *_reported(logits, found)), found.dlogits_CV


def dynamic_fine_tuning(logits: Logits, targets_C: jax.Array):
    """-p log p of the target, where the first p has no gradient (arXiv:2508.05629); then the values of
    `scored_tokens`.

    The derivative is p times that of the cross-entropy: unlikely targets pull less.
    """
    found = of_targets(logits, targets_C)
    p_C = jnp.exp(-found.nll_C)
    reported = _reported(logits, found)
    return (p_C * found.nll_C, found.nll_C, *reported), p_C[:, None] * found.dlogits_CV


def smoothed_cross_entropy(logits: Logits, targets_C: jax.Array, smoothing: jax.Array | float):
    """Cross-entropy with a target of 1 - smoothing on one word and smoothing / V on each of all V, as
    transformers' LabelSmoother has it; then the values of `scored_tokens`.

    Inputs: the targets; smoothing, a scalar.
    """
    found = of_targets(logits, targets_C)
    words = logits.words * lax.axis_size("tensor")
    uniform_C = found.log_total_C - sum_words(logits.logit_CV)[:, 0] / words  # the mean of -log p
    uniform_C = jnp.where(found.counts_C, uniform_C, 0.0)
    loss_C = (1 - smoothing) * found.nll_C + smoothing * uniform_C
    moved_CV = jnp.where(found.counts_C[:, None], found.here_CV - 1 / words, 0.0)
    dlogits_CV = found.dlogits_CV + smoothing * moved_CV
    return (loss_C, found.nll_C, *_reported(logits, found)), dlogits_CV


class Targets(NamedTuple):
    """Targets among all words. What nobody reads is not computed."""

    counts_C: jax.Array  # bool: whether there is a target
    nll_C: jax.Array  # -log p(target)
    likeliest_C: jax.Array  # bool: no word is likelier
    dlogits_CV: jax.Array  # the derivative of nll_C
    log_total_C: jax.Array  # log of the sum of exp(logit)
    exp_CV: jax.Array  # exp(logit - largest),
    total_C1: jax.Array  # and its sum over all words
    here_CV: jax.Array  # bool: which word here is the target


def of_targets(logits: Logits, targets_C: jax.Array) -> Targets:
    counts_C = targets_C != IGNORE
    most_C1, exp_CV, total_C1 = logits.softmax()
    here_CV, target_C = logits.is_word(targets_C), logits.at(targets_C)
    log_total_C = jnp.log(total_C1[:, 0]) + most_C1[:, 0]
    return Targets(
        counts_C,
        jnp.where(counts_C, log_total_C - target_C, 0.0),
        target_C >= most_C1[:, 0],
        jnp.where(counts_C[:, None], exp_CV / total_C1 - here_CV, 0.0),
        log_total_C,
        exp_CV,
        total_C1,
        here_CV,
    )


def _reported(logits: Logits, found: Targets) -> tuple[jax.Array, jax.Array]:
    """(1 where no word is likelier than the target, entropy in nats), float32, 0 without a target."""
    mean_logit_C1 = sum_words(p_log(found.exp_CV, logits.logit_CV)) / found.total_C1
    entropy_C = jnp.where(found.counts_C, found.log_total_C - mean_logit_C1[:, 0], 0.0)
    return jnp.where(found.counts_C & found.likeliest_C, 1.0, 0.0), entropy_C


def log_probability(logits: Logits, ids_C: jax.Array):
    """log p(id), 0 where the id is -100. Inputs: int32 ids."""
    (nll_C,), dlogits_CV = cross_entropy(logits, ids_C)
    return (-nll_C,), -dlogits_CV


def entropy(logits: Logits, valid_C: jax.Array):
    """-sum p log p in nats. Inputs: bool, which tokens count."""
    log_p_CV = logits.log_probabilities()
    p_CV = jnp.exp(log_p_CV)
    entropy_C1 = -sum_words(p_log(p_CV, log_p_CV))
    dlogits_CV = -p_CV * (log_p_CV + entropy_C1)
    return _counted(valid_C, entropy_C1, dlogits_CV)


def top(
    logits: Logits, count: int, words: int, temperatures_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest words of each token, of the whole vocabulary. Not differentiated.

    Args:
      count: K, at most `words`.
      words: those with a lower id; the others are padding.
      temperatures_N: float32.

    Returns:
      int32 [C, K] ids, by falling logit, of equal ones the lowest first; float32 [C, K] their logits less the
      largest; float32 [C, N] log-sum-exp of all logits, less the largest, / temperature.
    """
    logit_CV = logits.cut(words).logit_CV
    values_CH, places_CH = largest(logit_CV, min(count, logits.words))
    values_CK, ids_CK = _from_all(values_CH), _from_all(places_CH + logits.first)
    if lax.axis_size("tensor") > 1:
        # Words of a lower id come first on a device and among devices: of equal logits top_k takes the first.
        values_CK, places_CK = lax.top_k(values_CK, count)
        ids_CK = jnp.take_along_axis(ids_CK, places_CK, axis=1)
    most_C1 = values_CK[:, :1]
    above_CV = logit_CV - most_C1
    sums = [sum_words(jnp.exp(above_CV / temperature)) for temperature in temperatures_N]
    return ids_CK, values_CK - most_C1, jnp.log(jnp.concatenate(sums, axis=1))


def _from_all(a_CH: jax.Array) -> jax.Array:
    """[C, devices * H]: what every device of the tensor axis has, and known to be the same on all of them,
    which all_gather's result is not: each adds zeros to the others' parts.
    """
    whole = jnp.zeros((len(a_CH), lax.axis_size("tensor"), a_CH.shape[1]), a_CH.dtype)
    whole = whole.at[:, lax.axis_index("tensor")].set(a_CH)
    return lax.psum(whole, "tensor").reshape(len(a_CH), -1)


def weighted(function: Callable) -> Callable:
    """A chunk function times a weight of each token: its last input, float32 [C], which has no gradient."""
    return _Weighted(function)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    function: Callable

    def __call__(self, *args):
        *rest, weight_C = args
        values, dlogits_CV = self.function(*rest)
        return tuple(v * weight_C for v in values), dlogits_CV * weight_C[:, None]


def log_sum_exp(a_CV: jax.Array) -> jax.Array:
    """Over the whole vocabulary, [C, 1]; -inf where there is no word."""
    most_C1 = lax.pmax(jnp.max(a_CV, axis=-1, keepdims=True), "tensor")
    finite_C1 = jnp.where(jnp.isfinite(most_C1), most_C1, 0.0)
    return jnp.log(sum_words(jnp.exp(a_CV - finite_C1))) + finite_C1


def p_log(p: jax.Array, log: jax.Array) -> jax.Array:
    """p * log, 0 where p is 0: a word whose logit is -inf."""
    return jnp.where(p > 0, p * jnp.where(p > 0, log, 0.0), 0.0)


def _counted(valid_C: jax.Array, value_C1: jax.Array, dlogits_CV: jax.Array):
    return (jnp.where(valid_C, value_C1[:, 0], 0.0),), jnp.where(valid_C[:, None], dlogits_CV, 0.0)
