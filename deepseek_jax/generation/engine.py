"""Prefill and decoding of a batch of prompts: which programs run, in which order.

A step is some calls: the embedding, every group of layers (weights.py), the head with the choice of tokens. Tokens stay on the device
from step to step; the host reads them one step late, while the next step runs.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, UserError
from deepseek_jax.generation import attention, cache, sampling, weights
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.train.state import Layout

ROWS = P(BATCH_AXES)


class Token(NamedTuple):
    """One token of one prompt's answer."""

    index: int  # of the prompt
    id: int


class Step(NamedTuple):
    """Rows between two steps."""

    tokens_B: jax.Array  # int32: the newest token of each, not in the cache yet
    position_B: jax.Array  # int32: its position
    active_B: jax.Array  # bool: the answer goes on


class Engine:
    """A model ready to generate.

    Args:
      params, bias: of the layout, on the mesh.
      give: they are not needed afterwards, and may be freed.
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use); None: all may be.
    """

    def __init__(self, config: Config, layout: Layout, mesh: jax.sharding.Mesh, params: Any, bias: Any, give: bool = False,
                 vocab: int | None = None):
        self.model, self.mesh = config.model, mesh
        self.dtype = jnp.dtype(config.train.dtype)
        self.ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
        self.vocab = min(vocab or config.model.vocab_size, config.model.vocab_size)
        with jax.set_mesh(mesh):
            self.weights = weights.unstacked(layout.merge_for_inference(params, bias), mesh, give)
        ends_graphdef, ends_treedef, _ = self.weights.ends
        self._ends = lambda leaves: nnx.merge(ends_graphdef, jax.tree.unflatten(ends_treedef, leaves))
        self._enter = jax.jit(self._enter_)
        self._programs: dict[Any, Any] = {}
        self._choose = jax.jit(self._choose_, static_argnames=("top_k", "greedy"))

    # ------------------------------------------------------------------------------------------------------------- programs

    def _enter_(self, leaves, tokens_BS, start_B):
        positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
        return self._ends(leaves).embed_tokens(tokens_BS, self.dtype), rope_tables(self.model, positions_BS)

    def _prefill(self, group: weights.Group):
        """(leaves, x, rope, length_B, slots) -> (x, caches)."""
        key = ("prefill", group.graphdef, group.treedef)
        if key not in self._programs:

            @functools.partial(jax.jit, static_argnames="slots")
            def run(leaves, x_BSD, rope, length_B, slots):
                made = []
                segments_BS = (jnp.arange(x_BSD.shape[1]) < length_B[:, None]).astype(jnp.int32)
                for of_layer in leaves:
                    x_BSD, _ = group.layer(of_layer)[0](x_BSD, rope, segments_BS, attention.prefill(slots, made))
                return x_BSD, made

            self._programs[key] = run
        return self._programs[key]

    def _decode(self, group: weights.Group):
        """(leaves, caches, x, rope, start_B, active_B) -> (x, caches); takes the caches' memory."""
        key = ("decode", group.graphdef, group.treedef)
        if key not in self._programs:

            @functools.partial(jax.jit, donate_argnums=1)
            def run(leaves, caches, x_BSD, rope, start_B, active_B):
                made = []
                segments_BS = jnp.broadcast_to(active_B[:, None], x_BSD.shape[:2]).astype(jnp.int32)
                for of_layer, held in zip(leaves, caches, strict=True):
                    layer, absorbed = group.layer(of_layer)
                    x_BSD, _ = layer(x_BSD, rope, segments_BS, attention.cached(held, absorbed, start_B, made))
                return x_BSD, made

            self._programs[key] = run
        return self._programs[key]

    def _logits(self, leaves, x_BSD):
        """float32 [B, S, V], whole on each device of the row; -inf where no token is."""
        net = self._ends(leaves)
        logits_BSV = jax.sharding.reshard(net.logits(net.norm(x_BSD)), P(BATCH_AXES, None, None))
        return jnp.where(jnp.arange(logits_BSV.shape[-1]) < self.vocab, logits_BSV, -jnp.inf)

    def _choose_(self, leaves, x_BSD, step, index_B, last_B, seed, temperature, top_p, stop_ids, limit_B, top_k, greedy):
        """The tokens after the positions last_B [B] of x, as the next Step."""
        x_B1D = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1) if x_BSD.shape[1] > 1 else x_BSD
        logits_BV = self._logits(leaves, x_B1D)[:, 0]
        position_B = step.position_B + 1
        if greedy:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        else:
            token_B = sampling.choose(logits_BV, index_B, position_B, seed, temperature, top_k, top_p)
        go_on_B = step.active_B & (position_B < limit_B) & jnp.all(token_B[:, None] != stop_ids, axis=1)
        return Step(token_B, jnp.where(step.active_B, position_B, step.position_B), go_on_B), step.active_B

    # ---------------------------------------------------------------------------------------------------------------- calls

    def prefill(self, tokens_BS: np.ndarray, length_B: np.ndarray, slots: int) -> tuple[jax.Array, list[list[cache.Layer]]]:
        """(hidden states [B, S, D] before the last norm, caches of all groups)."""
        put = lambda a: jax.device_put(a, jax.NamedSharding(self.mesh, ROWS))
        x, rope = self._enter(self.weights.ends[2], put(tokens_BS), put(np.zeros(len(tokens_BS), np.int32)))
        caches, length_B = [], put(length_B)
        for group in self.weights.groups:
            x, made = self._prefill(group)(group.leaves, x, rope, length_B, slots=slots)
            caches.append(made)
        return x, caches

    def advance(self, tokens_BS: jax.Array, start_B: jax.Array, active_B: jax.Array, caches: list) -> tuple[jax.Array, list]:
        """Hidden states [B, S, D] of S tokens a row at start_B and after, and the caches with them."""
        x, rope = self._enter(self.weights.ends[2], tokens_BS, start_B)
        out = []
        for group, held in zip(self.weights.groups, caches, strict=True):
            x, made = self._decode(group)(group.leaves, held, x, rope, start_B, active_B)
            out.append(made)
        return x, out

    def batch(self, prompts: Sequence[Sequence[int]], max_tokens: int, options: Sampling = Sampling(), stop_ids: Sequence[int] = (),
              indexes: Sequence[int] | None = None) -> Iterator[Token]:
        """Tokens of the answers, as they come; a row's last is its stop token if it found one."""
        rows = self.ways * cache.bucket(-(-len(prompts) // self.ways), 1)
        lengths = np.asarray([len(p) for p in prompts] + [1] * (rows - len(prompts)), np.int32)
        width = min(cache.bucket(int(lengths.max()), 16), max(self.model.max_position_embeddings, int(lengths.max())))
        tokens = np.zeros((rows, width), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        limit = np.minimum(lengths + max_tokens, self.model.max_position_embeddings).astype(np.int32) - 1
        slots = cache.slots_for(int(limit.max()) + 1, self.model.max_position_embeddings)
        put = lambda a: jax.device_put(np.asarray(a), jax.NamedSharding(self.mesh, ROWS))
        index = np.arange(len(prompts)) if indexes is None else np.asarray(indexes)
        with jax.set_mesh(self.mesh):
            index_B = put(np.pad(index, (0, rows - len(prompts))).astype(np.int32))
            fixed = dict(index_B=index_B, seed=jnp.uint32(options.seed), temperature=jnp.float32(options.temperature),
                         top_p=None if options.top_p >= 1 else jnp.float32(options.top_p), top_k=options.top_k, greedy=options.temperature == 0,
                         stop_ids=jnp.asarray(sorted(stop_ids) or [-1], jnp.int32), limit_B=put(limit))
            x, caches = self.prefill(tokens, lengths, slots)
            active = np.arange(rows) < len(prompts)
            step = Step(put(tokens[:, 0]), put(lengths - 1), put(active))
            step, valid = self._choose(self.weights.ends[2], x, step, last_B=step.position_B, **fixed)
            zero_B = put(np.zeros(rows, np.int32))
            while True:
                ahead, state = step, None
                x, caches = self.advance(ahead.tokens_B[:, None], ahead.position_B, ahead.active_B, caches)
                state, following = self._choose(self.weights.ends[2], x, ahead, last_B=zero_B, **fixed)
                for row in np.flatnonzero(np.asarray(valid)):
                    yield Token(int(index[row]), int(np.asarray(step.tokens_B)[row]))
                if not np.any(np.asarray(step.active_B)):
                    return
                step, valid = state, following
