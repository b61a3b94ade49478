"""Drafts by multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2; speculative decoding: arXiv:2211.17192).

The main model reads the newest token and its drafts in one pass, and at every place chooses as it would have without drafts: with the same
key, from the same logits. A draft counts if it is what was chosen, so answers do not depend on drafts, with sampling either. A draft is drawn
with the key of its place: where both have nearly the same logits, they draw nearly always the same token.

Depth d (from 0) reads at position i the state of the depth before and token i + d + 1. Its keys and values of a text's last d positions
come from drafts, and stay so if those were wrong: that costs some acceptance with several depths, never an answer. Where there are more
drafts than depths, the last depth reads its own state, one position on.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.inference.generation import attention, cache, sampling

if TYPE_CHECKING:
    from deepseek_jax.inference.generation.engine import Engine, Step


class Drafter:
    """Drafts for the rows of a batch.

    Args:
      count: drafts a step. how: what `sampling.choose` is called with.
    """

    def __init__(self, engine: "Engine", count: int, how: dict[str, Any]):
        self._engine, self._count, self._how = engine, count, how
        self._depths = engine.weights.mtp[:count]
        self._caches: list[Any] = []
        key = ("draft", count)
        if key not in engine.programs:
            static = ("slots", "top_k", "greedy")
            engine.programs[key] = engine.jit(
                functools.partial(_draft, engine, count),
                static_argnames=static,
                donate_argnames="caches",
            )
        self._program = engine.programs[key]

    def begin(
        self, x_BSD: jax.Array, tokens_BS: np.ndarray, last_B: jax.Array, step: "Step", slots: int
    ) -> jax.Array:
        """Drafts [B, count] after prompts and their first tokens.

        Args:
          x_BSD: the prompts' states before the last norm. last_B: where each prompt ends. step: the first tokens.
        """
        tokens_BS = self._engine.put(tokens_BS)
        return self._run(
            None,
            x_BSD,
            _shifted(tokens_BS, last_B, step.tokens_B),
            jnp.zeros_like(last_B),
            last_B,
            step.active_B,
            slots,
        )

    def go_on(
        self,
        x_BSD: jax.Array,
        tokens_BS: jax.Array,
        start_B: jax.Array,
        count_B: jax.Array,
        step: "Step",
    ) -> jax.Array:
        """Drafts after a step's tokens, of which count_B count; x are states at start_B and after, each before one of them."""
        return self._run(
            self._caches,
            x_BSD,
            tokens_BS,
            start_B,
            jnp.maximum(count_B, 1) - 1,
            step.active_B,
            None,
        )

    def _run(self, caches, x_BSD, next_BS, start_B, last_B, active_B, slots):
        leaves = [depth.leaves[0] for depth in self._depths]
        drafts, self._caches = self._program(
            self._engine.weights.ends[2],
            leaves,
            x_BSD,
            next_BS,
            start_B,
            last_B,
            active_B,
            caches=caches,
            slots=slots,
            **self._how,
        )
        return drafts


def _shifted(tokens_BS: jax.Array, last_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Each place has what was one place on; `last_B` has `token_B`."""
    moved_BS = jax.lax.pad(tokens_BS, jnp.zeros((), tokens_BS.dtype), [(0, 0, 0), (-1, 1, 0)])
    return jnp.where(jnp.arange(tokens_BS.shape[1]) == last_B[:, None], token_B[:, None], moved_BS)


def _draft(
    engine,
    count,
    ends,
    leaves,
    x_BSD,
    next_BS,
    start_B,
    last_B,
    active_B,
    caches,
    slots,
    drawing,
    top_k,
    greedy,
):
    """(drafts [B, count], caches of the depths).

    Args:
      x_BSD: states of the main model before its last norm. next_BS: the token after each. start_B: position of the first.
      last_B: the place of the last state that counts. caches: None for texts from their beginning, with `slots`.
    """
    net, depths = engine.ends(ends), engine.weights.mtp
    hidden_BSD = net.norm(x_BSD)
    segments_BS = (active_B[:, None] & (jnp.arange(x_BSD.shape[1]) <= last_B[:, None])).astype(
        jnp.int32
    )
    made, drafts = [], []
    state_B1D = token_B = None  # of the depth before
    for n in range(count):
        module, absorbed = depths[min(n, len(leaves) - 1)].layer(leaves[min(n, len(leaves) - 1)])
        if n < len(leaves):
            at_B, new = start_B, made
            attend = (
                attention.prefill(slots, new)
                if caches is None
                else attention.cached(caches[n], absorbed, at_B, new)
            )
        else:
            at_B, new = start_B + last_B + 1 + (n - len(leaves)), []
            hidden_BSD, next_BS, segments_BS = (
                state_B1D,
                token_B[:, None],
                active_B[:, None].astype(jnp.int32),
            )
            attend = attention.cached(made[-1], absorbed, at_B, new)
        embedded, rope = engine.embedded(net, next_BS, at_B)
        hidden_BSD, _ = module(hidden_BSD, embedded, rope, segments_BS, attend)
        if n >= len(leaves):
            made[-1] = new[0]
        state_B1D = cache.pick(hidden_BSD, last_B) if n < len(leaves) else hidden_BSD
        position_B1 = (start_B + last_B + 2 + n)[:, None]
        token_B = sampling.choose(
            engine.logits_of(net, state_B1D), position_B1, drawing, top_k, greedy
        )[:, 0]
        drafts.append(token_B)
        if n < len(leaves):
            next_BS = _shifted(next_BS, last_B, token_B)
    return jnp.stack(drafts, axis=1), made
