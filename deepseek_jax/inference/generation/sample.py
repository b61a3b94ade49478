"""A few tokens of a model in training, wherever its weights are.

Each is a forward pass over the whole text so far.

It needs no more memory than an evaluation, and works over several processes, with stages and with
weights in the host's memory. Shape letters: model/layers.py.
"""

import math
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.config.options import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import sampling
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.model.layout import ModelWeights, PlacedModel
from deepseek_jax.parallel.mesh import BATCH_AXES


class Sampler:
    """Continues texts with a model whose weights change: what is compiled for a length is kept.

    Args:
      layout: the model, laid out over the mesh.
      options: how tokens are chosen.
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use).
    """

    def __init__(self, layout: PlacedModel, mesh: jax.sharding.Mesh, options: Sampling, vocab: int):
        self._layout = layout
        self._mesh = mesh
        self._options = options
        self._vocab = vocab
        self._step = jax.jit(self._next)

    def tokens(
        self, weights: ModelWeights, prompt: list[int], count: int, stop: Collection[int]
    ) -> Iterator[int]:
        """As the function `tokens`."""
        net = self._layout.merge_for_inference(*weights)
        length = min(len(prompt) + count, net.config.max_position_embeddings)
        width = -(-length // 64) * 64  # one compiled program for texts of about this length
        padded = np.pad(np.asarray(prompt, np.int32), (0, width - len(prompt)))
        buffer = jax.device_put(padded, NamedSharding(self._mesh, P()))
        for used in range(len(prompt), length):
            buffer, chosen = self._step(*weights, buffer, jnp.int32(used))
            if int(chosen) in stop:
                return
            yield int(chosen)

    def _next(self, params, bias, tokens_S, used):
        """(the text with one more token, that token)."""
        width = tokens_S.shape[0]
        ways = math.prod(self._mesh.shape[a] for a in BATCH_AXES)

        def batch(a_S: jax.Array) -> jax.Array:
            """A copy for every device, because the mesh must divide a batch."""
            return jax.sharding.reshard(jnp.broadcast_to(a_S, (ways, width)), P(BATCH_AXES, None))

        place_S = jnp.arange(width, dtype=jnp.int32)
        net = self._layout.merge_for_inference(params, bias)
        segments_S = (place_S < used).astype(jnp.int32)
        out = net(batch(tokens_S), batch(segments_S), batch(place_S))
        last_B1D = jax.lax.dynamic_slice_in_dim(out.hidden_BSD, used - 1, 1, axis=1)
        logits_V = jax.sharding.reshard(net.logits(last_B1D)[:, 0], P(None, None))[0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < self._vocab, logits_V, -jnp.inf)
        drawing = sampling.drawing(self._options, jnp.zeros(1, jnp.int32))
        chosen = sampling.choose(logits_V[None, None], used[None, None], drawing)[0, 0]
        return tokens_S.at[used].set(chosen, mode="drop"), chosen


def tokens(
    bound: BoundModel,
    prompt: list[int],
    count: int,
    options: Sampling,
    vocab: int,
    stop: Collection[int],
) -> Iterator[int]:
    """Yields up to `count` token ids after the prompt, one at a time.

    Args:
      bound: the model.
      prompt: token ids, at least one.
      count: tokens at most; the answer also ends at the model's longest sequence.
      options, vocab: as Sampler.
      stop: ids that end the answer, which are not given.
    """
    sampler = Sampler(bound.model, bound.mesh, options, vocab)
    return sampler.tokens(ModelWeights(bound.params, bound.bias), prompt, count, stop)


def sample(
    bound: BoundModel, tokenizer: Tokenizer, prompt: str, count: int, options: Sampling
) -> str:
    """The prompt and up to `count` tokens after it, as text."""
    start = encode_prompt(tokenizer, prompt)
    ids = list(tokens(bound, start, count, options, tokenizer.vocab_size, {tokenizer.eos_id}))
    return clean_text(prompt) + tokenizer.decode(ids, after=start)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is the end-of-document token, after which a document begins."""
    return [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]


def check_prompt(prompt: str, option: str, tokenizer: Tokenizer, config: Config) -> None:
    """Raises UserError for a prompt that leaves no room for a token after it."""
    length = len(encode_prompt(tokenizer, prompt))
    longest = config.model.max_position_embeddings
    if length >= longest:
        raise UserError(
            f"{option} has {length} tokens, but the model ends at "
            f"config.model.max_position_embeddings={longest}. Shorten the prompt."
        )
