"""Text to token ids and back, by the tokenizer of a Hugging Face checkpoint or of a run."""

import sys
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import tokenizers

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.tokenizer import Tokenizer, decode_after, tail
from deepseek_jax.errors import UserError


class Encoder:
    """A tokenizer.

    Attributes:
      prefix: what the tokenizer puts before a text: bos, or nothing.
      start_id: what can stand before a text that nothing stands before: bos, else eos.
      stop_ids: tokens that end a text.
      hidden: {id: text} of the tokens that `decode` leaves out, these among them.
      vocab_size: ids run from 0 to vocab_size - 1.
    """

    def __init__(self, source: Chat | Tokenizer, name: str, ends: Collection[int] = ()):
        """
        Args:
          source: of a checkpoint, or of a run without one.
          name: of the model, for messages.
          ends: more tokens that end a text.
        """
        self.prefix: list[int] = []
        self._source = source
        self._inner: tokenizers.Tokenizer | Tokenizer
        self._name = name
        if isinstance(source, Chat):
            self._inner = source.tokenizer
            encoding = self._inner.encode("a", add_special_tokens=True)
            special = encoding.special_tokens_mask
            self.prefix = encoding.ids[: special.index(0) if 0 in special else 0]
            self.stop_ids = source.stop_ids.union(ends)
            added = self._inner.get_added_tokens_decoder()
            self.hidden: Mapping[int, str] = {i: t.content for i, t in added.items() if t.special}
            self.hidden |= {i: self._inner.id_to_token(i) or "" for i in self.stop_ids}
            self.vocab_size = (
                max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            )
            bos = self._inner.token_to_id(source.special.get("bos_token", ""))
            eos = self._inner.token_to_id(source.special.get("eos_token", ""))
            self.start_id = next(
                (i for i in (*self.prefix, bos, eos, *sorted(self.stop_ids)) if i is not None), None
            )
        else:
            self._inner = source
            self.vocab_size = source.vocab_size
            self.start_id = source.eos_id
            self.stop_ids = source.stop_ids.union(ends)
            self.hidden = dict(source.hidden)
            self.hidden |= {i: self.decode([i]) for i in self.stop_ids - self.hidden.keys()}

    def say_prefix(self) -> None:
        """Prints what stands before every text, if anything."""
        if self.prefix:
            spelt = "".join(self.text_of(i) or "" for i in self.prefix)
            print(f"begins with    {spelt}, as the model's tokenizer asks for", file=sys.stderr)

    def text_of(self, id: int) -> str | None:
        """A token as the vocabulary spells it."""
        if isinstance(self._source, Chat):
            return self._source.tokenizer.id_to_token(id)
        return self.decode([id])

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text, after the prefix unless it should be left out or the text begins with it."""
        if isinstance(self._inner, Tokenizer):
            return self._inner.encode(text).tolist()
        ids = self._inner.encode(clean_text(text), add_special_tokens=False).ids
        return ids if not prefix or ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to go on from; an empty one is start_id.

        Raises:
          UserError: there is no such token.
        """
        ids = self.encode(text)
        if ids:
            return ids
        if self.start_id is None:
            raise UserError(
                f"the prompt is empty, and the tokenizer of {self._name} has no token that begins "
                "or ends a text. Give a prompt."
            )
        return [self.start_id]

    @property
    def chat(self) -> Chat:
        """The chat template.

        Raises:
          UserError: there is none.
        """
        if not isinstance(self._source, Chat):
            raise UserError(
                f"{self._name} has no chat template: it is a run without a Hugging Face "
                "checkpoint's tokenizer. Prompt it with a text, or begin the run with "
                "config.init_from."
            )
        return self._source

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """(int32 ids without prefix, UTF-8 bytes of the first one) of each text."""
        if isinstance(self._inner, Tokenizer):
            known = self._inner.token_bytes

            def size(i):
                return int(known[i]) if known is not None else len(self._inner.decode([i]).encode())

            return [
                (ids, size(ids[0]) if len(ids) else 0) for ids in self._inner.encode_batch(texts)
            ]
        texts, out = [clean_text(t) for t in texts], []
        for text, e in zip(
            texts, self._inner.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            first, last = e.offsets[0] if e.offsets else (0, 0)
            out.append((np.asarray(e.ids, np.int32), len(text[first:last].encode())))
        return out

    def decode(
        self, ids: Sequence[int] | np.ndarray, after: Sequence[int] | np.ndarray = ()
    ) -> str:
        """The text of some ids, without special tokens, as it goes on after others."""
        return decode_after(self._decode, [i for i in map(int, ids) if i not in self.hidden], after)

    def tail(self, ids: Sequence[int]) -> list[int]:
        """The last of some ids, as far as what follows them depends on them: see data.tokenizer.tail."""
        return tail(self._decode, ids)

    def _decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids)
