"""Prefill and decoding of a batch of prompts: which programs run, in which order.

A step is a few calls: the embedding, every group of layers (layer_weights.py), the head with the
choice of tokens. Tokens stay on the device from step to step; the host reads them one step late,
while the next step runs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import cache_sizes, sampling
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.layer_weights import unstack
from deepseek_jax.inference.generation.programs import AnswerState, Programs, Rules
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.generation.speculative import Drafter
from deepseek_jax.model.attention.interface import LayerCache
from deepseek_jax.parallel.mesh import BATCH_AXES

Caches = list[list[LayerCache]]  # of each group, of each layer
GREEDY = Sampling()


class Token(NamedTuple):
    """One token of one prompt's answer."""

    number: int  # of the prompt
    id: int


class _Batch(NamedTuple):
    """Prompts as arrays: padded to a width, and to a number of sequences that the mesh divides."""

    tokens_BS: np.ndarray  # int32
    length_B: np.ndarray  # int32
    index_B: np.ndarray  # int32: numbers of the prompts
    real_B: np.ndarray  # bool: False for sequences that are there for the mesh alone
    limit_B: np.ndarray  # int32: the last position that each answer may have
    slots: int  # of the caches


class Engine:
    """A model ready to generate.

    Args:
      bound: the model.
      give: its weights are not needed afterwards, and may be freed.
      vocab: ids from here on are never chosen (rows of the embedding that the tokenizer does not
        use); None: all may be.
      note: what to do with the line that tells the size of a cache.
      programs: of an engine of the same model, with other weights; None: compiled anew.

    Attributes:
      config: the model's options.
      drafted, accepted: draft tokens of all answers so far.

    Raises:
      UserError: the mesh has an axis that generation does not use.
    """

    def __init__(
        self,
        bound: BoundModel,
        give: bool = False,
        vocab: int | None = None,
        note: Callable[[str], None] = lambda line: None,
        programs: Programs | None = None,
    ):
        mesh = bound.mesh
        if wrong := [a for a in ("stage", "context") if mesh.shape[a] > 1]:
            raise UserError(
                f"the mesh has {mesh.shape[wrong[0]]} devices along {wrong[0]}, and generation uses "
                f"data, fsdp, expert and tensor. "
                f"Set --mesh to, for instance, fsdp=2,expert=4."
            )
        self.mesh = mesh
        self._note = note
        with jax.set_mesh(mesh):
            net = bound.net()
            self.config = net.config
            self.dtype = net.dtype
            self.weights = unstack(net, mesh, give)
        vocab = min(vocab or self.config.vocab_size, self.config.vocab_size)
        self.programs = programs or Programs(self.weights, self.config, self.dtype, vocab)
        self.drafted = 0
        self.accepted = 0
        self._noted: set[str] = set()

    def prefill(
        self, tokens_BS: np.ndarray, length_B: np.ndarray, slots: int
    ) -> tuple[jax.Array, Caches]:
        """Prompts through the model.

        Args:
          tokens_BS: int32, the prompts, padded.
          length_B: int32, their lengths.
          slots: of the caches.

        Returns:
          Hidden states [B, S, D] before the last norm, and the caches.
        """
        chex.assert_rank([tokens_BS, length_B], [2, 1])
        start_B = self.put(np.zeros(len(tokens_BS), np.int32))
        x, rope = self.programs.embed(self.weights.ends.leaves, self.put(tokens_BS), start_B)
        caches = []
        length_B = self.put(length_B)
        for group in self.weights.groups:
            x, made = self.programs.prefill(group)(group.leaves, x, rope, length_B, slots=slots)
            caches.append(made)
        return x, caches

    def advance(
        self, tokens_BS: jax.Array, start_B: jax.Array, active_B: jax.Array, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """New tokens through the model, at positions start_B and after.

        It uses the memory of the caches, which must not be read afterwards.

        Returns:
          Hidden states [B, S, D] before the last norm, and the caches with the new tokens.
        """
        chex.assert_rank([tokens_BS, start_B, active_B], [2, 1, 1])
        x, rope = self.programs.embed(self.weights.ends.leaves, tokens_BS, start_B)
        out = []
        for group, held in zip(self.weights.groups, caches, strict=True):
            x, made = self.programs.decode(group)(group.leaves, held, x, rope, start_B, active_B)
            out.append(made)
        return x, out

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        options: Sampling = GREEDY,
        stop_ids: Iterable[int] = (),
        indexes: Sequence[int] | None = None,
        stopped: Set[int] = frozenset(),
        draft_tokens: int = 0,
    ) -> Iterator[Token]:
        """Tokens of the answers as they come; an answer's last is its stop token, if it came to one.

        Args:
          prompts: token ids, at least one each.
          max_tokens: of each answer; all end at max_position_embeddings.
          options: how tokens are chosen.
          stop_ids: an answer ends with any of these.
          indexes: numbers of the prompts, which draws depend on; None: 0, 1, ...
          stopped: numbers of prompts whose answers need not go on; looked at after every step.
          draft_tokens: tokens that multi-token prediction drafts per step; the answers stay the same.
        """
        b = self._padded(prompts, indexes, max_tokens, draft_tokens)
        layers = self.config.num_hidden_layers + min(draft_tokens, len(self.weights.mtp))
        sequences, itemsize = len(b.length_B), self.dtype.itemsize
        size = cache_sizes.describe(self.config, layers, sequences, b.slots, itemsize)
        self._note_once(f"cache: {size}")
        with jax.set_mesh(self.mesh):
            rules = Rules(
                drawing=sampling.drawing(options, self.put(b.index_B)),
                stop_ids=jnp.asarray(sorted(stop_ids) or [-1], jnp.int32),
                limit_B=self.put(b.limit_B),
            )
            yield from self._answer(b, rules, stopped, draft_tokens)

    def _padded(
        self,
        prompts: Sequence[Sequence[int]],
        indexes: Sequence[int] | None,
        max_tokens: int,
        draft_tokens: int,
    ) -> _Batch:
        """The prompts in one of few sizes, each of which is compiled for once."""
        ways = math.prod(self.mesh.shape[a] for a in BATCH_AXES)
        sequences = ways * cache_sizes.bucket(-(-len(prompts) // ways), 1)
        lengths = [len(p) for p in prompts] + [1] * (sequences - len(prompts))
        length_B = np.asarray(lengths, np.int32)
        longest = max(self.config.max_position_embeddings, max(lengths))
        width = min(cache_sizes.bucket(max(lengths), 16), longest)
        tokens_BS = np.zeros((sequences, width), np.int32)
        for row, prompt in zip(tokens_BS, prompts, strict=False):
            row[: len(prompt)] = prompt
        index_B = np.zeros(sequences, np.int32)
        index_B[: len(prompts)] = range(len(prompts)) if indexes is None else indexes
        limit_B = np.minimum(length_B + max_tokens, longest).astype(np.int32) - 1
        slots = cache_sizes.slots_for(int(limit_B.max()) + 1 + draft_tokens, longest)
        real_B = np.arange(sequences) < len(prompts)
        return _Batch(tokens_BS, length_B, index_B, real_B, limit_B, slots)

    def _answer(
        self, b: _Batch, rules: Rules, stopped: Set[int], draft_tokens: int
    ) -> Iterator[Token]:
        """The steps of a batch. While the device works on one, the host reads the tokens of the last."""
        ends = self.weights.ends.leaves
        no_drafts = self.put(np.zeros((len(b.length_B), 0), np.int32))
        active_B = b.real_B.copy()
        x, caches = self.prefill(b.tokens_BS, b.length_B, b.slots)
        last_B = self.put(b.length_B - 1)
        state = AnswerState(self.put(b.tokens_BS[:, 0]), last_B, self.put(active_B))
        state, token_BS, count_B = self.programs.choose(ends, x, state, no_drafts, last_B, rules)
        drafter, drafts = None, no_drafts
        if draft_tokens:
            drafter = Drafter(self.weights, self.programs, draft_tokens, rules.drawing, b.slots)
            drafts = drafter.begin(x, self.put(b.tokens_BS), last_B, state)
        is_first = True
        while True:
            start_B = state.position_B
            read_BS = state.tokens_B[:, None]
            if drafter:
                read_BS = jnp.concatenate([read_BS, drafts], axis=1)
            x, caches = self.advance(read_BS, start_B, state.active_B, caches)
            following, next_BS, next_B = self.programs.choose(ends, x, state, drafts, None, rules)
            if drafter:
                drafts = drafter.go_on(x, next_BS, start_B, next_B, following)
            found, count = np.asarray(token_BS), np.asarray(count_B)
            if drafter and not is_first:
                self.drafted += draft_tokens * int(np.sum(count > 0))
                self.accepted += int(np.sum(np.maximum(count, 1) - 1))
            for i in np.flatnonzero(count):
                for id in found[i, : count[i]]:
                    yield Token(int(b.index_B[i]), int(id))
            if not np.asarray(state.active_B).any():
                return
            over_B = active_B & np.isin(b.index_B, list(stopped))
            if over_B.any():
                active_B &= ~over_B
                following = following._replace(active_B=following.active_B & self.put(active_B))
                if not active_B.any():
                    return
            state, token_BS, count_B, is_first = following, next_BS, next_B, False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        options: Sampling = GREEDY,
        stop_ids: Iterable[int] = (),
        draft_tokens: int = 0,
    ) -> list[list[int]]:
        """The answers, without their stop tokens. The arguments are those of `batch`."""
        out: list[list[int]] = [[] for _ in prompts]
        ends = frozenset(stop_ids)
        for token in self.batch(prompts, max_tokens, options, ends, draft_tokens=draft_tokens):
            if token.id not in ends:
                out[token.number].append(token.id)
        return out

    @property
    def acceptance(self) -> str:
        """How good drafts were so far."""
        share = self.accepted / max(self.drafted, 1)
        return f"drafts: {self.accepted} of {self.drafted} accepted ({share:.1%})"

    def put(self, a: np.ndarray) -> jax.Array:
        """An array [B, ...] of the host, over the mesh."""
        return jax.device_put(np.asarray(a), jax.NamedSharding(self.mesh, P(BATCH_AXES)))

    def _note_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self._note(line)
