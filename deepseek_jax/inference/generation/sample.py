"""A few tokens of a model in training, wherever its weights are: every one is a forward pass over the whole text so far.

It needs no memory beside that of an evaluation, and works over several processes, with stages and with weights in the host's memory.
"""

from collections.abc import Iterator

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
from deepseek_jax.model.layout import PlacedModel
from deepseek_jax.parallel.mesh import BATCH_AXES


def tokens(
    layout: PlacedModel,
    params,
    bias,
    mesh: jax.sharding.Mesh,
    prompt: list[int],
    count: int,
    vocab: int,
    stop: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Yields up to `count` token ids after the prompt, one at a time; ends after `stop` or at the model's longest sequence.

    Args:
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use).
    """
    longest = layout.merge_for_inference(params, bias).model.max_position_embeddings
    length = min(len(prompt) + count, longest)
    width = -(-length // 64) * 64  # one compiled program for texts of about this length
    ways = int(
        np.prod([mesh.shape[a] for a in BATCH_AXES])
    )  # the batch must be divisible: every device gets the same row

    @jax.jit
    def step(params, bias, tokens_S, used):
        row = lambda a: jax.sharding.reshard(
            jnp.broadcast_to(a, (ways, width)), P(BATCH_AXES, None)
        )
        place = jnp.arange(width, dtype=jnp.int32)
        model = layout.merge_for_inference(params, bias)
        out = model(row(tokens_S), row((place < used).astype(jnp.int32)), row(place))
        last = jax.lax.dynamic_slice_in_dim(out.hidden_BSD, used - 1, 1, axis=1)
        logits_V = jax.sharding.reshard(model.logits(last)[:, 0], P(None, None))[0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < vocab, logits_V, -jnp.inf)
        drawing = sampling.drawing(
            sampling.Sampling(temperature, 0, top_p, seed), jnp.zeros(1, jnp.int32)
        )
        chosen = sampling.choose(
            logits_V[None, None], used[None, None], drawing, 0, temperature == 0
        )[0, 0]
        return tokens_S.at[used].set(chosen, mode="drop"), chosen

    whole = NamedSharding(mesh, P())
    buffer = jax.device_put(np.pad(np.asarray(prompt, np.int32), (0, width - len(prompt))), whole)
    for used in range(len(prompt), length):
        buffer, chosen = step(params, bias, buffer, jnp.int32(used))
        if int(chosen) == stop:
            return
        yield int(chosen)


def sample(
    layout: PlacedModel,
    params,
    bias,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    prompt: str,
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """The prompt and up to `count` tokens after it, as text."""
    start = encode_prompt(tokenizer, prompt)
    ids = list(
        tokens(
            layout,
            params,
            bias,
            mesh,
            start,
            count,
            tokenizer.vocab_size,
            tokenizer.eos_id,
            temperature,
            top_p,
            seed,
        )
    )
    return clean_text(prompt) + tokenizer.decode(ids, after=start)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is the end-of-document token, after which a document begins."""
    return [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]


def check_prompt(prompt: str, option: str, tokenizer: Tokenizer, config: Config) -> None:
    """Raises UserError for a prompt that leaves no place for a token after it."""
    length, longest = len(encode_prompt(tokenizer, prompt)), config.model.max_position_embeddings
    if length >= longest:
        raise UserError(
            f"{option} has {length} tokens, but the model ends at config.model.max_position_embeddings={longest}. Shorten the prompt."
        )
