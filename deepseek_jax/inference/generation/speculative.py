"""Drafts by multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2).

This is speculative decoding (arXiv:2211.17192).

The main model reads the newest token and its drafts in one pass, and at every place chooses as it
would without drafts: with the same key, from the same logits. A draft counts if it is what was
chosen, so drafts never change an answer, sampled or not. Drafts are drawn with the key of their
place: where both have nearly the same logits, they nearly always draw the same token.

Depth d (from 0) reads at position i the state of the depth before and token i + d + 1. Its keys and
values of a text's last d positions come from drafts, and stay so if those were wrong: with several
depths that costs some acceptance, never an answer. Where there are more drafts than depths, the
last depth reads its own state, one position on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.inference.generation import programs, sampling
from deepseek_jax.inference.generation.layer_weights import Group, LayerWeights
from deepseek_jax.inference.generation.programs import AnswerState, Programs, pick
from deepseek_jax.inference.generation.sampling import Drawing
from deepseek_jax.model.attention.interface import LayerCache


class Read(NamedTuple):
    """What the main model has read and found, from which drafts go on."""

    x_BSD: jax.Array  # states before the last norm
    next_BS: jax.Array  # int32: the token after each state
    start_B: jax.Array  # int32: the position of the first state
    last_B: jax.Array  # int32: the place of the last state that counts
    active_B: jax.Array  # bool: the answer goes on


class Drafter:
    """Drafts for the answers of one batch."""

    def __init__(
        self, weights: LayerWeights, compiled: Programs, count: int, drawing: Drawing, slots: int
    ):
        """A drafter that has read nothing yet.

        Args:
          weights: of the model.
          compiled: its programs, which the drafts' program joins.
          count: drafts per step.
          drawing: how the answers' tokens are drawn.
          slots: of the caches.
        """
        self._weights = weights
        self._depths = weights.mtp[:count]
        self._drawing = drawing
        self._caches: list[LayerCache] | None = None

        def make():
            draft = _DraftProgram(compiled, self._depths, count).run
            return jax.jit(draft, static_argnames="slots", donate_argnames="caches")

        self._program = functools.partial(compiled.cached(("draft", count), make), slots=slots)

    def begin(
        self, x_BSD: jax.Array, tokens_BS: jax.Array, last_B: jax.Array, state: AnswerState
    ) -> jax.Array:
        """Drafts [B, count] after prompts and their first tokens.

        Args:
          x_BSD: the prompts' states before the last norm.
          tokens_BS: int32, the prompts.
          last_B: int32, the place of each prompt's last token.
          state: the answers' first tokens.
        """
        next_BS = _shifted(tokens_BS, last_B, state.tokens_B)
        return self._run(Read(x_BSD, next_BS, jnp.zeros_like(last_B), last_B, state.active_B))

    def go_on(
        self,
        x_BSD: jax.Array,
        tokens_BS: jax.Array,
        start_B: jax.Array,
        count_B: jax.Array,
        state: AnswerState,
    ) -> jax.Array:
        """Drafts [B, count] after a step.

        Args:
          x_BSD: states before the last norm, at start_B and after.
          tokens_BS: int32, the token chosen after each.
          start_B: int32, the position of the first state.
          count_B: int32, how many of the tokens count.
          state: the answers after the step.
        """
        last_B = jnp.maximum(count_B, 1) - 1
        return self._run(Read(x_BSD, tokens_BS, start_B, last_B, state.active_B))

    def _run(self, read: Read) -> jax.Array:
        leaves = [depth.leaves[0] for depth in self._depths]
        drafts_BN, self._caches = self._program(
            self._weights.ends.leaves, leaves, read, self._drawing, caches=self._caches
        )
        return drafts_BN


def _shifted(tokens_BS: jax.Array, last_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """At each place the token of the next one; at `last_B` the token of `token_B`."""
    moved_BS = jax.lax.pad(tokens_BS, jnp.zeros((), tokens_BS.dtype), [(0, 0, 0), (-1, 1, 0)])
    return jnp.where(jnp.arange(tokens_BS.shape[1]) == last_B[:, None], token_B[:, None], moved_BS)


class _DraftProgram(NamedTuple):
    """All drafts of a step."""

    compiled: Programs
    depths: list[Group]
    drafts: int  # at least as many as depths

    def run(
        self,
        ends: list[jax.Array],
        leaves: list[list[jax.Array]],
        read: Read,
        drawing: Drawing,
        caches: list[LayerCache] | None,
        slots: int,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """(drafts [B, count], caches of the depths).

        Args:
          ends: weights of the model without layers.
          leaves: weights of each depth.
          read: where the main model is.
          drawing: how tokens are drawn.
          caches: of the depths; None for texts from their beginning, which get caches of so many slots.
          slots: of the caches.
        """
        net = self.compiled.ends.net(ends)
        start_B, last_B, active_B = read.start_B, read.last_B, read.active_B
        counts_BS = active_B[:, None] & (jnp.arange(read.next_BS.shape[1]) <= last_B[:, None])
        segments_BS = counts_BS.astype(jnp.int32)
        hidden_BSD = net.norm(read.x_BSD)
        next_BS = read.next_BS
        new_caches: list[LayerCache] = []
        drafts: list[jax.Array] = []

        def draw(state_B1D: jax.Array) -> jax.Array:
            """The draft after a depth's newest state; it is the next one in `drafts`."""
            position_B1 = (start_B + last_B + 2 + len(drafts))[:, None]
            logits_B1V = self.compiled.logits_of(net, state_B1D)
            drafts.append(sampling.choose(logits_B1V, position_B1, drawing)[:, 0])
            return drafts[-1]

        for n, (depth, of_depth) in enumerate(zip(self.depths, leaves, strict=True)):
            module, weights = depth.layer(of_depth)
            if caches is None:
                attend = programs.attend_and_cache(slots, new_caches)
            else:
                attend = programs.attend_to_cache(caches[n], weights, start_B, new_caches)
            embedded_BSD, rope = self.compiled.embed_at(net, next_BS, start_B)
            hidden_BSD, _ = module(hidden_BSD, embedded_BSD, rope, segments_BS, attend)
            state_B1D = pick(hidden_BSD, last_B)
            token_B = draw(state_B1D)
            next_BS = _shifted(next_BS, last_B, token_B)
        for n in range(self.drafts - len(self.depths)):
            # The last depth once more, on its own newest state and token.
            position_B = start_B + last_B + 1 + n
            grown: list[LayerCache] = []
            attend = programs.attend_to_cache(new_caches[-1], weights, position_B, grown)
            embedded_BSD, rope = self.compiled.embed_at(net, token_B[:, None], position_B)
            segments_B1 = active_B[:, None].astype(jnp.int32)
            state_B1D, _ = module(state_B1D, embedded_BSD, rope, segments_B1, attend)
            new_caches[-1] = grown[0]
            token_B = draw(state_B1D)
        return jnp.stack(drafts, axis=1), new_caches
