"""Prefill and decoding of a batch of prompts: which programs run, in which order.

A step is some calls: the embedding, every group of layers (weights.py), the head with the choice of tokens. Tokens stay on the device
from step to step; the host reads them one step late, while the next step runs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import attention, cache, sampling, weights
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.generation.speculative import Drafter
from deepseek_jax.model.layout import PlacedModel
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import BATCH_AXES

ROWS = P(BATCH_AXES)
jit = jax.jit  # a name for tests, which compile quickly


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
      note: what to do with the line that tells the size of a cache.
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not use); None: all may be.

    Raises:
      UserError: the mesh has an axis that generation does not use.
    """

    def __init__(
        self,
        layout: PlacedModel,
        mesh: jax.sharding.Mesh,
        params: Any,
        bias: Any,
        give: bool = False,
        vocab: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ):
        if wrong := [a for a in ("stage", "context") if mesh.shape[a] > 1]:
            raise UserError(
                f"the mesh has {mesh.shape[wrong[0]]} devices along {wrong[0]}, and generation uses data, fsdp, expert and tensor. "
                f"Set --mesh to, for instance, fsdp=2,expert=4."
            )
        self.mesh, self._note = mesh, note
        self.ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
        with jax.set_mesh(mesh):
            net = layout.merge_for_inference(params, bias)
            self.model, self.dtype = net.model, net.dtype
            self.vocab = min(vocab or self.model.vocab_size, self.model.vocab_size)
            self.weights = weights.unstacked(net, mesh, give)
        ends_graphdef, ends_treedef, _ = self.weights.ends
        self.ends = lambda leaves: nnx.merge(
            ends_graphdef, jax.tree.unflatten(ends_treedef, leaves)
        )
        self.jit = jit
        self._enter = jit(self._enter_)
        self._leave = jit(self._leave_, static_argnames=("top_k", "greedy"))
        self.programs: dict[Any, Any] = {}
        self.drafted = self.accepted = 0  # tokens, of all answers so far
        self._said: set[str] = set()

    # ------------------------------------------------------------------------------------------------------------- programs

    def _enter_(self, leaves, tokens_BS, start_B):
        return self.embedded(self.ends(leaves), tokens_BS, start_B)

    def embedded(
        self, net: Transformer, tokens_BS: jax.Array, start_B: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(embeddings, cos and sin) of tokens at start_B and after."""
        positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
        return net.embed_tokens(tokens_BS, self.dtype), rope_tables(self.model, positions_BS)

    def _prefill(self, group: weights.Group):
        """(leaves, x, rope, length_B, slots) -> (x, caches)."""
        key = ("prefill", group.graphdef, group.treedef)
        if key not in self.programs:

            @functools.partial(jit, static_argnames="slots")
            def run(leaves, x_BSD, rope, length_B, slots):
                made = []
                segments_BS = (jnp.arange(x_BSD.shape[1]) < length_B[:, None]).astype(jnp.int32)
                for of_layer in leaves:
                    x_BSD, _ = group.layer(of_layer)[0](
                        x_BSD, rope, segments_BS, attention.prefill(slots, made)
                    )
                return x_BSD, made

            self.programs[key] = run
        return self.programs[key]

    def _decode(self, group: weights.Group):
        """(leaves, caches, x, rope, start_B, active_B) -> (x, caches); takes the caches' memory."""
        key = ("decode", group.graphdef, group.treedef)
        if key not in self.programs:

            @functools.partial(jit, donate_argnums=1)
            def run(leaves, caches, x_BSD, rope, start_B, active_B):
                made = []
                segments_BS = jnp.broadcast_to(active_B[:, None], x_BSD.shape[:2]).astype(jnp.int32)
                for of_layer, held in zip(leaves, caches, strict=True):
                    layer, absorbed = group.layer(of_layer)
                    x_BSD, _ = layer(
                        x_BSD, rope, segments_BS, attention.cached(held, absorbed, start_B, made)
                    )
                return x_BSD, made

            self.programs[key] = run
        return self.programs[key]

    def logits_of(self, net: Transformer, hidden_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, V] of normed states, divided in B alone; -inf where no token is."""
        logits_BSV = jax.sharding.reshard(net.logits(hidden_BSD), P(BATCH_AXES, None, None))
        return jnp.where(jnp.arange(logits_BSV.shape[-1]) < self.vocab, logits_BSV, -jnp.inf)

    def _leave_(
        self, leaves, x_BSD, step, drafts_BS, last_B, drawing, stop_ids, limit_B, top_k, greedy
    ):
        """What a step gives its rows: (the next Step, tokens [B, S], how many of them count [B]).

        Args:
          x_BSD: states before the last norm; at `last_B` alone if it is given.
          drafts_BS: the tokens that x read after the newest, none or some: they count as far as each is what its place gives.
        """
        net = self.ends(leaves)
        if last_B is not None:
            x_BSD = cache.pick(x_BSD, last_B)
        place_S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
        position_BS = step.position_B[:, None] + 1 + place_S
        token_BS = sampling.choose(
            self.logits_of(net, net.norm(x_BSD)), position_BS, drawing, top_k, greedy
        )
        goes_on_BS = (position_BS < limit_B[:, None]) & jnp.all(
            token_BS[..., None] != stop_ids, axis=-1
        )
        right_BS = goes_on_BS[:, :-1] & (drafts_BS == token_BS[:, :-1])
        accepted_B = jnp.sum(jnp.cumprod(right_BS.astype(jnp.int32), axis=1), axis=1)
        at = lambda a_BS: cache.pick(a_BS, accepted_B)[:, 0]
        following = Step(
            at(token_BS),
            jnp.where(step.active_B, at(position_BS), step.position_B),
            step.active_B & at(goes_on_BS),
        )
        return following, token_BS, jnp.where(step.active_B, accepted_B + 1, 0)

    # ---------------------------------------------------------------------------------------------------------------- calls

    def prefill(
        self, tokens_BS: np.ndarray, length_B: np.ndarray, slots: int
    ) -> tuple[jax.Array, list[list[cache.Layer]]]:
        """(hidden states [B, S, D] before the last norm, caches of all groups)."""
        x, rope = self._enter(
            self.weights.ends[2], self.put(tokens_BS), self.put(np.zeros(len(tokens_BS), np.int32))
        )
        caches, length_B = [], self.put(length_B)
        for group in self.weights.groups:
            x, made = self._prefill(group)(group.leaves, x, rope, length_B, slots=slots)
            caches.append(made)
        return x, caches

    def advance(
        self, tokens_BS: jax.Array, start_B: jax.Array, active_B: jax.Array, caches: list
    ) -> tuple[jax.Array, list]:
        """Hidden states [B, S, D] of S tokens a row at start_B and after, and the caches with them."""
        x, rope = self._enter(self.weights.ends[2], tokens_BS, start_B)
        out = []
        for group, held in zip(self.weights.groups, caches, strict=True):
            x, made = self._decode(group)(group.leaves, held, x, rope, start_B, active_B)
            out.append(made)
        return x, out

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        options: Sampling = Sampling(),
        stop_ids: Iterable[int] = (),
        indexes: Sequence[int] | None = None,
        stopped: Set[int] = frozenset(),
        draft_tokens: int = 0,
    ) -> Iterator[Token]:
        """Tokens of the answers as they come; an answer's last is its stop token, if it came to one.

        Args:
          prompts: token ids, at least one each. max_tokens: of each answer; all end at max_position_embeddings.
          indexes: numbers of the prompts, which draws depend on; None: 0, 1, ...
          stopped: numbers of prompts whose answers need not go on; looked at after every step.
          draft_tokens: tokens that multi-token prediction drafts a step; the answers stay the same.
        """
        rows = self.ways * cache.bucket(-(-len(prompts) // self.ways), 1)
        lengths = np.asarray([len(p) for p in prompts] + [1] * (rows - len(prompts)), np.int32)
        longest = max(self.model.max_position_embeddings, int(lengths.max()))
        tokens = np.zeros((rows, min(cache.bucket(int(lengths.max()), 16), longest)), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        limit = np.minimum(lengths + max_tokens, longest).astype(np.int32) - 1
        slots = cache.slots_for(int(limit.max()) + 1 + draft_tokens, longest)
        layers = self.model.num_hidden_layers + min(draft_tokens, len(self.weights.mtp))
        self._say(f"cache: {cache.describe(self.model, layers, rows, slots, self.dtype.itemsize)}")
        index = np.zeros(rows, np.int32)
        index[: len(prompts)] = range(len(prompts)) if indexes is None else indexes
        with jax.set_mesh(self.mesh):
            drawing = sampling.drawing(options, self.put(index))
            how = dict(drawing=drawing, top_k=options.top_k, greedy=options.temperature == 0)
            ends = dict(
                how,
                stop_ids=jnp.asarray(sorted(stop_ids) or [-1], jnp.int32),
                limit_B=self.put(limit),
            )
            drafter = Drafter(self, draft_tokens, how) if draft_tokens else None
            none = self.put(np.zeros((rows, 0), np.int32))
            active = np.arange(rows) < len(prompts)
            x, caches = self.prefill(tokens, lengths, slots)
            step = Step(self.put(tokens[:, 0]), self.put(lengths - 1), self.put(active))
            last_B = step.position_B
            step, token_BS, count_B = self._leave(
                self.weights.ends[2], x, step, none, last_B, **ends
            )
            drafts = drafter.begin(x, tokens, last_B, step, slots) if drafter else none
            first = True
            while True:
                ahead = (
                    jnp.concatenate([step.tokens_B[:, None], drafts], axis=1)
                    if drafter
                    else step.tokens_B[:, None]
                )
                start_B = step.position_B
                x, caches = self.advance(ahead, start_B, step.active_B, caches)
                following, next_BS, next_B = self._leave(
                    self.weights.ends[2], x, step, drafts, None, **ends
                )
                if drafter:
                    drafts = drafter.go_on(x, next_BS, start_B, next_B, following)
                # The host reads a step while the device works on the next.
                found, count = np.asarray(token_BS), np.asarray(count_B)
                if drafter and not first:
                    self.drafted += draft_tokens * int(np.sum(count > 0))
                    self.accepted += int(np.sum(np.maximum(count, 1) - 1))
                for row in np.flatnonzero(count):
                    for id in found[row, : count[row]]:
                        yield Token(int(index[row]), int(id))
                on = np.asarray(step.active_B)
                if not on.any():
                    return
                over = np.asarray([a and int(i) in stopped for a, i in zip(active, index)])
                if over.any():
                    active &= ~over
                    following = following._replace(active_B=following.active_B & self.put(active))
                    if not active.any():
                        return
                step, token_BS, count_B, first = following, next_BS, next_B, False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        options: Sampling = Sampling(),
        stop_ids: Iterable[int] = (),
        draft_tokens: int = 0,
    ) -> list[list[int]]:
        """The answers, without their stop tokens."""
        out: list[list[int]] = [[] for _ in prompts]
        ends = frozenset(stop_ids)
        for token in self.batch(prompts, max_tokens, options, ends, draft_tokens=draft_tokens):
            if token.id not in ends:
                out[token.index].append(token.id)
        return out

    @property
    def acceptance(self) -> str:
        """How good drafts were so far."""
        share = self.accepted / max(self.drafted, 1)
        return f"drafts: {self.accepted} of {self.drafted} accepted ({share:.1%})"

    def put(self, a: np.ndarray) -> jax.Array:
        """Rows over the mesh."""
        return jax.device_put(np.asarray(a), jax.NamedSharding(self.mesh, ROWS))

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._note(line)
