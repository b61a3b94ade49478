"""Between text and token ids: prompts in, text out piece by piece, stop strings."""

import hashlib
import os
from collections.abc import Sequence

from deepseek_jax.config import Config, UserError
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.hf import start
from deepseek_jax.hf.chat import Chat, Message

BROKEN = "\ufffd"  # at the end: a character of several tokens that is not whole yet


class Codec:
    """A tokenizer, of a checkpoint or of a run.

    Attributes:
      stop_ids: tokens that end an answer. vocab: ids run from 0 to vocab - 1.
    """

    def __init__(self, tokenizer: Tokenizer | Chat):
        self._tokenizer = tokenizer
        if isinstance(tokenizer, Chat):
            self.stop_ids = tokenizer.stop_ids
            self.vocab = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        else:
            self.stop_ids, self.vocab = frozenset([tokenizer.eos_id]), tokenizer.vocab_size

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one is the token that begins a text, else one that ends a text, after which another begins."""
        ids = [int(i) for i in self._tokenizer.encode(prompt)]
        if ids:
            return ids
        if isinstance(self._tokenizer, Chat):
            bos = self._tokenizer.tokenizer.token_to_id(self._tokenizer.special.get("bos_token", ""))
            first = min(self.stop_ids, default=None) if bos is None else bos
            if first is None:
                raise UserError(f"the prompt is empty, and the tokenizer of {self._tokenizer.folder} has no token that begins a text. Give a prompt.")
            return [first]
        return [self._tokenizer.eos_id]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, up to where the answer begins.

        Raises:
          UserError: there is no chat template, or it refuses the messages.
        """
        if not isinstance(self._tokenizer, Chat):
            raise UserError("there is no chat template: the run was not made from a Hugging Face checkpoint. Give --prompt, or put the "
                            "checkpoint's tokenizer files and chat_template.jinja into WORKDIR/hf.")
        return self._tokenizer.encode(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._tokenizer.decode(ids)


def of_folder(folder: str) -> Codec:
    """The tokenizer of a Hugging Face checkpoint."""
    return Codec(Chat(folder))


def of_run(workdir: str, config: Config) -> Codec:
    """The tokenizer that a run was trained with: with what its checkpoint says of it, where it began with one and kept its tokenizer."""
    given, own = config.data.tokenizer, os.path.join(workdir, start.FOLDER)
    file = os.path.join(own, "tokenizer.json")
    if os.path.exists(file) and given != "bytes" and (not os.path.exists(given) or _digest(given) == _digest(file)):
        return of_folder(own)
    return Codec(load_tokenizer(given))


def _digest(path: str) -> bytes:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


class Stream:
    """The text of one answer, as its tokens come.

    Characters of several tokens are given when they are whole, and no part of a stop string ever.

    Attributes:
      ids: the tokens. text: all that was given. stopped: a stop string was found; the text ends before it.
    """

    def __init__(self, codec: Codec, stop: Sequence[str] = ()):
        self._codec, self._stop = codec, tuple(stop)
        self.ids: list[int] = []
        self._first = self._read = 0  # ids before _read are decoded; those from _first on are decoded with newer ones, for the spaces between
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.text, self.stopped = "", False

    def add(self, id: int) -> str:
        """Takes a token; returns the text that can be shown now."""
        self.ids.append(id)
        return self._decoded(self._codec.decode(self.ids[self._first :]))

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        return "" if self.stopped else self._decoded(self._codec.decode(self.ids[self._first :]), last=True)

    def _decoded(self, text: str, last: bool = False) -> str:
        before = self._codec.decode(self.ids[self._first : self._read])
        if not self.stopped and len(text) > len(before) and (last or not text.endswith(BROKEN)):
            self._held += text[len(before) :]
            self._first, self._read = self._read, len(self.ids)
        return self._give(last)

    def _give(self, last: bool) -> str:
        found = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped, out, self._held = True, self._held[:found], ""
        else:
            keep = 0 if last else max((_begun(self._held, s) for s in self._stop), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
