"""Log-likelihoods of tokens: spans of text, packed into batches of one compiled shape.

Shape suffixes: B packed sequences of a batch, S positions of each.
"""

import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.config.options import IGNORE
from deepseek_jax.errors import UserError
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.model.head import scan_vocab
from deepseek_jax.model.layout import PlacedModel
from deepseek_jax.model.logit_functions import cross_entropy_and_rank
from deepseek_jax.parallel.mesh import BATCH_AXES

BATCH_TOKENS = 4096  # of a batch per device, unless the user says how many sequences there are


class TokenSpan(NamedTuple):
    """Tokens that the model reads together."""

    key: Hashable
    tokens: np.ndarray  # int32 [n], what is read
    targets: np.ndarray  # int32 [n], the token after each, IGNORE where it does not count


class Score(NamedTuple):
    """What became of a span."""

    key: Hashable
    nll: float  # sum of -log p(target), nats
    targets: int
    greedy: bool  # whether each target is the likeliest token


class _Placed(NamedTuple):
    """A span in a batch."""

    sequence: int
    first: int  # position in the sequence
    span: TokenSpan


class Scorer:
    """Scores spans with a model.

    Spans are packed like training documents; segment ids keep attention inside each, and positions begin
    anew.
    """

    def __init__(self, model: LoadedModel, width: int, sequences: int | None = None):
        """Args:
          model: that scores.
          width: tokens of a packed sequence, as many as the longest span has.
          sequences: of a batch; None: about BATCH_TOKENS tokens per device.

        Raises:
          UserError: a batch or a sequence is too small or too large.
        """
        longest = model.config.max_position_embeddings
        if not 1 <= width <= longest:
            raise UserError(
                f"--window={width} is not between 1 and the model's max_position_embeddings={longest}. "
                f"Choose one of these."
            )
        if sequences is not None and sequences < 1:
            raise UserError(f"--batch-size={sequences} must be 1 or more.")
        shards = math.prod(model.mesh.shape[axis] for axis in BATCH_AXES)
        wanted = sequences or shards * max(1, BATCH_TOKENS // width)
        self.width = width
        self.sequences = -(-wanted // shards) * shards
        self.vocab_size = model.config.vocab_size
        self._model = model
        if model not in _programs:
            _programs[model] = _program(model.layout)

    def __call__(self, spans: Iterable[TokenSpan]) -> Iterator[Score]:
        """The score of each span, not in their order.

        Memory is that of two batches, however many spans there are.

        Raises:
          ValueError: a span is empty or longer than a sequence.
        """
        waiting = None
        for placed in self._batches(spans):
            # While this batch computes, the one before is read and the next one is made.
            started = self._start(placed)
            if waiting:
                yield from self._read(*waiting)
            waiting = placed, started
        if waiting:
            yield from self._read(*waiting)

    def _batches(self, spans: Iterable[TokenSpan]) -> Iterator[list[_Placed]]:
        """A span goes into the fullest sequence that has room for it."""
        placed: list[_Placed] = []
        used_B = np.zeros(self.sequences, np.int64)
        for span in spans:
            size = len(span.tokens)
            if not 0 < size <= self.width:
                raise ValueError(f"a span of {size} tokens does not fit sequences of {self.width}")
            if used_B.min() + size > self.width:
                yield placed
                placed, used_B = [], np.zeros(self.sequences, np.int64)
            sequence = int(np.argmax(np.where(used_B + size <= self.width, used_B, -1)))
            placed.append(_Placed(sequence, int(used_B[sequence]), span))
            used_B[sequence] += size
        if placed:
            yield placed

    def _start(self, placed: list[_Placed]) -> tuple[jax.Array, jax.Array]:
        shape = (self.sequences, self.width)
        tokens_BS, segment_ids_BS, positions_BS = (np.zeros(shape, np.int32) for _ in range(3))
        targets_BS = np.full(shape, IGNORE, np.int32)
        segments_B = np.zeros(self.sequences, np.int32)
        for sequence, first, span in placed:
            segments_B[sequence] += 1
            n = len(span.tokens)
            here = sequence, slice(first, first + n)
            tokens_BS[here] = span.tokens
            targets_BS[here] = span.targets
            segment_ids_BS[here] = segments_B[sequence]
            positions_BS[here] = np.arange(n)
        batch = tokens_BS, targets_BS, segment_ids_BS, positions_BS
        model = self._model
        with jax.set_mesh(model.mesh):
            on_mesh = tuple(jax.device_put(a, jax.P(BATCH_AXES)) for a in batch)
            return _programs[model](model.params, model.bias, on_mesh)

    def _read(self, placed: list[_Placed], results: tuple[jax.Array, jax.Array]) -> Iterator[Score]:
        nll_BS, likeliest_BS = np.asarray(results[0], np.float64), np.asarray(results[1])
        for sequence, first, span in placed:
            here = sequence, slice(first, first + len(span.tokens))
            counted = span.targets != IGNORE
            nll = float(nll_BS[here].sum())
            greedy = bool(likeliest_BS[here][counted].all())
            yield Score(span.key, nll, int(counted.sum()), greedy)


# A shape is compiled once for each model.
_programs: "weakref.WeakKeyDictionary[LoadedModel, Callable]" = weakref.WeakKeyDictionary()


def _program(model: PlacedModel) -> Callable:
    def scores(params, bias, batch):
        tokens_BS, targets_BS, segment_ids_BS, positions_BS = batch
        net = model.merge_for_inference(params, bias)
        hidden_BSD = net(tokens_BS, segment_ids_BS, positions_BS).hidden_BSD
        return scan_vocab(cross_entropy_and_rank, hidden_BSD, net.head, targets_BS)

    return jax.jit(scores)


def windows(
    key: Hashable, pieces: Iterable[np.ndarray], window: int, stride: int
) -> Iterator[TokenSpan]:
    """A document of any length as spans that predict each of its tokens but the first once.

    The first window of W tokens predicts W; each one after it starts S further on and predicts the S that
    come next, so each of these tokens has W - S or more before it. Holds W + 1 tokens and a piece.

    Args:
      key: of the spans.
      pieces: the document's tokens in order.
      window: W, tokens that the model reads at once.
      stride: S, tokens from one window to the next, 1 <= S <= W.
    """
    held = np.zeros(0, np.int32)  # the document from the start of the next window on
    done = 0  # of these, how many are predicted or begin the document
    for piece in pieces:
        held = np.concatenate([held, piece]) if len(held) else np.asarray(piece, np.int32)
        done = done or min(1, len(held))
        while len(held) > window:
            yield _span(key, held[: window + 1], done)
            held, done = held[stride:], window + 1 - stride
    if len(held) > done:
        yield _span(key, held, done)


def _span(key: Hashable, ids: np.ndarray, done: int) -> TokenSpan:
    targets = ids[1:].astype(np.int32)
    targets[: done - 1] = IGNORE
    return TokenSpan(key, ids[:-1], targets)
