"""The output head: logits over the vocabulary, walked in chunks of tokens, for any function of one token's
logits.

The logits of a whole batch never exist: a device holds those of CHUNK_TOKENS tokens at a time, and of its
part of the vocabulary where the tensor axis divides it. What a training objective wants of them
(cross-entropy, divergence from a teacher, log-probability, entropy) is a chunk function:

    function(logits, *frozen_logits, *inputs) -> (values, dlogits_CV)

  logits, frozen_logits: `Logits` of the chunk, of the head that is trained and of frozen ones.
  inputs: what belongs to each token, [C] or [C, ...], or scalars that are the same for all tokens. Tokens
    that fill up the last chunk have -100 in integers, 0 in floats and False in booleans: a function must give
    them the value 0.
  values: a tuple of float32 [C], the same on all devices of the tensor axis. The first is differentiated, the
    others reported.
  dlogits_CV: float32, the derivative of the first value by the logits: the hand-made gradient, 0 for tokens
    that do not count.

`scan_vocab_sum` adds the values up over all tokens and makes the gradients on the way, with the logits at
hand. `scan_vocab` returns each token's values and makes the logits again in backward: for losses that are not
a sum over tokens.

Shape letters: layers.py, and C tokens of a chunk, V this device's words, K words of a teacher's list.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config.options import IGNORE
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, per_device
from deepseek_jax.parallel.sharding import without_stage
from deepseek_jax.parallel.weights import gather_on_device, stored_arrays

CHUNK_TOKENS = 1024  # tokens of a device whose logits are alive at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The weight of an output head: [D, V], or the embedding [V, D] where they are tied. A pytree."""

    weight: nnx.Variable
    tied: bool = dataclasses.field(metadata={"static": True})

    def without_stage(self) -> "Head":
        """The same, whole on every stage: what enters a `shard_map` over `stage`."""

        def move(w: jax.Array) -> jax.Array:
            return jax.sharding.reshard(w, without_stage(w))

        return Head(jax.tree.map(move, self.weight), self.tied)


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

    def is_word(self, ids_C: jax.Array) -> jax.Array:
        """bool [C, V]: which word here is the token's."""
        return (ids_C - self.first)[:, None] == jnp.arange(self.words)

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


# -------------------------------------------------------------------------------------------- chunk functions


def cross_entropy(logits: Logits, targets_C: jax.Array):
    """-log p(target) in nats. Inputs: int32 targets, -100 where there is none."""
    nll_C, _, dlogits_CV = _cross_entropy(logits, targets_C)
    return (nll_C,), dlogits_CV


def cross_entropy_and_rank(logits: Logits, targets_C: jax.Array):
    """`cross_entropy`, and whether no word is likelier than the target (bool)."""
    nll_C, likeliest_C, dlogits_CV = _cross_entropy(logits, targets_C)
    return (nll_C, likeliest_C), dlogits_CV


def _cross_entropy(logits: Logits, targets_C: jax.Array):
    most_C1, exp_CV, total_C1 = logits.softmax()
    here_CV = logits.is_word(targets_C)
    target_C = lax.psum(jnp.sum(jnp.where(here_CV, logits.logit_CV, 0.0), axis=-1), "tensor")
    nll_C = jnp.log(total_C1[:, 0]) + most_C1[:, 0] - target_C
    nll_C = jnp.where(targets_C == IGNORE, 0.0, nll_C)
    p_CV = exp_CV / total_C1
    dlogits_CV = jnp.where((targets_C == IGNORE)[:, None], 0.0, p_CV - here_CV)
    return nll_C, target_C >= most_C1[:, 0], dlogits_CV


def log_probability(logits: Logits, ids_C: jax.Array):
    """log p(id), 0 where the id is -100. Inputs: int32 ids."""
    (nll_C,), dlogits_CV = cross_entropy(logits, ids_C)
    return (-nll_C,), -dlogits_CV


def entropy(logits: Logits, valid_C: jax.Array):
    """-sum p log p in nats. Inputs: bool, which tokens count."""
    log_p_CV = logits.log_probabilities()
    p_CV = jnp.exp(log_p_CV)
    entropy_C1 = -sum_words(_p_log(p_CV, log_p_CV))
    dlogits_CV = -p_CV * (log_p_CV + entropy_C1)
    return _counted(valid_C, entropy_C1, dlogits_CV)


def kl(logits: Logits, teacher: Logits, valid_C: jax.Array, temperature: jax.Array | float = 1.0):
    """KL(teacher || student) of both softmaxes at a temperature, in nats; not multiplied by its square.

    Inputs: bool, which tokens count; the temperature. The derivative is (p_student - p_teacher) /
      temperature.
    """
    log_s_CV, log_t_CV = _at_temperature(logits, teacher, temperature)
    t_CV = jnp.exp(log_t_CV)
    kl_C1 = sum_words(_p_log(t_CV, log_t_CV - log_s_CV))
    return _counted(valid_C, kl_C1, (jnp.exp(log_s_CV) - t_CV) / temperature)


def reverse_kl(
    logits: Logits, teacher: Logits, valid_C: jax.Array, temperature: jax.Array | float = 1.0
):
    """KL(student || teacher), otherwise as `kl`. The derivative is p_s (log p_s - log p_t - KL) /
    temperature.
    """
    log_s_CV, log_t_CV = _at_temperature(logits, teacher, temperature)
    s_CV, difference_CV = jnp.exp(log_s_CV), log_s_CV - log_t_CV
    kl_C1 = sum_words(_p_log(s_CV, difference_CV))
    return _counted(valid_C, kl_C1, s_CV * (difference_CV - kl_C1) / temperature)


def kl_to_top(
    logits: Logits,
    ids_CK: jax.Array,
    values_CK: jax.Array,
    lse_C: jax.Array,
    valid_C: jax.Array,
    temperature: jax.Array | float = 1.0,
):
    """`kl` to a teacher of which the K likeliest words are known; all others are one word, of both (a bucket
    for the tail).

    KL = sum_K t log(t / s) + t' log(t' / s') with t' = 1 - sum_K t and s' likewise: the loss of `kl` with the
    teacher's tail spread as the student's, and its gradient.

    Args:
      ids_CK: int32, distinct words. values_CK: the teacher's logits of these.
      lse_C: float32, log-sum-exp of all its logits / temperature.
      valid_C: bool, which tokens count.
    """
    log_s_CV = logits.scaled(1 / temperature).log_probabilities()
    log_t_CK = values_CK.astype(jnp.float32) / temperature - lse_C[:, None]
    local_CK = ids_CK - logits.first
    here_CK = (local_CK >= 0) & (local_CK < logits.words)
    row_C1 = jnp.arange(ids_CK.shape[0])[:, None]
    place_CK = jnp.where(here_CK, local_CK, logits.words)  # past the end, where scatters drop it
    log_s_CK = jnp.take_along_axis(log_s_CV, jnp.where(here_CK, local_CK, 0), axis=1)
    log_s_CK = lax.psum(jnp.where(here_CK, log_s_CK, 0.0), "tensor")
    t_CK = jnp.exp(log_t_CK)
    tail_t_C1 = jnp.maximum(1 - jnp.sum(t_CK, axis=1, keepdims=True), 0.0)
    # The student's tail by its own words: 1 - sum would lose all digits where the K words have nearly
    # everything.
    rest_CV = log_s_CV.at[row_C1, place_CK].set(-jnp.inf, mode="drop")
    log_tail_s_C1 = _log_sum_exp(rest_CV)
    has_tail_C1 = (tail_t_C1 > 0) & jnp.isfinite(log_tail_s_C1)
    log_tail_s_C1 = jnp.where(has_tail_C1, log_tail_s_C1, 0.0)
    tail_C1 = jnp.where(
        has_tail_C1,
        tail_t_C1 * (jnp.log(jnp.where(has_tail_C1, tail_t_C1, 1.0)) - log_tail_s_C1),
        0.0,
    )
    kl_C1 = jnp.sum(_p_log(t_CK, log_t_CK - log_s_CK), axis=1, keepdims=True) + tail_C1
    spread_CV = jnp.where(has_tail_C1, tail_t_C1 * jnp.exp(log_s_CV - log_tail_s_C1), 0.0)
    t_CV = spread_CV.at[row_C1, place_CK].set(t_CK, mode="drop")
    return _counted(valid_C, kl_C1, (jnp.exp(log_s_CV) - t_CV) / temperature)


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


def _at_temperature(logits: Logits, teacher: Logits, temperature) -> tuple[jax.Array, jax.Array]:
    return tuple(z.scaled(1 / temperature).log_probabilities() for z in (logits, teacher))


def _log_sum_exp(a_CV: jax.Array) -> jax.Array:
    """Over the whole vocabulary, [C, 1]; -inf where there is no word."""
    most_C1 = lax.pmax(jnp.max(a_CV, axis=-1, keepdims=True), "tensor")
    finite_C1 = jnp.where(jnp.isfinite(most_C1), most_C1, 0.0)
    return jnp.log(sum_words(jnp.exp(a_CV - finite_C1))) + finite_C1


def _p_log(p: jax.Array, log: jax.Array) -> jax.Array:
    """p * log, 0 where p is 0: a word whose logit is -inf."""
    return jnp.where(p > 0, p * jnp.where(p > 0, log, 0.0), 0.0)


def _counted(valid_C: jax.Array, value_C1: jax.Array, dlogits_CV: jax.Array):
    return (jnp.where(valid_C, value_C1[:, 0], 0.0),), jnp.where(valid_C[:, None], dlogits_CV, 0.0)


# --------------------------------------------------------------------------------------------------- the walk


def scan_vocab_sum(
    function: Callable,
    hidden_BSD: jax.Array,
    head: Head,
    *inputs: jax.Array,
    frozen: Sequence[tuple[jax.Array, Head]] = (),
) -> tuple[jax.Array, ...]:
    """The sums of a chunk function's values over all tokens of the global batch, float32 scalars.

    Args:
      function: a chunk function (see the top), hashable: a function of a module, or `partial` or `weighted`
        of one.
      hidden_BSD: in the compute dtype; its gradient and the head's are of the first sum.
      inputs: [B, S, ...] arrays or scalars, without gradient.
      frozen: (hidden states [B, S, D'], head) of other models, without gradient.
    """

    def one_device(*args):
        parts = _values_of_device(args, inputs, frozen, specs)
        sums = _sums(function, *parts)
        return tuple(lax.psum(s, TOKEN_AXES) for s in sums)

    args, in_specs, specs = _arguments(hidden_BSD, head, inputs, frozen)
    return per_device(one_device, in_specs, jax.P())(*args)


def scan_vocab(
    function: Callable,
    hidden_BSD: jax.Array,
    head: Head,
    *inputs: jax.Array,
    frozen: Sequence[tuple[jax.Array, Head]] = (),
) -> tuple[jax.Array, ...]:
    """The values of a chunk function for each token, [B, S]. Arguments as `scan_vocab_sum`; the first value
    has a gradient.
    """

    def one_device(*args):
        values = _each(function, *_values_of_device(args, inputs, frozen, specs))
        return tuple(v.reshape(args[0].shape[:2]) for v in values)

    args, in_specs, specs = _arguments(hidden_BSD, head, inputs, frozen)
    return per_device(one_device, in_specs, TOKENS)(*args)


def _arguments(hidden_BSD, head: Head, inputs, frozen) -> tuple[list, tuple, list]:
    """(arrays for `per_device`, their specs, the specs of each head's arrays): hidden states, inputs, then
    the heads' weights.
    """
    hidden = [hidden_BSD, *(h for h, _ in frozen)]
    weights = [stored_arrays(h.weight) for h in (head, *(h for _, h in frozen))]
    inputs = [jnp.asarray(a) for a in inputs]
    args = [*hidden, *inputs, *(a for arrays, _ in weights for a in arrays)]
    in_specs = [TOKENS] * len(hidden) + [TOKENS if a.ndim else jax.P() for a in inputs]
    heads = [
        (h.tied, s) for h, (_, s) in zip((head, *(h for _, h in frozen)), weights, strict=True)
    ]
    return args, (*in_specs, *(s for _, specs in heads for s in specs)), heads


def _values_of_device(args, inputs, frozen, heads) -> tuple:
    """This device's (hidden_TD, kernel_DV, ((hidden, kernel) of the frozen heads), inputs), T its tokens and
    V its words.
    """
    count = 1 + len(frozen)
    hidden, given, rest = (
        args[:count],
        args[count : count + len(inputs)],
        args[count + len(inputs) :],
    )
    pairs = []
    for h, (tied, specs) in zip(hidden, heads, strict=True):
        weight, rest = gather_on_device(rest[: len(specs)], specs, h.dtype), rest[len(specs) :]
        # The gradient of the hidden states is a sum over the words, and so over the tensor axis.
        h_TD = lax.pcast(h.reshape(-1, h.shape[-1]), "tensor", to="varying")
        pairs.append((h_TD, weight.T if tied else weight))
    given = tuple(a.reshape(-1, *a.shape[2:]) if a.ndim else a for a in given)
    return (*pairs[0], *lax.stop_gradient((tuple(pairs[1:]), given)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(function, hidden_TD, kernel_DV, frozen, inputs):
    """One device's part of `scan_vocab_sum`."""

    def step(totals, chunk):
        values, _ = function(*_of_chunk(chunk, kernel_DV, frozen, inputs))
        return tuple(t + jnp.sum(v) for t, v in zip(totals, values, strict=True)), None

    zeros = _zeros(function, hidden_TD, kernel_DV, frozen, inputs)
    return lax.scan(step, zeros, _chunks(hidden_TD, frozen, inputs))[0]


def _sums_forward(function, hidden_TD, kernel_DV, frozen, inputs):
    """The sums with the first one's gradients, for which the logits would have to be made again later."""

    def step(carry, chunk):
        totals, dkernel_DV = carry
        values, dlogits_CV = function(*_of_chunk(chunk, kernel_DV, frozen, inputs))
        hidden_CD = chunk[0]
        dlogits_CV = (dlogits_CV * _lift(hidden_CD.dtype)).astype(hidden_CD.dtype)
        dhidden_CD, more_DV = _backward_of_chunk(hidden_CD, kernel_DV, dlogits_CV)
        dkernel_DV = dkernel_DV + more_DV
        totals = tuple(t + jnp.sum(v) for t, v in zip(totals, values, strict=True))
        return (totals, dkernel_DV), dhidden_CD

    zero_DV = jnp.zeros_like(kernel_DV, jnp.float32)
    zeros = _zeros(function, hidden_TD, kernel_DV, frozen, inputs)
    chunks = _chunks(hidden_TD, frozen, inputs)
    (totals, dkernel_DV), dhidden = lax.scan(step, (zeros, zero_DV), chunks)
    # Float16 would overflow: this is the sum over all tokens, not yet divided by their number.
    if kernel_DV.dtype != jnp.float16:
        dkernel_DV = dkernel_DV.astype(kernel_DV.dtype)
    return totals, (_joined(dhidden, hidden_TD.shape[0]), dkernel_DV)


def _sums_backward(function, gradients, cotangents):
    dtype = gradients[0].dtype  # of hidden states and head
    return *((g * (cotangents[0] / _lift(dtype))).astype(dtype) for g in gradients), None, None


_sums.defvjp(_sums_forward, _sums_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(function, hidden_TD, kernel_DV, frozen, inputs):
    """One device's part of `scan_vocab`: values [T]."""

    def step(_, chunk):
        return None, function(*_of_chunk(chunk, kernel_DV, frozen, inputs))[0]

    _, values = lax.scan(step, None, _chunks(hidden_TD, frozen, inputs))
    return tuple(_joined(v, hidden_TD.shape[0]) for v in values)


def _each_forward(function, *args):
    return _each(function, *args), args


def _each_backward(function, args, cotangents):
    hidden_TD, kernel_DV, frozen, inputs = args

    def step(dkernel_DV, chunk):
        cotangent_C, chunk = chunk
        _, dlogits_CV = function(*_of_chunk(chunk, kernel_DV, frozen, inputs))
        dlogits_CV = (dlogits_CV * cotangent_C[:, None]).astype(hidden_TD.dtype)
        dhidden_CD, more_DV = _backward_of_chunk(chunk[0], kernel_DV, dlogits_CV)
        return dkernel_DV + more_DV, dhidden_CD

    zero_DV = jnp.zeros_like(kernel_DV, jnp.float32)
    chunks = _in_chunks(cotangents[0]), _chunks(hidden_TD, frozen, inputs)
    dkernel_DV, dhidden = lax.scan(step, zero_DV, chunks)
    dhidden_TD = _joined(dhidden, hidden_TD.shape[0]).astype(hidden_TD.dtype)
    return dhidden_TD, dkernel_DV.astype(kernel_DV.dtype), None, None


_each.defvjp(_each_forward, _each_backward)


def _backward_of_chunk(hidden_CD, kernel_DV, dlogits_CV) -> tuple[jax.Array, jax.Array]:
    dhidden_CD = jnp.einsum("cv,dv->cd", dlogits_CV, kernel_DV)
    return dhidden_CD, jnp.einsum(
        "cd,cv->dv", hidden_CD, dlogits_CV, preferred_element_type=jnp.float32
    )


def _of_chunk(chunk, kernel_DV, frozen, inputs) -> tuple[Any, ...]:
    """The arguments of a chunk function."""
    hidden_CD, frozen_hidden, per_token = chunk
    kernels = kernel_DV, *(kernel for _, kernel in frozen)
    logits = [_logits(h, k) for h, k in zip((hidden_CD, *frozen_hidden), kernels, strict=True)]
    per_token = iter(per_token)
    return *logits, *(next(per_token) if a.ndim else a for a in inputs)


def _logits(hidden_CD: jax.Array, kernel_DV: jax.Array) -> Logits:
    logit_CV = jnp.einsum("cd,dv->cv", hidden_CD, kernel_DV, preferred_element_type=jnp.float32)
    return Logits(logit_CV)


def _chunks(hidden_TD, frozen, inputs) -> tuple[jax.Array, tuple, tuple]:
    """(hidden states, those of frozen models, inputs of each token) in chunks."""
    return (
        _in_chunks(hidden_TD),
        tuple(_in_chunks(h) for h, _ in frozen),
        tuple(_in_chunks(a) for a in inputs if a.ndim),
    )


def _in_chunks(a: jax.Array) -> jax.Array:
    """[T, ...] to [chunks, C, ...], the last one filled up with tokens that count for nothing."""
    tokens = a.shape[0]
    size = min(CHUNK_TOKENS, tokens)
    filler = IGNORE if jnp.issubdtype(a.dtype, jnp.signedinteger) else 0
    padding = [(0, -tokens % size)] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, padding, constant_values=filler).reshape(-1, size, *a.shape[1:])


def _joined(chunks: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_in_chunks`."""
    return chunks.reshape(-1, *chunks.shape[2:])[:tokens]


def _lift(dtype) -> float:
    """Scales probabilities by 2^10 so that float16 does not flush small ones to 0; undone in backward."""
    return 1024.0 if dtype == jnp.float16 else 1.0


def _zeros(function, hidden_TD, kernel_DV, frozen, inputs) -> tuple[jax.Array, ...]:
    """A float32 0 for each sum, which differs between devices of the batch, not of the tensor axis."""

    def values():
        chunk = jax.tree.map(lambda a: a[0], _chunks(hidden_TD, frozen, inputs))
        return function(*_of_chunk(chunk, kernel_DV, frozen, inputs))[0]

    zero = lax.pmax(jnp.zeros_like(hidden_TD, jnp.float32, shape=()), "tensor")
    return (zero,) * len(jax.eval_shape(values))
