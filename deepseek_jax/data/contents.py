"""Figures of a run's data that do not depend on names and places: checkpoints keep them, for comparison."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax.config.options import OPTIONS, Config, value_of
from deepseek_jax.data.example_files import ExampleSet
from deepseek_jax.data.sources import Corpus, Joined
from deepseek_jax.data.tokenizer import SPECIAL, Tokenizer
from deepseek_jax.errors import UserError

# blocks of a long array that are hashed, and numbers in each: a terabyte on a network disk takes seconds
BLOCKS, BLOCK = 256, 1 << 16

# Of a run without examples, as `rows` of one with them.
OF_TEXT = {"objective": "pretrain", "distill.data": "text"}
OF_ROWS = ("sft.packing", "sft.truncation")

# tokenizer: its name; sources: [{tokens, documents, sha256}]; weights: floats, adding up to 1; of examples
# rows and encoding besides: options by name
Contents = dict[str, Any]


def of(corpora: Sequence[Corpus], tokenizer: Tokenizer, weights: Sequence[float]) -> Contents:
    """The figures of a run's data. Plain JSON values."""
    sources = [
        {"tokens": len(c.tokens), "documents": len(c.offsets) - 1, "sha256": fingerprint(c)}
        for c in corpora
    ]
    return {"tokenizer": tokenizer.name, "sources": sources, "weights": [float(w) for w in weights]}


def of_examples(
    examples: ExampleSet, tokenizer: Tokenizer, weights: Sequence[float], config: Config
) -> Contents:
    """The figures of the examples of a run. Plain JSON values.

    `rows`: options that make other rows of the same examples. `encoding`: those that made these examples,
    which tell why others are others.
    """
    sources = []
    for first, last in itertools.pairwise(examples.sources.tolist()):
        offsets = examples.offsets[first : last + 1]
        some = slice(int(offsets[0]), int(offsets[-1]))
        parts = (
            (examples.tokens[some], "<i4"),
            (examples.scored[some], "|u1"),
            (offsets - offsets[0], "<i8"),
        )
        count = some.stop - some.start
        sources.append({"tokens": count, "documents": last - first, "sha256": _sha256(parts)})
    options = {
        name: value_of(config, name)
        for name, option in OPTIONS.items()
        if name.startswith("sft.") and option.on_resume == "new pass"
    }
    of_distillation = config.objective == "distill"
    rows = {"distill.data": "examples"} if of_distillation else {"objective": config.objective}
    rows |= {name: options.pop(name) for name in OF_ROWS}
    rows["sft.packing"] = config.sft.packing_strategy  # it has several names
    return {
        "tokenizer": tokenizer.name,
        "sources": sources,
        "weights": [float(w) for w in weights],
        "rows": rows,
        "encoding": options,
    }


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 of a corpus' token ids and document boundaries: all of them up to 2^24 numbers, evenly spread
    blocks beyond.

    Text and the token file made of it have the same one; the dtype of the file does not count.
    """
    return _sha256(((corpus.tokens, "<i4"), (corpus.offsets, "<i8")))


def _sha256(arrays: Iterable[tuple[np.ndarray | Joined, str]]) -> str:
    out = hashlib.sha256()
    for array, dtype in arrays:
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
    """What makes other rows: an option of examples or the first source that differs, in words; "" if all are
    the same, or one side is not known.

    Args:
      names: of the sources now.
    """
    if before is None or now is None:
        return ""
    if what := _other(before.get("rows", OF_TEXT), now.get("rows", OF_TEXT)):
        return what
    if len(before["sources"]) != len(now["sources"]):
        return (
            f"config.data.path has {len(now['sources'])} sources and not {len(before['sources'])}"
        )
    for i, (was, is_now) in enumerate(zip(before["sources"], now["sources"], strict=True)):
        if was != is_now:
            if what := _other(before.get("encoding", {}), now.get("encoding", {})):
                return what
            name = names[i] if i < len(names) else i
            return f"config.data.path={name!r} holds {_text(is_now)} and not {_text(was)}"
    return ""


def _other(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first option that both have and that differs, in words."""
    for name, is_now in now.items():
        if (was := before.get(name, is_now)) != is_now:
            return f"config.{name}={is_now!r} differs from {was!r}"
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
