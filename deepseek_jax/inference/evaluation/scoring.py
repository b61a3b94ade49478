"""Log-likelihoods of tokens: spans of text, packed into batches of one compiled shape, through the model and the loss in chunks."""

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
from deepseek_jax.parallel.mesh import BATCH_AXES, TOKENS

BATCH_TOKENS = 4096  # a device's share of a batch, unless the user says how many rows there are


class Span(NamedTuple):
    """Tokens that the model reads together."""

    key: Hashable
    tokens: np.ndarray  # int32 [n], what is read
    targets: np.ndarray  # int32 [n], the token after each, IGNORE where it does not count


class Score(NamedTuple):
    key: Hashable
    nll: float  # sum of -log p(target), nats
    count: int  # targets
    greedy: bool  # whether each target is the likeliest token


class Scorer:
    """Scores spans with a model.

    Spans lie beside one another in rows where they fit, as documents do in training: attention and positions stay within a span.

    Args:
      width: tokens of a row, as many as the longest span has. rows: of a batch; None: about BATCH_TOKENS tokens a device.

    Raises:
      UserError: a batch or a row is too small or too large.
    """

    def __init__(self, model: LoadedModel, width: int, rows: int | None = None):
        longest = model.model.max_position_embeddings
        if not 1 <= width <= longest:
            raise UserError(
                f"--window={width} is not between 1 and the model's max_position_embeddings={longest}. Choose one of these."
            )
        if rows is not None and rows < 1:
            raise UserError(f"--batch-size={rows} must be 1 or more.")
        ways = math.prod(model.mesh.shape[a] for a in BATCH_AXES)
        self.width, self.rows = (
            width,
            -(-(rows or ways * max(1, BATCH_TOKENS // width)) // ways) * ways,
        )
        self.vocab_size = model.model.vocab_size
        self._model = model
        if model not in _programs:
            _programs[model] = _program(model.layout)

    def __call__(self, spans: Iterable[Span]) -> Iterator[Score]:
        """The score of each span, not in their order. Memory is that of two batches, however many spans there are.

        Raises:
          ValueError: a span is empty or longer than a row.
        """
        waiting = None
        for placed in self._batches(spans):
            started = (
                placed,
                self._start(placed),
            )  # while it computes, the one before is read, and the next one is made
            if waiting:
                yield from self._read(*waiting)
            waiting = started
        if waiting:
            yield from self._read(*waiting)

    def _batches(self, spans: Iterable[Span]) -> Iterator[list[tuple[int, int, Span]]]:
        """Lists of (row, first position, span); a span goes into the fullest row that has room for it."""
        placed: list[tuple[int, int, Span]] = []
        used = np.zeros(self.rows, np.int64)
        for span in spans:
            size = len(span.tokens)
            if not 0 < size <= self.width:
                raise ValueError(f"a span of {size} tokens does not fit rows of {self.width}")
            if used.min() + size > self.width:
                yield placed
                placed, used = [], np.zeros(self.rows, np.int64)
            row = int(np.argmax(np.where(used + size <= self.width, used, -1)))
            placed.append((row, int(used[row]), span))
            used[row] += size
        if placed:
            yield placed

    def _start(self, placed: list[tuple[int, int, Span]]) -> tuple[jax.Array, jax.Array]:
        batch = np.zeros((4, self.rows, self.width), np.int32)
        batch[1] = IGNORE
        segments = np.zeros(self.rows, np.int32)
        for row, first, span in placed:
            segments[row] += 1
            n = len(span.tokens)
            batch[:, row, first : first + n] = (
                span.tokens,
                span.targets,
                np.full(n, segments[row]),
                np.arange(n),
            )
        model = self._model
        with jax.set_mesh(model.mesh):
            return _programs[model](
                model.params, model.bias, tuple(jax.device_put(a, TOKENS) for a in batch)
            )

    def _read(
        self, placed: list[tuple[int, int, Span]], results: tuple[jax.Array, jax.Array]
    ) -> Iterator[Score]:
        nll_BS, likeliest_BS = np.asarray(results[0], np.float64), np.asarray(results[1])
        for row, first, span in placed:
            here, counted = slice(first, first + len(span.tokens)), span.targets != IGNORE
            yield Score(
                span.key,
                float(nll_BS[row, here].sum()),
                int(counted.sum()),
                bool(likeliest_BS[row, here][counted].all()),
            )


_programs: "weakref.WeakKeyDictionary[LoadedModel, Callable]" = (
    weakref.WeakKeyDictionary()
)  # a shape is compiled once a model


def _program(model: PlacedModel) -> Callable:
    def scores(params, bias, batch):
        tokens_BS, targets_BS, segment_ids_BS, positions_BS = batch
        net = model.merge_for_inference(params, bias)
        hidden_BSD = net(tokens_BS, segment_ids_BS, positions_BS).hidden_BSD
        return scan_vocab(cross_entropy_and_rank, hidden_BSD, net.head, targets_BS)

    return jax.jit(scores)


def windows(
    key: Hashable, pieces: Iterable[np.ndarray], window: int, stride: int
) -> Iterator[Span]:
    """A document of any length as spans that predict each of its tokens but the first once.

    Of a window of W tokens the first predicts W; each one after it starts S further on and predicts the S that come next, so each of
    these tokens has W - S or more before it. Holds W + 1 tokens and a piece.

    Args:
      pieces: the document's tokens in order. window, stride: W and S, 1 <= S <= W.
    """
    held = np.zeros(0, np.int32)  # the document from the next window's begin on
    done = 0  # of these, how many are predicted or begin the document
    for piece in pieces:
        held = np.concatenate([held, piece]) if len(held) else np.asarray(piece, np.int32)
        done = done or min(1, len(held))
        while len(held) > window:
            yield _span(key, held[: window + 1], done)
            held, done = held[stride:], window + 1 - stride
    if len(held) > done:
        yield _span(key, held, done)


def _span(key: Hashable, ids: np.ndarray, done: int) -> Span:
    targets = ids[1:].astype(np.int32)
    targets[: done - 1] = IGNORE
    return Span(key, ids[:-1], targets)
