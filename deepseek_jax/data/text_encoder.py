"""Texts to token ids with the characters that each token stands for."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer


class Placed(NamedTuple):
    """Tokens of a text.

    Attributes:
      ids: int32 [n].
      starts: int32 [n], the first character of each, in Python's counting. It follows the last one of the
        token before: some tokenizers leave the space that a token begins with out of its offsets.
      ends: int32 [n], after the last character. What a tokenizer puts before a text (bos) ends at 0; what it
        puts after it stands for one character beyond its end.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def overlapping(self, regions: Sequence[tuple[int, int]]) -> np.ndarray:
        """bool [n]: whether a token has a character of a region, as transformers' assistant masks count."""
        out = np.zeros(len(self.ids), bool)
        for start, end in regions:
            out |= (self.starts < end) & (self.ends > start)
        return out


class TextEncoder:
    """A tokenizer that tells places.

    Text that spells a special token is that token, as in transformers: templates write them so.

    Attributes:
      prefix: ids that the tokenizer puts before a text by itself: bos, or nothing.
      suffix: and after it.
      added: {text: id} of the tokens that are found in a text before it is split.
    """

    def __init__(self, source: Chat | Tokenizer):
        self._inner: tokenizers.Tokenizer | None = None
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        self.added: dict[str, int] = {}
        if isinstance(source, Chat):
            self._inner = source.tokenizer
        elif isinstance(source, FileTokenizer):
            self._inner = source.with_special_tokens()
        elif not isinstance(source, ByteTokenizer):
            raise TypeError(f"{type(source).__name__} does not tell places")
        if self._inner is not None:
            encoding = self._inner.encode("a", add_special_tokens=True)
            special = encoding.special_tokens_mask
            if 0 in special:
                self.prefix = encoding.ids[: special.index(0)]
                self.suffix = encoding.ids[len(special) - special[::-1].index(0) :]
            added = self._inner.get_added_tokens_decoder()
            self.added = {t.content: i for i, t in added.items()}

    def encode(self, texts: Sequence[str], bounds: bool) -> list[Placed]:
        """The tokens of some texts.

        Args:
          bounds: with prefix and suffix; a text that begins with what the prefix spells has it once.
        """
        texts = [clean_text(t) for t in texts]
        if self._inner is None:
            return [_bytes(t) for t in texts]
        inner = self._inner
        plain = [_placed(e) for e in inner.encode_batch(texts, add_special_tokens=False)]
        if not bounds or not (self.prefix or self.suffix):
            return plain
        return [self._bounded(p, len(t)) for p, t in zip(plain, texts, strict=True)]

    def _bounded(self, placed: Placed, length: int) -> Placed:
        ids = placed.ids.tolist()
        before = [] if ids[: len(self.prefix)] == self.prefix else self.prefix
        after = [] if self.suffix and ids[-len(self.suffix) :] == self.suffix else self.suffix
        zeros, ends = [0] * len(before), [length] * len(after)
        return Placed(
            _joined(before, placed.ids, after),
            _joined(zeros, placed.starts, ends),
            _joined(zeros, placed.ends, [e + 1 for e in ends]),
        )


def _joined(before: list[int], values: np.ndarray, after: list[int]) -> np.ndarray:
    return np.concatenate([np.array(before, np.int32), values, np.array(after, np.int32)])


def _placed(encoding: tokenizers.Encoding) -> Placed:
    ids = np.array(encoding.ids, np.int32)
    flat = itertools.chain.from_iterable(encoding.offsets)
    offsets = np.fromiter(flat, np.int32, 2 * len(ids)).reshape(-1, 2)
    starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
    before = np.concatenate([np.zeros(min(len(ids), 1), np.int32), ends[:-1]])
    return Placed(ids, np.minimum(starts, before), ends)


def _bytes(text: str) -> Placed:
    """UTF-8 bytes."""
    data = np.frombuffer(text.encode(), np.uint8)
    places = (
        np.cumsum(data & 0xC0 != 0x80, dtype=np.int32) - 1
    )  # a character begins with no 10xxxxxx
    return Placed(data.astype(np.int32), places, places + 1)
