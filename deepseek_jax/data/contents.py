"""Figures of a run's data that do not depend on names and places: checkpoints keep them, for comparison."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.sources import Corpus, Joined
from deepseek_jax.data.tokenizer import SPECIAL, Tokenizer
from deepseek_jax.errors import UserError

# blocks of a long array that are hashed, and numbers in each: a terabyte on a network disk takes seconds
BLOCKS, BLOCK = 256, 1 << 16

# tokenizer: its name; sources: [{tokens, documents, sha256}]; weights: floats, adding up to 1
Contents = dict[str, Any]


def of(corpora: Sequence[Corpus], tokenizer: Tokenizer, weights: Sequence[float]) -> Contents:
    """The figures of a run's data. Plain JSON values."""
    sources = [
        {"tokens": len(c.tokens), "documents": len(c.offsets) - 1, "sha256": fingerprint(c)}
        for c in corpora
    ]
    return {"tokenizer": tokenizer.name, "sources": sources, "weights": [float(w) for w in weights]}


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 of a corpus' token ids and document boundaries: all of them up to 2^24 numbers, evenly spread
    blocks beyond.

    Text and the token file made of it have the same one; the dtype of the file does not count.
    """
    out = hashlib.sha256()
    for array, dtype in ((corpus.tokens, "<i4"), (corpus.offsets, "<i8")):
        for block in _blocks(array):
            out.update(np.ascontiguousarray(block.astype(dtype)))
    return out.hexdigest()


def _blocks(array: np.ndarray | Joined) -> Iterator[np.ndarray]:
    n = len(array)
    count = min(-(-n // BLOCK), BLOCKS)
    for i in range(count):
        # the first and the last are always among them
        start = i * BLOCK if count < BLOCKS else i * max(n - BLOCK, 0) // (BLOCKS - 1)
        yield array[start : start + BLOCK]


def digest(contents: Contents) -> str:
    """SHA-256 of the figures: the same on two hosts if both read the same data."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def difference(before: Contents | None, now: Contents | None, names: Sequence[str] = ()) -> str:
    """The first source that differs, in words; "" if all are the same, or one side is not known.

    Args:
      names: of the sources now.
    """
    if before is None or now is None:
        return ""
    if len(before["sources"]) != len(now["sources"]):
        return (
            f"config.data.path has {len(now['sources'])} sources and not {len(before['sources'])}"
        )
    for i, (was, is_now) in enumerate(zip(before["sources"], now["sources"], strict=True)):
        if was != is_now:
            name = names[i] if i < len(names) else i
            return f"config.data.path={name!r} holds {_text(is_now)} and not {_text(was)}"
    return ""


def _text(source: dict[str, Any]) -> str:
    return (
        f"{source['tokens']:,} tokens in {source['documents']:,} documents "
        f"(sha256 {source['sha256'][:12]})"
    )


def check_tokenizer(trained: Contents | None, name: str | None, spec: str) -> None:
    """Compares a tokenizer with that of a run.

    Args:
      trained: of the run; None if not known.
      name: as Tokenizer.name.
      spec: config.data.tokenizer.

    Raises:
      UserError: they differ.
    """
    if trained and name and trained["tokenizer"] != name:
        if trained["tokenizer"].removesuffix(SPECIAL) == name.removesuffix(SPECIAL):
            was = trained["tokenizer"].endswith(SPECIAL)
            raise UserError(
                f"config.data.special_tokens={not was} differs from {was} of the checkpoint: what "
                f"text spells would be other ids. Set config.data.special_tokens={was}."
            )
        raise UserError(
            f"config.data.tokenizer={spec!r} is {name[:19]}, but the run was trained with "
            f"{trained['tokenizer'][:19]}: token ids would mean other text. Put that tokenizer "
            f"back; for another one begin a new run with config.init_from."
        )
