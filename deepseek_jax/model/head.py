"""The output head: logits over the vocabulary, walked in chunks, for any function of a token's logits.

The logits of a whole batch never exist: a device holds those of `chunk_tokens` tokens at a time, and of its
part of the vocabulary where the tensor axis divides it. What an objective wants of them (cross-entropy,
divergence from a teacher, log-probability, entropy) is a function of logit_functions.py.

`scan_vocab_sum` adds the values up over all tokens and makes the gradients on the way, with the logits at
hand. `scan_vocab` returns each token's values and makes the logits again in backward: for losses that are not
a sum over tokens. `scan_vocab_top` keeps a token's likeliest words.

Shape letters: layers.py, and C tokens of a chunk; inside `per_device` T and V are this device's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config.options import IGNORE
from deepseek_jax.model import logit_functions
from deepseek_jax.model.logit_functions import Logits
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, on_cpu, per_device
from deepseek_jax.parallel.sharding import without_stage
from deepseek_jax.parallel.weights import gather_on_device, stored_arrays

# Tokens of a device whose logits are alive at a time: on a CPU, where they should stay in its caches.
CHUNK_TOKENS = 1024
# On a GPU, which reads and writes the head's float32 gradient once a chunk (at 1,024 tokens and a width of
# 2,048 as many bytes as four passes over the logits): as many tokens as have logits of LOGIT_BYTES.
MOST_CHUNK_TOKENS = 4096
LOGIT_BYTES = 2 << 30
TILE = 128  # rows of a GPU's matrix product


def chunk_tokens(tokens: int, words: int) -> int:
    """Tokens of a chunk, of so many tokens and words of one device of the current mesh."""
    if on_cpu():
        return min(CHUNK_TOKENS, tokens)
    most = max(CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, LOGIT_BYTES // (4 * words)))
    even = -(-tokens // -(-tokens // most))  # the last chunk is as full as the others
    return min(tokens, -(-even // TILE) * TILE)


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


def scan_vocab_sum(
    function: Callable,
    hidden_BSD: jax.Array,
    head: Head,
    *inputs: jax.Array,
    frozen: Sequence[tuple[jax.Array, Head]] = (),
) -> tuple[jax.Array, ...]:
    """The sums of a function's values over all tokens of the global batch, float32 scalars.

    Args:
      function: one of logit_functions.py or of its kind, hashable: a function of a module, or `partial` or
        `weighted` of one.
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
    """The values of a function for each token, [B, S]. Arguments as `scan_vocab_sum`; the first value
    has a gradient.
    """

    def one_device(*args):
        values = _each(function, *_values_of_device(args, inputs, frozen, specs))
        return tuple(v.reshape(args[0].shape[:2]) for v in values)

    args, in_specs, specs = _arguments(hidden_BSD, head, inputs, frozen)
    return per_device(one_device, in_specs, TOKENS)(*args)


def scan_vocab_top(
    hidden_BSD: jax.Array, head: Head, count: int, words: int, temperatures_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest words of each token: as `logit_functions.top`, [B, S, K] and [B, S, N]. Not
    differentiated.
    """

    def one_device(temperatures_N, *args):
        hidden_TD, kernel_DV, _, _ = _values_of_device(args, (), (), specs)

        def step(_, hidden_CD):
            logits = _logits(hidden_CD, kernel_DV)
            return None, logit_functions.top(logits, count, words, temperatures_N)

        size = _size(hidden_TD, kernel_DV)
        _, found = lax.scan(step, None, _in_chunks(hidden_TD, size))
        leading = args[0].shape[:2]
        return tuple(_joined(a, hidden_TD.shape[0]).reshape(*leading, a.shape[-1]) for a in found)

    args, in_specs, specs = _arguments(hidden_BSD, head, (), ())
    return per_device(one_device, (jax.P(), *in_specs), TOKENS)(temperatures_N, *args)


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
    return lax.scan(step, zeros, _chunks(hidden_TD, kernel_DV, frozen, inputs))[0]


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
    chunks = _chunks(hidden_TD, kernel_DV, frozen, inputs)
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

    _, values = lax.scan(step, None, _chunks(hidden_TD, kernel_DV, frozen, inputs))
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
    size = _size(hidden_TD, kernel_DV, frozen)
    chunks = _in_chunks(cotangents[0], size), _chunks(hidden_TD, kernel_DV, frozen, inputs)
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
    """The arguments of a function of logits."""
    hidden_CD, frozen_hidden, per_token = chunk
    kernels = kernel_DV, *(kernel for _, kernel in frozen)
    logits = [_logits(h, k) for h, k in zip((hidden_CD, *frozen_hidden), kernels, strict=True)]
    per_token = iter(per_token)
    return *logits, *(next(per_token) if a.ndim else a for a in inputs)


def _logits(hidden_CD: jax.Array, kernel_DV: jax.Array) -> Logits:
    logit_CV = jnp.einsum("cd,dv->cv", hidden_CD, kernel_DV, preferred_element_type=jnp.float32)
    return Logits(logit_CV)


def _chunks(hidden_TD, kernel_DV, frozen, inputs) -> tuple[jax.Array, tuple, tuple]:
    """(hidden states, those of frozen models, inputs of each token) in chunks."""
    size = _size(hidden_TD, kernel_DV, frozen)
    return (
        _in_chunks(hidden_TD, size),
        tuple(_in_chunks(h, size) for h, _ in frozen),
        tuple(_in_chunks(a, size) for a in inputs if a.ndim),
    )


def _size(hidden_TD, kernel_DV, frozen=()) -> int:
    """Tokens of a chunk; the logits of frozen models are alive with those of the first."""
    words = kernel_DV.shape[1] + sum(kernel.shape[1] for _, kernel in frozen)
    return chunk_tokens(hidden_TD.shape[0], words)


def _in_chunks(a: jax.Array, size: int) -> jax.Array:
    """[T, ...] to [chunks, size, ...], the last one filled up with tokens that count for nothing."""
    tokens = a.shape[0]
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
        chunk = jax.tree.map(lambda a: a[0], _chunks(hidden_TD, kernel_DV, frozen, inputs))
        return function(*_of_chunk(chunk, kernel_DV, frozen, inputs))[0]

    zero = lax.pmax(jnp.zeros_like(hidden_TD, jnp.float32, shape=()), "tensor")
    return (zero,) * len(jax.eval_shape(values))
