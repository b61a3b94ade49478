"""Corpora: token ids and document boundaries behind `config.data.path`, and which documents are held out."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.config import held_out
from deepseek_jax.config.options import Config, DataConfig
from deepseek_jax.data.documents import DataNotes, SourceFile, find_files, no_text, split_paths
from deepseek_jax.data.formats import read_text
from deepseek_jax.data.order import mix64
from deepseek_jax.data.tokenfile import open_tokens
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

BATCH_CHARACTERS = 4 << 20  # text handed to the tokenizer at a time: enough for its threads
HELD_OUT_SALT = 0x68656C64  # fixed: which documents are held out must never depend on the seed


class Joined:
    """Several 1-D integer arrays seen as one, without copying: a slice is put together when it is read."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self._starts = np.cumsum([0, *(len(p) for p in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, s: slice) -> np.ndarray:
        start, stop, _ = s.indices(len(self))
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        out = []
        while start < stop:
            base, end = int(self._starts[first]), min(stop, int(self._starts[first + 1]))
            out.append(self.parts[first][start - base : end - base])
            start, first = end, first + 1
        if len(out) == 1:
            return out[0]
        return np.concatenate(out) if out else np.zeros(0, np.int32)


class Corpus(NamedTuple):
    """One source. Document d is tokens[offsets[d]:offsets[d + 1]], its last token is eos."""

    tokens: np.ndarray | Joined  # integers [n]; a memory map for token files
    offsets: np.ndarray  # int64 [documents + 1]
    name: str  # as in config.data.path


class Documents(NamedTuple):
    """Some documents of a corpus: document d is tokens[starts[d]:starts[d] + lengths[d]], never empty."""

    tokens: np.ndarray | Joined
    starts: np.ndarray  # int64 [documents]
    lengths: np.ndarray  # int64 [documents]

    @property
    def size(self) -> int:
        """Tokens in all."""
        return int(self.lengths.sum())


def open_corpora(
    config: Config, tokenizer: Tokenizer, progress: bool = False, notes: DataNotes | None = None
) -> list[Corpus]:
    """Opens every source of `config.data.path`: text is tokenised into memory, token files are memory-mapped.

    Args:
      progress: show a bar on stderr if it takes long.
      notes: is told what is left out or changed.

    Raises:
      UserError: a source is missing, empty, unreadable or not what its name says, or has ids that the
        tokenizer has not.
    """
    notes = DataNotes() if notes is None else notes
    size = config.model.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"config.data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"config.model.vocab_size={size}. Set config.model.vocab_size to {tokenizer.vocab_size} or more."
        )
    if not -1 <= config.data.eos_token_id < tokenizer.vocab_size:
        raise UserError(
            f"config.data.eos_token_id={config.data.eos_token_id} is none of the "
            f"{tokenizer.vocab_size} ids of "
            f"config.data.tokenizer={config.data.tokenizer!r}. Set it to one below "
            f"{tokenizer.vocab_size}, or to -1 for the tokenizer's."
        )
    specs = split_paths(config.data.path, "config.data.path")
    found = [find_files(s, "config.data.path", notes) for s in specs]
    with Bar("Reading data", sum(f.size for files in found for f in files), progress) as bar:
        return [
            _open(spec, files, config, tokenizer, bar, notes)
            for spec, files in zip(specs, found, strict=True)
        ]


def _open(
    spec: str,
    files: list[SourceFile],
    config: Config,
    tokenizer: Tokenizer,
    bar: Bar,
    notes: DataNotes,
) -> Corpus:
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    text: list[SourceFile] = []

    def flush() -> None:
        if text:
            parts.append(_tokenise(text, spec, tokenizer, bar, notes))
            text.clear()

    for file in files:
        if file.kind == "tokens":
            flush()  # documents keep the order of their files
            parts.append(
                open_tokens(
                    file.path, f"config.data.path={spec!r}", config, tokenizer, bar.advance, notes
                )
            )
        else:
            text.append(file)
    flush()
    parts = [(tokens, offsets) for tokens, offsets in parts if len(tokens)]
    if not parts:
        raise no_text(spec, "config.data.path", notes)
    if len(parts) == 1:
        return Corpus(*parts[0], spec)
    bases = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    offsets = np.concatenate(
        [[0], *(o[1:] + base for (_, o), base in zip(parts, bases[:-1], strict=True))]
    )
    return Corpus(Joined([tokens for tokens, _ in parts]), offsets, spec)


def _tokenise(
    files: list[SourceFile], spec: str, tokenizer: Tokenizer, bar: Bar, notes: DataNotes
) -> tuple[np.ndarray, np.ndarray]:
    """-> tokens [n] in the smallest dtype, offsets int64 [documents + 1]."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    chunks, offsets, count = [], [np.zeros(1, np.int64)], 0
    for batch in encoded(files, spec, "config.data.path", tokenizer, bar, notes):
        for ids, ends in batch:
            chunks.append(ids.astype(dtype))
            offsets.append(ends + count)
            count += len(ids)
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype), np.concatenate(offsets)


def encoded(
    files: Iterable[SourceFile],
    spec: str,
    option: str,
    tokenizer: Tokenizer,
    bar: Bar,
    notes: DataNotes,
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Batches of pieces of documents: (ids int32 [n], where documents end in them: int64, from 1 to n), in
    file order.

    Each document ends with eos, also where special tokens are read in text and it spells eos. Empty documents
    are left out.
    """
    texts: list[str] = []
    lasts: list[bool] = []
    size = 0
    inside = False
    ended = False  # whether the last token was an eos that the text spelt
    eos = np.array([tokenizer.eos_id], np.int32)

    def batch() -> list[tuple[np.ndarray, np.ndarray]]:
        nonlocal ended
        out = []
        for ids, last in zip(tokenizer.encode_batch(texts), lasts, strict=True):
            spelt = (
                np.flatnonzero(ids == eos[0]) + 1
                if tokenizer.special_tokens
                else np.zeros(0, np.int64)
            )
            ended = len(ids) in spelt if len(ids) else ended
            if last and not ended:
                ids, spelt = np.append(ids, eos), np.append(spelt, len(ids) + 1)
            ended = ended and not last
            out.append((ids, spelt))
        return out

    for file in files:
        for piece in read_text(file, spec, option, notes):
            bar.advance(piece.read)
            if not piece.text and not inside:
                continue
            inside = not piece.last
            texts.append(piece.text)
            lasts.append(piece.last)
            size += len(piece.text)
            if size >= BATCH_CHARACTERS:
                yield batch()
                texts, lasts, size = [], [], 0
    if texts:
        yield batch()


def divided(corpus: Corpus, data: DataConfig) -> tuple[Documents, Documents]:
    """(training documents, held-out documents) of a corpus: in their order by `data.split`, at the places
    where Megatron-Core's BlendedMegatronDatasetBuilder divides an index; or as `split` does.
    """
    if not data.split:
        return split(corpus, data.eval_fraction)
    train, valid, _ = held_out.shares(data.split)
    count = len(corpus.offsets) - 1
    ends = [round(share * count) for share in (0.0, train, train + valid)]
    kept, held = (_documents(corpus, a, b) for a, b in itertools.pairwise(ends))
    return kept, held


def _documents(corpus: Corpus, begin: int, end: int) -> Documents:
    """Documents begin to end - 1, but for empty ones."""
    starts, ends = corpus.offsets[begin:end], corpus.offsets[begin + 1 : end + 1]
    some = ends > starts
    return Documents(corpus.tokens, starts[some], (ends - starts)[some])


def split(corpus: Corpus, fraction: float) -> tuple[Documents, Documents]:
    """Divides a corpus by document into training and held-out documents.

    Of every 1 / fraction neighbouring documents one is held out, chosen by a fixed hash: the share is
    exact, every part of the corpus is represented, and documents appended later do not move the
    others. At least one document is on each side. A single document is cut instead: its end is held
    out.

    Returns:
      (training, held out); nothing is held out for fraction 0.
    """
    lengths = np.diff(corpus.offsets)
    starts, lengths = corpus.offsets[:-1][lengths > 0], lengths[lengths > 0]
    if fraction and len(starts) == 1:
        total = int(lengths[0])
        # At least two tokens: one to read, one to predict.
        count = min(max(math.ceil(total * fraction), 2), total - 1)
        cut = np.array([total - count], np.int64)
        return Documents(corpus.tokens, starts, cut), Documents(
            corpus.tokens, starts + cut, lengths - cut
        )
    out = held_out_of(len(starts), fraction)
    kept, held = (Documents(corpus.tokens, starts[m], lengths[m]) for m in (~out, out))
    return kept, held


def held_out_of(n: int, fraction: float) -> np.ndarray:
    """Which of n documents are held out, bool [n]: one of every 1 / fraction neighbours; none of a single
    one.
    """
    held_out = np.zeros(n, bool)
    if not fraction or n < 2:
        return held_out
    blocks = np.arange(math.ceil(n * fraction) + 1, dtype=np.int64)
    begins = np.minimum(np.ceil(blocks / fraction), 2.0**53).astype(np.int64)
    hashes = mix64(blocks[:-1].astype(np.uint64) + mix64(HELD_OUT_SALT))
    sizes = np.maximum(np.diff(begins), 1).astype(np.uint64)
    picks = begins[:-1] + (hashes % sizes).astype(np.int64)
    held_out[picks[picks < n]] = True
    if not held_out.any():
        held_out[int(hashes[0]) % n] = True
    if held_out.all():
        held_out[0] = False
    return held_out


def parse_weights(config: Config) -> list[float] | None:
    """The mixture weights of `config.data.weights`, adding up to 1; None if there are none.

    Raises:
      UserError: not as many as there are sources, or not positive numbers.
    """
    text, count = config.data.weights, len(split_paths(config.data.path, "config.data.path"))
    if not text.strip():
        return None
    try:
        weights = [float(w) for w in text.split(",")]
    except ValueError:
        raise UserError(
            f"config.data.weights={text!r} is not a list of numbers. Write it as '0.7,0.3', one number a "
            f"source."
        ) from None
    if len(weights) != count:
        raise UserError(
            f"config.data.weights={text!r} has {len(weights)} numbers, but "
            f"config.data.path={config.data.path!r} has {count} sources. Give one weight per source."
        )
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise UserError(
            f"config.data.weights={text!r} has a weight that is not a positive number. Set every "
            "weight above 0, or remove that source."
        )
    return [w / sum(weights) for w in weights]
