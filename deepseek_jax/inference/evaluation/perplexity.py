"""Perplexity and bits per byte of a corpus, document by document, however long."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.config import held_out
from deepseek_jax.data import contents
from deepseek_jax.data.documents import DataNotes, find_files, split_paths
from deepseek_jax.data.formats import read_text
from deepseek_jax.data.sources import BATCH_CHARACTERS, divided, open_corpora
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation import held_out_examples
from deepseek_jax.inference.evaluation.scorer import Scorer, TokenSpan, windows
from deepseek_jax.inference.opener import Encoder, Opened

MAX_WINDOW = 2048  # of the default, where the model would take more
HELD_OUT_PIECE = 1 << 20  # tokens of a document that are read at a time


class DocumentPart(NamedTuple):
    """A part of a document, in tokens."""

    tokens: np.ndarray  # int32 [n]
    bytes: int  # UTF-8, of the text that is predicted here
    last: bool  # the document ends here
    read: float  # bytes for the progress bar


@dataclasses.dataclass
class ReadSoFar:
    """How much text was read."""

    documents: int = 0
    bytes: int = 0


def default_window(opened: Opened) -> int:
    """The length that a run was trained with, else the model's longest, and at most MAX_WINDOW."""
    longest = min(opened.model.config.max_position_embeddings, MAX_WINDOW)
    if opened.run and opened.trained:
        return min(longest, opened.run.train.sequence_length)
    return longest


def of_text(
    opened: Opened,
    path: str,
    scorer: Scorer,
    stride: int,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity of text files.

    Each document is scored on its own, every token of it once. The tokenizer's prefix (bos) stands before it
    where it has one; else the first token has nothing to be predicted from, and counts neither as a token nor
    with its bytes.

    Args:
      opened: the model and its tokenizer.
      path: as config.data.path, text only.
      scorer: of the model.
      stride: tokens from one window of scorer.width to the next.
      limit: documents at most.
      progress: show a bar.

    Raises:
      UserError: the text is missing, unreadable or empty, or a token id is too high for the model.
    """
    notes = DataNotes()
    files = [
        (spec, f) for spec in split_paths(path, "--text") for f in find_files(spec, "--text", notes)
    ]
    if tokens := next((f for _, f in files if f.kind == "tokens"), None):
        raise UserError(
            f"--text={path}: {tokens.path} holds tokens and not text. Name text files; tokens can be "
            f"evaluated as a run's held-out part."
        )
    encoder = opened.encoder()
    encoder.say_prefix()
    with Bar("Evaluating", sum(f.size for _, f in files), progress) as bar:
        result = _measure(
            _text_pieces(files, encoder, notes),
            encoder.prefix,
            scorer,
            stride,
            limit,
            bar,
            f"--text={path}",
        )
    for line in notes.lines():
        print(line, file=sys.stderr)
    return result


def of_held_out(
    opened: Opened, scorer: Scorer, stride: int, limit: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Perplexity of the documents that a run holds out, with the token that ends each, as its own eval_loss.

    Args:
      opened: the run.
      scorer, stride, limit, progress: as `of_text`.

    Raises:
      UserError: the run holds nothing out, or its data cannot be read.
    """
    run = opened.run
    assert run is not None
    if run.reads_examples:
        return held_out_examples.evaluate(opened, scorer, limit, progress)
    if not held_out.is_any(run.data):
        raise UserError(
            f"--text is missing, and this run holds no documents out: {held_out.option(run.data)}. Name a "
            "text."
        )
    tokenizer = load_tokenizer(
        opened.tokenizer or run.data.tokenizer, special_tokens=run.data.special_tokens
    )
    corpora = open_corpora(run, tokenizer, progress)
    if what := contents.difference(
        opened.contents,
        contents.of(corpora, tokenizer, ()),
        split_paths(run.data.path, "config.data.path"),
    ):
        raise UserError(
            f"{what}, that the run read: what it held out is no longer known. Put the data back, "
            "or name a text with --text."
        )
    sides = [divided(corpus, run.data)[1] for corpus in corpora]

    def size(ids: np.ndarray, after: np.ndarray) -> int:
        # The file beside the tokens that describes them may be wrong.
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise UserError(
                f"the run's held-out part has token ids up to {ids.max()}, and its tokenizer "
                f"{tokenizer.vocab_size} of them. Tokenize again."
            )
        if tokenizer.token_bytes is not None:
            return int(tokenizer.token_bytes[ids].sum())
        return len(tokenizer.decode(ids, after).encode())

    def pieces() -> Iterator[DocumentPart]:
        for documents in sides:
            for start, length in zip(
                documents.starts.tolist(), documents.lengths.tolist(), strict=True
            ):
                for at in range(0, length, HELD_OUT_PIECE):
                    ids = np.asarray(
                        documents.tokens[start + at : start + min(length, at + HELD_OUT_PIECE)],
                        np.int32,
                    )
                    before = documents.tokens[start + max(at - 32, 0) : start + at]
                    read = size(ids, before) if at else size(ids[1:], ids[:1])
                    yield DocumentPart(ids, read, at + len(ids) == length, len(ids))

    with Bar("Evaluating", sum(d.size for d in sides), progress) as bar:
        return _measure(pieces(), [], scorer, stride, limit, bar, "the run's held-out part")


def _text_pieces(files: list, encoder: Encoder, notes: DataNotes) -> Iterator[DocumentPart]:
    """The pieces of documents in file order; empty documents are left out."""
    inside = False  # a document that had tokens already goes on

    def encoded(texts: list[str], rest: list[tuple[bool, float]]) -> Iterator[DocumentPart]:
        nonlocal inside
        for text, (ids, first), (last, count) in zip(
            texts, encoder.encode_batch(texts), rest, strict=True
        ):
            unpredicted = first if not inside and not encoder.prefix else 0
            inside = (inside or len(ids) > 0) and not last
            yield DocumentPart(ids, len(text.encode()) - unpredicted, last, count)

    texts, rest, size = [], [], 0
    for spec, file in files:
        for piece in read_text(file, spec, "--text", notes):
            texts.append(piece.text)
            rest.append((piece.last, piece.read))
            size += len(piece.text)
            if size >= BATCH_CHARACTERS:
                yield from encoded(texts, rest)
                texts, rest, size = [], [], 0
    yield from encoded(texts, rest)


def _measure(
    pieces: Iterator[DocumentPart],
    prefix: list[int],
    scorer: Scorer,
    stride: int,
    limit: int | None,
    bar: Bar,
    where: str,
) -> dict[str, Any]:
    if not 1 <= stride <= scorer.width:
        raise UserError(
            f"--stride={stride} is not between 1 and --window={scorer.width}. Choose one of these; small "
            f"ones give more context."
        )
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be 1 or more.")
    size, so_far = scorer.vocab_size, ReadSoFar()

    def spans() -> Iterator[TokenSpan]:
        while limit is None or so_far.documents < limit:
            document = _document(pieces, so_far, prefix, bar, size, where)
            if document is None:
                return
            yield from windows(so_far.documents, document, scorer.width, stride)

    nll, tokens = 0.0, 0
    for score in scorer(spans()):
        nll, tokens = nll + score.nll, tokens + score.targets
    if not tokens:
        raise UserError(f"{where} holds no token that can be predicted. Give more text.")
    mean = nll / tokens
    return {
        "perplexity": math.exp(min(mean, 700)),
        "nats_per_token": mean,
        "bits_per_byte": nll / math.log(2) / so_far.bytes if so_far.bytes else None,
        "documents": so_far.documents,
        "tokens": tokens,
        "bytes": so_far.bytes,
        "window": scorer.width,
        "stride": stride,
    }


def _document(
    pieces: Iterator[DocumentPart],
    so_far: ReadSoFar,
    prefix: list[int],
    bar: Bar,
    size: int,
    where: str,
) -> Iterator[np.ndarray] | None:
    """The token ids of the next document with any, part by part after the prefix; None after the last."""
    for first in pieces:
        bar.advance(first.read)
        if len(first.tokens):
            break
    else:
        return None
    so_far.documents += 1

    def parts() -> Iterator[np.ndarray]:
        yield np.asarray(prefix, np.int32)
        piece = first
        while True:
            if len(piece.tokens) and not 0 <= piece.tokens.min() <= piece.tokens.max() < size:
                raise UserError(
                    f"{where} has token ids up to {piece.tokens.max()}, and the model {size} of them. "
                    f"Take the model's own tokenizer."
                )
            so_far.bytes += piece.bytes
            yield piece.tokens
            following = None if piece.last else next(pieces, None)
            if following is None:
                return
            piece = following
            bar.advance(piece.read)

    return parts()
