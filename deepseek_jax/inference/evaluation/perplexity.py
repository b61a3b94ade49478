"""Perplexity and bits per byte of a corpus, document by document, however long."""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.data import contents
from deepseek_jax.data.documents import DataNotes, find_files, split_paths
from deepseek_jax.data.formats import read_text
from deepseek_jax.data.sources import BATCH_CHARACTERS, open_corpora, split
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation.scoring import Scorer, Span, windows
from deepseek_jax.inference.opener import Encoder, Opened

MAX_WINDOW = 2048  # of the default, where the model would take more
HELD_OUT_PIECE = 1 << 20  # tokens of a document that are read at a time


class Piece(NamedTuple):
    """A part of a document."""

    tokens: np.ndarray  # int32 [n]
    bytes: int  # UTF-8, of the text that is predicted here
    last: bool  # the document ends here
    read: float  # bytes for the progress bar


class Totals:
    """What was read so far."""

    def __init__(self) -> None:
        self.documents, self.bytes = 0, 0


def default_window(opened: Opened) -> int:
    """The length that a run was trained with, else the model's longest, and at most MAX_WINDOW."""
    longest = min(opened.model.model.max_position_embeddings, MAX_WINDOW)
    return min(longest, opened.run.train.sequence_length) if opened.trained else longest


def of_text(
    opened: Opened,
    path: str,
    scorer: Scorer,
    stride: int,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity of text files.

    Each document is scored on its own, every token of it once. The tokenizer's prefix (bos) stands before it where it has one; else
    the first token has nothing to be predicted from, and counts neither as a token nor with its bytes.

    Args:
      path: as config.data.path, text only. stride: tokens from one window of scorer.width to the next. limit: documents at most.

    Raises:
      UserError: the text is missing, unreadable or empty, or a token id is too high for the model.
    """
    notes = DataNotes()
    files = [
        (spec, f) for spec in split_paths(path, "--text") for f in find_files(spec, "--text", notes)
    ]
    if tokens := next((f for _, f in files if f.kind == "tokens"), None):
        raise UserError(
            f"--text={path}: {tokens.path} holds tokens and not text. Name text files; tokens can be evaluated as a run's held-out part."
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
    """Perplexity of the documents that a run holds out, with the token that ends each, as its own eval_loss; otherwise as `of_text`.

    Raises:
      UserError: the run holds nothing out, or its data cannot be read.
    """
    run = opened.run
    if run.data.eval_fraction == 0:
        raise UserError(
            "--text is missing, and this run holds no documents out: config.data.eval_fraction=0. Name a text."
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
    sides = [split(corpus, run.data.eval_fraction)[1] for corpus in corpora]

    def size(ids: np.ndarray, after: np.ndarray) -> int:
        if (
            len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        ):  # a sidecar that does not tell the truth
            raise UserError(
                f"the run's held-out part has token ids up to {ids.max()}, and its tokenizer {tokenizer.vocab_size} of them. Tokenize again."
            )
        known = tokenizer.token_bytes
        return (
            int(known[ids].sum())
            if known is not None
            else len(tokenizer.decode(ids, after).encode())
        )

    def pieces() -> Iterator[Piece]:
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
                    yield Piece(ids, read, at + len(ids) == length, len(ids))

    with Bar("Evaluating", sum(d.size for d in sides), progress) as bar:
        return _measure(pieces(), [], scorer, stride, limit, bar, "the run's held-out part")


def _text_pieces(files: list, encoder: Encoder, notes: DataNotes) -> Iterator[Piece]:
    """The pieces of documents in file order; empty documents are left out."""
    inside = False  # a document that had tokens already goes on

    def encoded(texts: list[str], rest: list[tuple[bool, float]]) -> Iterator[Piece]:
        nonlocal inside
        for text, (ids, first), (last, count) in zip(
            texts, encoder.encode_batch(texts), rest, strict=True
        ):
            unpredicted = first if not inside and not encoder.prefix else 0
            inside = (inside or len(ids) > 0) and not last
            yield Piece(ids, len(text.encode()) - unpredicted, last, count)

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
    pieces: Iterator[Piece],
    prefix: list[int],
    scorer: Scorer,
    stride: int,
    limit: int | None,
    bar: Bar,
    where: str,
) -> dict[str, Any]:
    if not 1 <= stride <= scorer.width:
        raise UserError(
            f"--stride={stride} is not between 1 and --window={scorer.width}. Choose one of these; small ones give more context."
        )
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be 1 or more.")
    size, totals = scorer.vocab_size, Totals()

    def spans() -> Iterator[Span]:
        while limit is None or totals.documents < limit:
            document = _document(pieces, totals, prefix, bar, size, where)
            if document is None:
                return
            yield from windows(totals.documents, document, scorer.width, stride)

    nll, tokens = 0.0, 0
    for score in scorer(spans()):
        nll, tokens = nll + score.nll, tokens + score.count
    if not tokens:
        raise UserError(f"{where} holds no token that can be predicted. Give more text.")
    mean = nll / tokens
    return {
        "perplexity": math.exp(min(mean, 700)),
        "nats_per_token": mean,
        "bits_per_byte": nll / math.log(2) / totals.bytes if totals.bytes else None,
        "documents": totals.documents,
        "tokens": tokens,
        "bytes": totals.bytes,
        "window": scorer.width,
        "stride": stride,
    }


def _document(
    pieces: Iterator[Piece], totals: Totals, prefix: list[int], bar: Bar, size: int, where: str
) -> Iterator[np.ndarray] | None:
    """The token ids of the next document with any, piece by piece after the prefix; None where there are no more."""
    for first in pieces:
        bar.advance(first.read)
        if len(first.tokens):
            break
    else:
        return None
    totals.documents += 1

    def parts() -> Iterator[np.ndarray]:
        yield np.asarray(prefix, np.int32)
        piece = first
        while True:
            if len(piece.tokens) and not 0 <= piece.tokens.min() <= piece.tokens.max() < size:
                raise UserError(
                    f"{where} has token ids up to {piece.tokens.max()}, and the model {size} of them. Take the model's own tokenizer."
                )
            totals.bytes += piece.bytes
            yield piece.tokens
            if piece.last or (piece := next(pieces, None)) is None:
                return
            bar.advance(piece.read)

    return parts()
