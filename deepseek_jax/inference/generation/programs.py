"""The programs of generation, each compiled once per shape: embedding, prefill, decoding, choice of tokens.

Shape letters: model/layers.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.inference.generation import sampling
from deepseek_jax.inference.generation.layer_weights import Group, LayerWeights
from deepseek_jax.inference.generation.sampling import Drawing
from deepseek_jax.model.attention import kv_cache
from deepseek_jax.model.attention.interface import Attention, LayerCache, Rope
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device


class AnswerState(NamedTuple):
    """The answers of a batch between two steps."""

    tokens_B: jax.Array  # int32: the newest token of each, not in the cache yet
    position_B: jax.Array  # int32: its position
    active_B: jax.Array  # bool: the answer goes on


class Rules(NamedTuple):
    """How tokens are chosen, and where answers end."""

    drawing: Drawing
    stop_ids: jax.Array  # int32: an answer ends with any of these
    limit_B: jax.Array  # int32: the last position that each answer may have


class Programs:
    """What runs on devices, for one model. Its weights are arguments of every program."""

    def __init__(self, weights: LayerWeights, config: ModelConfig, dtype: Any, vocab: int):
        """The programs of one model.

        Args:
          weights: of the model.
          config: its options.
          dtype: of the computation.
          vocab: ids from here on are never chosen.
        """
        self.ends = weights.ends.bare()  # programs outlive the weights of a model in training
        self.config = config
        self.dtype = dtype
        self.vocab = vocab
        self.embed = jax.jit(self._embed)
        self.choose = jax.jit(self._choose)
        self._compiled: dict[Any, Callable] = {}

    def cached(self, key: Any, make: Callable[[], Callable]) -> Callable:
        """The program of this key, made where it is asked for first."""
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]

    # --- inside of programs ---

    def embed_at(
        self, net: Transformer, tokens_BS: jax.Array, start_B: jax.Array
    ) -> tuple[jax.Array, Rope]:
        """Embeddings [B, S, D] of tokens at positions start_B and after; cos and sin of these."""
        positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
        return net.embed_tokens(tokens_BS, self.dtype), rope_tables(self.config, positions_BS)

    def logits_of(self, net: Transformer, hidden_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, V] of normed states, divided in B alone; -inf for ids that are no tokens."""
        logits_BSV = jax.sharding.reshard(net.logits(hidden_BSD), P(BATCH_AXES, None, None))
        return jnp.where(jnp.arange(logits_BSV.shape[-1]) < self.vocab, logits_BSV, -jnp.inf)

    # --- programs ---

    def _embed(self, leaves, tokens_BS, start_B):
        """`embed`: (leaves of the ends, tokens, positions of the first) -> (x [B, S, D], rope)."""
        return self.embed_at(self.ends.net(leaves), tokens_BS, start_B)

    def prefill(self, group: Group) -> Callable:
        """(leaves, x, rope, length_B, slots) -> (x, caches): whole prompts through the layers of a group."""

        group = group.bare()

        def make():
            @functools.partial(jax.jit, static_argnames="slots")
            def run(leaves, x_BSD, rope, length_B, slots):
                caches: list[LayerCache] = []
                segments_BS = (jnp.arange(x_BSD.shape[1]) < length_B[:, None]).astype(jnp.int32)
                attend = attend_and_cache(slots, caches)
                for of_layer in leaves:
                    layer, _ = group.layer(of_layer)
                    x_BSD, _ = layer(x_BSD, rope, segments_BS, attend)
                return x_BSD, caches

            return run

        return self.cached(("prefill", group.graphdef, group.treedef), make)

    def decode(self, group: Group) -> Callable:
        """(leaves, caches, x, rope, start_B, active_B) -> (x, caches): new tokens through a group.

        The new caches are in the memory of the old.
        """

        group = group.bare()

        def make():
            @functools.partial(jax.jit, donate_argnums=1)
            def run(leaves, caches, x_BSD, rope, start_B, active_B):
                new_caches: list[LayerCache] = []
                segments_BS = jnp.broadcast_to(active_B[:, None], x_BSD.shape[:2]).astype(jnp.int32)
                for of_layer, cache in zip(leaves, caches, strict=True):
                    layer, weights = group.layer(of_layer)
                    attend = attend_to_cache(cache, weights, start_B, new_caches)
                    x_BSD, _ = layer(x_BSD, rope, segments_BS, attend)
                return x_BSD, new_caches

            return run

        return self.cached(("decode", group.graphdef, group.treedef), make)

    def _choose(self, leaves, x_BSD, state, drafts_BS, last_B, rules):
        """`choose`: the tokens after these states, and how many of them count.

        Args:
          leaves: of the ends.
          x_BSD: states before the last norm; of whole prompts if `last_B` is given.
          state: the AnswerState that x was computed from.
          drafts_BS: int32 [B, S - 1], what x read after the newest token. A draft counts if the
            choice at its place is the same and all drafts before it count.
          last_B: int32, the place of each prompt's last token, which alone is looked at; None: at
            all places.
          rules: Rules.

        Returns:
          The next AnswerState, the chosen tokens int32 [B, S], and how many of them count int32 [B].
        """
        net = self.ends.net(leaves)
        if last_B is not None:
            x_BSD = pick(x_BSD, last_B)
        chex.assert_rank(x_BSD, 3)
        chex.assert_shape(drafts_BS, (x_BSD.shape[0], x_BSD.shape[1] - 1))
        place_S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
        position_BS = state.position_B[:, None] + 1 + place_S
        logits_BSV = self.logits_of(net, net.norm(x_BSD))
        token_BS = sampling.choose(logits_BSV, position_BS, rules.drawing)
        stops_BS = jnp.any(token_BS[..., None] == rules.stop_ids, axis=-1)
        goes_on_BS = (position_BS < rules.limit_B[:, None]) & ~stops_BS
        right_BS = goes_on_BS[:, :-1] & (drafts_BS == token_BS[:, :-1])
        accepted_B = jnp.sum(jnp.cumprod(right_BS.astype(jnp.int32), axis=1), axis=1)

        def newest(a_BS: jax.Array) -> jax.Array:
            return pick(a_BS, accepted_B)[:, 0]

        following = AnswerState(
            newest(token_BS),
            jnp.where(state.active_B, newest(position_BS), state.position_B),
            state.active_B & newest(goes_on_BS),
        )
        return following, token_BS, jnp.where(state.active_B, accepted_B + 1, 0)


def attend_and_cache(slots: int, caches: list[LayerCache]) -> Callable[..., jax.Array]:
    """For DecoderLayer: attention of sequences from their first token on, as in training.

    Appends a cache of so many slots to `caches`.
    """

    def attend(attention: Attention, x_BSD, rope, segment_ids_BS):
        projected = attention.project(x_BSD, rope)
        entries = attention.cache_entries(projected)
        caches.append(tuple(kv_cache.fresh(a, slots) for a in entries))
        return attention.attend(projected, segment_ids_BS)

    return attend


def attend_to_cache(
    cache: LayerCache,
    weights: tuple[jax.Array, ...],
    start_B: jax.Array,
    new_caches: list[LayerCache],
) -> Callable[..., jax.Array]:
    """For DecoderLayer: attention of new tokens at positions start_B and after to themselves and the cache.

    Appends the cache with them in it. Segments play no part: tokens of answers that have ended are
    computed, and never seen, because nothing after them is kept.
    """

    def attend(attention: Attention, x_BSD, rope, segment_ids_BS):
        del segment_ids_BS
        out_BSD, new = attention.decode(attention.project(x_BSD, rope), cache, weights, start_B)
        new_caches.append(new)
        return out_BSD

    return attend


def pick(a_BS: jax.Array, place_B: jax.Array) -> jax.Array:
    """[B, 1, ...]: one place of each sequence of [B, S, ...]."""

    def one_device(a: jax.Array, place: jax.Array) -> jax.Array:
        return jnp.take_along_axis(a, place.reshape(-1, *[1] * (a.ndim - 1)), axis=1)

    sequences = P(BATCH_AXES)
    return per_device(one_device, (sequences, sequences), sequences)(a_BS, place_B)
