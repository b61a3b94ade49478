"""Packing of examples: which example, or piece of one, goes into which row.

The rows are those of trl.pack_dataset (TRL 1.16): examples are packed 1,000 at a time, in the order in which
they come, so that a row never mixes examples of two such windows. What differs from TRL is what a model makes
of a row, and lies in `ExampleRows`: every example is a segment of its own with positions from 0, also in
`wrapped`, where TRL lets attention cross from one into the next; and where an example goes on in another row,
its next token is still predicted, which TRL leaves out.
"""

import bisect
import collections
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data.example_files import ExampleSet
from deepseek_jax.data.fields import TEXT, Rows, padding_row

WINDOW = 1_000  # examples that are packed together; datasets.map hands TRL as many at a time
WHOLE = ("bfd", "none")  # strategies that put an example into one row, cut off where that ends


class Packed(NamedTuple):
    """Row r is pieces starts[r] to starts[r + 1] - 1, in this order. All int64."""

    starts: np.ndarray  # [rows + 1]
    example: np.ndarray  # [pieces], the number of the example
    first: np.ndarray  # [pieces], tokens of the example before the piece
    lengths: np.ndarray  # [pieces], tokens of the piece


def kept_tokens(lengths: np.ndarray, row_length: int, strategy: str) -> np.ndarray:
    """How many tokens of examples of these lengths the rows hold, int64 [examples]."""
    return np.minimum(lengths, row_length) if strategy in WHOLE else lengths


def pack(lengths: np.ndarray, row_length: int, strategy: str) -> Packed:
    """Packs examples of these lengths into rows of at most `row_length` tokens: a pure function.

    Args:
      lengths: int64 [examples], in tokens. An example without tokens is in no row.
      strategy: "bfd", best fit decreasing: the longest example first, each into the row with the least room
        that it fits in, the oldest of several; what does not fit in a row by itself is cut off. "bfd_split":
        so too, after examples longer than a row are split. "wrapped": one after the other, cut where a row
        ends. "none": an example a row, cut off.
    """
    packer = PACKERS[strategy]
    counts, examples, firsts, sizes = [np.zeros(1, np.int64)], [], [], []
    for start in range(0, len(lengths), WINDOW):
        window = np.asarray(lengths[start : start + WINDOW], np.int64)
        there = np.flatnonzero(window)
        if not len(there):
            continue
        count, example, first, size = packer(window[there], row_length)
        counts.append(count)
        examples.append(there[example] + start)
        firsts.append(first)
        sizes.append(size)
    example, first, size = (
        np.concatenate(parts) if parts else np.zeros(0, np.int64)
        for parts in (examples, firsts, sizes)
    )
    return Packed(np.cumsum(np.concatenate(counts)), example, first, size)


# Pieces of the examples of one window: pieces of each row [rows], then of each piece, row after row, its
# example, the tokens before it and its tokens.
Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _bfd(lengths: np.ndarray, row_length: int) -> Pieces:
    sizes = np.minimum(lengths, row_length)
    counts, order = best_fit_decreasing(sizes, row_length)
    return counts, order, np.zeros_like(order), sizes[order]


def _bfd_split(lengths: np.ndarray, row_length: int) -> Pieces:
    parts = -(-lengths // row_length)
    example = np.repeat(np.arange(len(lengths)), parts)
    first = (np.arange(len(example)) - np.repeat(np.cumsum(parts) - parts, parts)) * row_length
    sizes = np.minimum(lengths[example] - first, row_length)
    counts, order = best_fit_decreasing(sizes, row_length)
    return counts, example[order], first[order], sizes[order]


def _wrapped(lengths: np.ndarray, row_length: int) -> Pieces:
    ends = np.cumsum(lengths)
    cuts = np.union1d(ends, np.arange(row_length, ends[-1], row_length))
    begins = np.concatenate([[0], cuts[:-1]])
    example = np.searchsorted(ends, begins, "right")
    counts = np.bincount(begins // row_length)
    return counts, example, begins - (ends - lengths)[example], cuts - begins


def _none(lengths: np.ndarray, row_length: int) -> Pieces:
    zeros = np.zeros_like(lengths)
    return zeros + 1, np.arange(len(lengths)), zeros, np.minimum(lengths, row_length)


PACKERS: dict[str, Callable[[np.ndarray, int], Pieces]] = {
    "bfd": _bfd,
    "bfd_split": _bfd_split,
    "wrapped": _wrapped,
    "none": _none,
}


def best_fit_decreasing(sizes: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing (Ding et al., arXiv:2404.10830) of pieces with 1 to row_length tokens.

    Returns:
      Pieces of each row, int64 [rows], and the pieces row after row, int64 [pieces].
    """
    order = np.argsort(-sizes, kind="stable")
    rooms: list[
        int
    ] = []  # room that is left in some row, ascending, each once: C's bisect finds the least
    waiting: dict[int, collections.deque[list[int]]] = collections.defaultdict(collections.deque)
    rows: list[list[int]] = []
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = waiting[room].popleft()
            row.append(piece)
            if not waiting[room]:
                del rooms[at]
        else:
            room = row_length
            row = [piece]
            rows.append(row)
        if left := room - size:
            if not waiting[left]:
                bisect.insort(rooms, left)
            waiting[left].append(row)
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return counts, np.fromiter((p for row in rows for p in row), np.int64, len(order))


class Piece(NamedTuple):
    """Some tokens of an example, in a row."""

    example: int  # its number in the set
    first: int  # tokens of the example before the piece
    tokens: int


class ExampleRows:
    """Rows of `row_length` tokens over some examples, by index, each made when it is asked for.

    Args:
      examples: the set that they are of.
      numbers: int64 [n], the examples to pack, in the order in which they are packed.
      kept: int64 [n], how many tokens of each are trained on, from its first; those that no row holds, as
        in `bfd`, need not be left out.
      strategy: as `pack`.
    """

    def __init__(
        self,
        examples: ExampleSet,
        numbers: np.ndarray,
        kept: np.ndarray,
        row_length: int,
        strategy: str,
    ):
        self._kept = kept_tokens(kept, row_length, strategy)
        self._packed = pack(self._kept, row_length, strategy)
        self._tokens = examples.tokens
        self._scored = examples.scored
        self._starts = examples.offsets[numbers]
        self._numbers = numbers
        self._length = row_length

    def __len__(self) -> int:
        return len(self._packed.starts) - 1

    def __getitem__(self, index: int) -> Rows:
        return self.row(index)

    @property
    def tokens(self) -> int:
        """Tokens in all rows; the other positions are padding."""
        return int(self._packed.lengths.sum())

    def pieces(self, index: int) -> list[Piece]:
        """What a row is made of, in order.

        Raises:
          IndexError: there is no such row.
        """
        some = self._slice(index)
        numbers = self._numbers[self._packed.example[some]]
        first, lengths = self._packed.first[some], self._packed.lengths[some]
        return [
            Piece(*p) for p in zip(numbers.tolist(), first.tolist(), lengths.tolist(), strict=True)
        ]

    def row(self, index: int) -> Rows:
        """One row.

        Every piece is a segment, 1, 2, ..., with positions from 0. A position predicts the token that
        follows in its example, in this row or the next: its target is -100 where that token is not scored.
        At the end of an example, or where it is cut off, the target is -100 and the next token -1.

        Returns:
          The fields of data/fields.py TEXT, int32 [row_length] each.

        Raises:
          IndexError: there is no such row.
        """
        some = self._slice(index)
        example, first, lengths = (a[some] for a in self._packed[1:])
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        here = positions + np.repeat(self._starts[example] + first, lengths)
        goes_on = np.ones(len(here), bool)
        goes_on[ends - 1] = first + lengths < self._kept[example]
        after = here + goes_on  # where nothing follows any token does
        follows = self._tokens[after].astype(np.int32)
        out = padding_row(TEXT, self._length)
        n = len(here)
        out["tokens"][:n] = self._tokens[here]
        out["segment_ids"][:n] = np.repeat(np.arange(1, len(ends) + 1), lengths)
        out["positions"][:n] = positions
        out["targets"][:n] = np.where(goes_on & (self._scored[after] != 0), follows, IGNORE)
        out["next_tokens"][:n] = np.where(goes_on, follows, -1)
        return out

    def _slice(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return slice(int(self._packed.starts[index]), int(self._packed.starts[index + 1]))
