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
from deepseek_jax.parallel.mesh import BATCH_AXES


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
      options: how tokens are chosen.
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use).
      stop: ids that end the answer, which are not given.
    """
    layout, params, bias, mesh = bound
    length = min(len(prompt) + count, bound.net().config.max_position_embeddings)
    width = -(-length // 64) * 64  # one compiled program for texts of about this length
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)

    @jax.jit
    def step(params, bias, tokens_S, used):
        def batch(a_S: jax.Array) -> jax.Array:
            """A copy for every device, because the mesh must divide a batch."""
            return jax.sharding.reshard(jnp.broadcast_to(a_S, (ways, width)), P(BATCH_AXES, None))

        place_S = jnp.arange(width, dtype=jnp.int32)
        net = layout.merge_for_inference(params, bias)
        segments_S = (place_S < used).astype(jnp.int32)
        out = net(batch(tokens_S), batch(segments_S), batch(place_S))
        last_B1D = jax.lax.dynamic_slice_in_dim(out.hidden_BSD, used - 1, 1, axis=1)
        logits_V = jax.sharding.reshard(net.logits(last_B1D)[:, 0], P(None, None))[0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < vocab, logits_V, -jnp.inf)
        drawing = sampling.drawing(options, jnp.zeros(1, jnp.int32))
        chosen = sampling.choose(logits_V[None, None], used[None, None], drawing)[0, 0]
        return tokens_S.at[used].set(chosen, mode="drop"), chosen

    whole = NamedSharding(mesh, P())
    buffer = jax.device_put(np.pad(np.asarray(prompt, np.int32), (0, width - len(prompt))), whole)
    for used in range(len(prompt), length):
        buffer, chosen = step(params, bias, buffer, jnp.int32(used))
        if int(chosen) in stop:
            return
        yield int(chosen)


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
