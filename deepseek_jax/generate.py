"""Sample text from a trained model: python -m deepseek_jax.generate --workdir=DIR --prompt=TEXT

Every token is one forward pass over the whole text so far: simple and right, not fast.
"""

import argparse
import os
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import compilation
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import Config, Mesh, Offload, Sharding, UserError, from_config_dict
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.hf import reading, start
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import Layout, TrainState, from_tree, make_layout, to_tree
from deepseek_jax.validation import validate


def choose(logits_V: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """One token id from float32 logits.

    Args:
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: samples from the smallest set of likeliest tokens whose probabilities sum to at least this (nucleus sampling,
        arXiv:1904.09751); 1 samples from all.
    """
    if temperature == 0:
        return jnp.argmax(logits_V)
    logits_V = (logits_V - jnp.max(logits_V)) / temperature  # the maximum first: a tiny temperature must not overflow
    if top_p == 1:
        return jax.random.categorical(key, logits_V)
    p_V = jax.nn.softmax(logits_V)
    sorted_V = jnp.sort(p_V, descending=True)
    before_V = jnp.cumsum(sorted_V) - sorted_V  # probability of all likelier tokens
    threshold = jnp.min(jnp.where(before_V < top_p, sorted_V, jnp.inf))
    return jax.random.categorical(key, jnp.where(p_V >= threshold, jnp.log(p_V), -jnp.inf))


def tokens(layout: Layout, params, bias, mesh: jax.sharding.Mesh, prompt: list[int], count: int, vocab: int, stop: int | None,
           temperature: float, top_p: float, seed: int) -> Iterator[int]:
    """Yields up to `count` token ids after the prompt, one at a time; ends after `stop` or at the model's longest sequence.

    Args:
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use).
    """
    longest = layout.merge_for_inference(params, bias).model.max_position_embeddings
    length = min(len(prompt) + count, longest)
    width = -(-length // 64) * 64  # one compiled program for texts of about this length
    ways = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))  # the batch must be divisible: every device gets the same row

    @jax.jit
    def step(params, bias, tokens_S, used, key):
        row = lambda a: jax.sharding.reshard(jnp.broadcast_to(a, (ways, width)), P(BATCH_AXES, None))
        place = jnp.arange(width, dtype=jnp.int32)
        model = layout.merge_for_inference(params, bias)
        out = model(row(tokens_S), row((place < used).astype(jnp.int32)), row(place))
        last = jax.lax.dynamic_slice_in_dim(out.hidden_BSD, used - 1, 1, axis=1)
        logits_V = jax.sharding.reshard(model.logits(last)[:, 0], P(None, None))[0]
        chosen = choose(jnp.where(jnp.arange(logits_V.shape[0]) < vocab, logits_V, -jnp.inf), jax.random.fold_in(key, used), temperature, top_p)
        return tokens_S.at[used].set(chosen.astype(jnp.int32), mode="drop"), chosen

    whole = NamedSharding(mesh, P())
    buffer = jax.device_put(np.pad(np.asarray(prompt, np.int32), (0, width - len(prompt))), whole)
    key = jax.random.key(seed)
    for used in range(len(prompt), length):
        buffer, chosen = step(params, bias, buffer, jnp.int32(used), key)
        if int(chosen) == stop:
            return
        yield int(chosen)


def sample(layout: Layout, params, bias, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, prompt: str, count: int, temperature: float,
           top_p: float, seed: int) -> str:
    """The prompt and up to `count` tokens after it, as text."""
    start = encode_prompt(tokenizer, prompt)
    ids = list(tokens(layout, params, bias, mesh, start, count, tokenizer.vocab_size, tokenizer.eos_id, temperature, top_p, seed))
    return prompt + tokenizer.decode(ids)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is the end-of-document token, after which a document begins."""
    return [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]


def check_prompt(prompt: str, option: str, tokenizer: Tokenizer, config: Config) -> None:
    """Raises UserError for a prompt that leaves no place for a token after it."""
    length, longest = len(encode_prompt(tokenizer, prompt)), config.model.max_position_embeddings
    if length >= longest:
        raise UserError(f"{option} has {length} tokens, but the model ends at config.model.max_position_embeddings={longest}. Shorten the prompt.")


def load(workdir: str, step: int | None) -> tuple[Config, Layout, jax.sharding.Mesh, TrainState]:
    """The model of a run, whole on one device.

    Raises:
      UserError: there is no run or checkpoint in the folder.
    """
    saved = workdirs.read_config(workdir)
    alone = {"mesh": Mesh(fsdp=1).__dict__, "sharding": Sharding().__dict__, "offload": Offload().__dict__}
    config = from_config_dict(saved | alone)
    validate(config)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = make_layout(config, mesh)
        wanted = layout.abstract_sharded()._replace(opt_state=(), step=None, bad_steps=None, skipped_steps=None, loss_scale=None)
        folder = workdirs.checkpoints(workdir, config)
        if step is None and start.is_untrained(workdir, folder):
            params, bias = reading.read(os.path.join(workdir, start.FOLDER), config, layout)
            return config, layout, mesh, wanted._replace(params=params, bias=bias)
        checkpointer = Checkpointer(folder, read_only=True)
        tree = checkpointer.restore_params(to_tree(wanted), step)
        checkpointer.close()
    return config, layout, mesh, from_tree(tree, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_jax.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="folder of a run of train.py")
    parser.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--max-tokens", "--max_tokens", type=int, default=200, help="tokens to add at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)")
    parser.add_argument("--top-p", "--top_p", type=float, default=0.95,
                        help="sample from the likeliest tokens that make up this probability (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1 or args.max_tokens < 1:
            raise UserError(f"--temperature={args.temperature} must be 0 or more and finite, --top-p={args.top_p} above 0 and at most 1, "
                            f"--max-tokens={args.max_tokens} at least 1.")
        config, layout, mesh, state = load(args.workdir, args.step)
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_prompt(args.prompt, "--prompt", tokenizer, config)
    except UserError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    compilation.use_cache(config.compile.cache_dir, warn=lambda line: print(line, file=sys.stderr))
    try:
        show(layout, mesh, state, tokenizer, args)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def show(layout: Layout, mesh: jax.sharding.Mesh, state: TrainState, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Prints the prompt and each token as it comes."""
    prompt = encode_prompt(tokenizer, args.prompt)
    print(args.prompt, end="", flush=True)
    ids: list[int] = []
    shown = 0
    with jax.set_mesh(mesh):
        for token in tokens(layout, state.params, state.bias, mesh, prompt, args.max_tokens, tokenizer.vocab_size, tokenizer.eos_id,
                            args.temperature, args.top_p, args.seed):
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character of several tokens is shown when it is whole
                print(text[shown:], end="", flush=True)
                shown = len(text)
    print(tokenizer.decode(ids)[shown:])


if __name__ == "__main__":
    sys.exit(main())
