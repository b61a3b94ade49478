"""Text to token ids and back: raw bytes, or the tokenizer of a Hugging Face checkpoint."""

import abc
import json
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tokenizers

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.errors import UserError

# End-of-document tokens by the names in use; the first one that the tokenizer has is taken.
EOS_NAMES = (
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "<EOS>",
    "<|end|>",
)
SPECIAL = "+special_tokens"  # at the end of a tokenizer's name
BROKEN = "\ufffd"  # decoded from a part of a character


class Tokenizer(abc.ABC):
    """What all tokenizers share.

    Attributes:
      name: identity that changes whenever ids could change; `bytes` or `sha256:...` of the file, with
        `+special_tokens` if it reads these.
      vocab_size: ids run from 0 to vocab_size - 1.
      eos_id: the token that ends a document.
      stop_ids: it and tokenizer_config.json's eos_token: an answer ends with either.
      hidden: {id: text} of the tokens that `decode` leaves out.
      token_bytes: int32 [vocab_size], bytes of text that each token stands for (eos and special
        tokens: 0), or None if it cannot be known.
    """

    name: str
    vocab_size: int
    eos_id: int
    stop_ids: frozenset[int]
    hidden: Mapping[int, str]
    token_bytes: np.ndarray | None
    special_tokens = False  # whether text can spell special tokens

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [n], without eos at the end. The text of a special token is text, unless
        `load_tokenizer` was told otherwise."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text; much faster than one by one for a `tokenizer.json`."""

    @abc.abstractmethod
    def decode(
        self, ids: Sequence[int] | np.ndarray, after: Sequence[int] | np.ndarray = ()
    ) -> str:
        """The text of some ids. Special and out of range ids are left out; broken UTF-8 becomes U+FFFD.

        Args:
          after: ids that stand before them, as far as they are known: some tokenizers leave out the space
            that begins a text.
        """


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    name, vocab_size, eos_id, stop_ids = "bytes", 257, 256, frozenset([256])
    hidden = {256: ""}

    def __init__(self):
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[self.eos_id] = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(clean_text(t).encode(), np.uint8).astype(np.int32) for t in texts]

    def decode(
        self, ids: Sequence[int] | np.ndarray, after: Sequence[int] | np.ndarray = ()
    ) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A Hugging Face tokenizer: a `tokenizer.json` or `tiktoken.model` and what the files beside it say of
    added tokens."""

    def __init__(self, path: str, option: str, special_tokens: bool = False):
        """
        Raises:
          OSError: the file cannot be read.
          UserError: it is no tokenizer.
        """
        try:
            files = tokenizer_folder.read(path, specials=False)
        except ValueError as e:
            file = tokenizer_folder.RANKS if path.endswith(".model") else tokenizer_folder.JSON
            raise UserError(
                f"{option}={path!r} is not a {file} that can be read ({e}). Give the "
                f"tokenizer.json or tiktoken.model of the model, or bytes."
            ) from None
        self._inner = files.tokenizer
        self.special_tokens = special_tokens
        self.name = files.identity + (SPECIAL if special_tokens else "")
        self._inner.encode_special_tokens = not special_tokens  # the library's word for: as text
        added = self._inner.get_added_tokens_decoder()
        vocab = self._inner.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(
                f"{option}={path!r} has an empty vocabulary. Give the tokenizer.json of the model, or bytes."
            )
        # Ids may have holes, so the number of tokens is not enough.
        self.vocab_size = max(vocab.values()) + 1
        self.eos_id = next(
            (vocab[n] for n in (*EOS_NAMES, files.special.get("eos_token")) if n in vocab), -1
        )
        if self.eos_id < 0:
            raise UserError(
                f"{option}={path!r} has no token that ends a document. Add one of "
                f"{' '.join(EOS_NAMES)} to its added_tokens."
            )
        self.stop_ids = frozenset(
            {self.eos_id, vocab.get(files.special.get("eos_token", ""), self.eos_id)}
        )
        special = {i for i, t in added.items() if t.special} | self.stop_ids
        self.hidden = {i: self._inner.id_to_token(i) or "" for i in special}
        self._decodable = np.zeros(self.vocab_size, bool)
        self._decodable[[i for i in vocab.values() if i not in special]] = True
        plain = {i: t.content for i, t in added.items()}
        tree = json.loads(self._inner.to_str())
        self.token_bytes = _byte_level_lengths(tree, vocab, special, plain, self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._inner.encode_batch([clean_text(t) for t in texts], add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def decode(
        self, ids: Sequence[int] | np.ndarray, after: Sequence[int] | np.ndarray = ()
    ) -> str:
        return decode_after(self._decode, ids, after)

    def save(self, path: str) -> None:
        """Writes it as one tokenizer.json, with the tokens that it has from other files."""
        self._inner.encode_special_tokens = False  # the file would keep it
        self._inner.save(path)
        self._inner.encode_special_tokens = not self.special_tokens

    def with_special_tokens(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for texts in which special tokens are spelt, a copy."""
        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.encode_special_tokens = False
        return copy

    def _decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        ids = ids[(ids >= 0) & (ids < self.vocab_size)]
        return self._inner.decode(ids[self._decodable[ids]].tolist(), skip_special_tokens=False)


def decode_after(
    decode: Callable[[list[int]], str],
    ids: Sequence[int] | np.ndarray,
    after: Sequence[int] | np.ndarray,
) -> str:
    """What `ids` add to the text of `after`."""
    before = tail(decode, after)
    return decode([*before, *map(int, ids)])[len(decode(before)) if before else 0 :]


def tail(decode: Callable[[list[int]], str], ids: Sequence[int] | np.ndarray) -> list[int]:
    """The last of some ids, as many as it takes for a text that does not begin within a character: what
    follows is then decoded as it would be after all of them."""
    longest = min(len(ids), 32)
    for count in range(1, longest + 1):
        text = decode([int(ids[-count])])
        if text and BROKEN not in text:
            return [int(i) for i in ids[-count:]]
    return [int(i) for i in ids[len(ids) - longest :]]


def load_tokenizer(
    spec: str, option: str = "config.data.tokenizer", special_tokens: bool = False
) -> Tokenizer:
    """The tokenizer that an option asks for.

    Args:
      spec: `bytes`, or the path of a `tokenizer.json`, of a `tiktoken.model`, or of a folder with one of
        them.
      option: what error messages call it.
      special_tokens: text that spells a special token (<|im_start|>) is that token, as in transformers; else
        it is text. `bytes` has none.

    Raises:
      UserError: the file is missing, unreadable, not a tokenizer, or has no end-of-document token.
    """
    # no run or model is known here
    if spec == "bytes" or spec == "auto" and option == "config.data.tokenizer":
        return ByteTokenizer()
    path = tokenizer_folder.file_of(spec)
    if os.path.isdir(path):
        raise UserError(
            f"{option}={spec!r} is a folder without a tokenizer.json or tiktoken.model. Give the "
            f"folder or file of a tokenizer, or bytes."
        )
    try:
        return FileTokenizer(path, option, special_tokens)
    except FileNotFoundError:
        raise UserError(
            f"{option}={spec!r} does not exist. Give the path of a tokenizer.json, or bytes "
            f"(relative paths start in {os.getcwd()})."
        ) from None
    except OSError as e:
        raise UserError(
            f"{option}={spec!r} cannot be read ({e.strerror}). Make it readable, or give another "
            "tokenizer.json or bytes."
        ) from None


def _byte_level_alphabet() -> set[str]:
    """The 256 characters that stand for one byte each in byte-level BPE (GPT-2's table)."""
    return set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _has(part: dict | None, kind: str) -> bool:
    """Whether a (pre-)tokenizer or decoder of a tokenizer.json is, or contains, one of this type."""
    if not part:
        return False
    inner = part.get("pretokenizers") or part.get("decoders") or []
    return part.get("type") == kind or any(_has(p, kind) for p in inner)


def _byte_level_lengths(
    tree: dict, vocab: dict[str, int], special: set[int], added: dict[int, str], size: int
) -> np.ndarray | None:
    """Bytes a token stands for, int32 [size]: in byte-level BPE a token is spelt with one character per byte.

    None for any other kind, and where a space is put before the text (the sum would be off by one a
    document).
    """
    pre = tree.get("pre_tokenizer")
    model = tree["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files leave the type out
    byte_level = kind == "BPE" and _has(pre, "ByteLevel") and _has(tree.get("decoder"), "ByteLevel")
    if pre is None or not byte_level:
        return None
    steps = [pre, *pre.get("pretokenizers", [])]
    if any(p.get("type") == "ByteLevel" and p.get("add_prefix_space") for p in steps):
        return None
    alphabet = _byte_level_alphabet()
    out = np.zeros(size, np.int32)
    for token, i in vocab.items():
        if i in special:
            continue
        if i in added:
            out[i] = len(added[i].encode())
        elif alphabet.issuperset(token):
            out[i] = len(token)
        else:
            return None
    return out
