"""Packing by virtual concatenation: documents in a random order, seen as one stream that is cut into rows.

The stream is never built: a row looks up which documents it touches (binary search over their cumulative
lengths) and reads those ranges only.
"""

import numpy as np

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data.fields import TEXT, Rows, padding_row
from deepseek_jax.data.order import permutation
from deepseek_jax.data.sources import Documents


class PackedRows:
    """Rows of `sequence_length` tokens over some documents, by index.

    Row i reads stream positions i * S to i * S + S, one more than it has inputs: the last is the last input's
    target.

    Args:
      documents: what to pack; their order in the stream is a pure function of their number and `seed`.
      sequence_length: S.
      document_mask: documents are segments of their own: positions restart and no target crosses; else a row
        is one segment.
      pad_last: keep the last partial row, padded, so that every token is predicted once; else it is dropped.
    """

    fields = TEXT  # what `row` has

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        seed: int,
        document_mask: bool,
        pad_last: bool = False,
    ):
        order = permutation(len(documents.starts), seed)
        self._tokens = documents.tokens
        self._length = sequence_length
        self._mask = document_mask
        self._starts = documents.starts[order]
        self._ends = np.cumsum(documents.lengths[order])  # of the documents, in the stream
        self._size = int(self._ends[-1]) if len(order) else 0
        predicted = max(self._size - 1, 0)  # every token but the stream's first
        self._rows = -(-predicted // sequence_length) if pad_last else predicted // sequence_length

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Rows:
        return self.row(index)

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """Where the inputs of a row come from: (first token in the corpus, tokens, tokens of the document
        before them), by document.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        at, stop, out = (
            int(index) * self._length,
            min((int(index) + 1) * self._length, self._size),
            [],
        )
        while at < stop:
            d = int(np.searchsorted(self._ends, at, "right"))
            into = at - (int(self._ends[d - 1]) if d else 0)
            count = min(int(self._ends[d]), stop) - at
            out.append((int(self._starts[d]) + into, count, into))
            at += count
        return out

    def row(self, index: int) -> Rows:
        """One row.

        Returns:
          The fields of data/fields.py TEXT, int32 [S] each. The next token is -1, and the target -100, where
          it belongs to another document.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        s = self._length
        start = int(index) * s
        stop = min(start + s + 1, self._size)
        first, last = (int(d) for d in np.searchsorted(self._ends, [start, stop - 1], "right"))
        # Where the documents begin and end in this row's window of the stream.
        ends = np.minimum(self._ends[first : last + 1], stop) - start
        begins = np.concatenate([[0], ends[:-1]])
        into = start - (
            int(self._ends[first - 1]) if first else 0
        )  # tokens of the first document before this row
        window = np.empty(stop - start, np.int32)
        for d, begin, end in zip(
            range(first, last + 1), begins.tolist(), ends.tolist(), strict=True
        ):
            source = int(self._starts[d]) + (into if d == first else 0)
            window[begin:end] = self._tokens[source : source + end - begin]
        positions = np.arange(len(window), dtype=np.int32)
        segments = np.ones(len(window), np.int32)
        if self._mask:
            segments = np.repeat(np.arange(1, len(ends) + 1, dtype=np.int32), ends - begins)
            positions -= np.repeat(begins, ends - begins).astype(np.int32)
        out = padding_row(TEXT, s)
        n = min(s, len(window))
        out["tokens"][:n] = window[:n]
        out["segment_ids"][:n] = segments[:n]
        out["positions"][:n] = positions[:n]
        same = segments[1:] == segments[:-1]
        for name, missing in (("targets", IGNORE), ("next_tokens", -1)):
            out[name][: len(window) - 1] = np.where(same, window[1:], missing)
        return out
