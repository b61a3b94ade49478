"""Rows with a prompt and its answer, as `generate --samples` writes them and verifiers judge them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import clean
from deepseek_jax.errors import UserError

FORM = 'Rows have "messages" that end in an answer, or "prompt" and "completion".'


class Answer(NamedTuple):
    """A row in the form that verifiers take."""

    prompt: Any  # a text, or messages
    completion: Any
    row: Mapping[str, Any]

    @property
    def prompt_key(self) -> bytes:
        """The same of all answers to a prompt."""
        return _hash(self.prompt)

    @property
    def completion_key(self) -> bytes:
        return _hash(self.completion)

    @property
    def is_finished(self) -> bool:
        """Whether the answer came to its end; rows that do not say are believed to have."""
        return self.row.get("finish_reason") != "length"


def read(path: str, bar: Bar | None = None) -> Iterator[tuple[int, Answer]]:
    """(number of the line from 1, answer) of the rows of a file.

    Raises:
      UserError: the file cannot be read, or a row is none; which line.
    """
    for number, line in lines(path):
        if bar is not None:
            bar.advance(len(line))
        if line.strip():
            yield number, _answer(line, f"IN={path}: line {number}")


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file."""
    try:
        with open(path, "rb") as f:
            yield from enumerate(f, 1)
    except OSError as e:
        raise UserError(f"IN={path} cannot be read ({e.strerror}). Name a JSONL file.") from None


def size(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _answer(line: bytes, where: str) -> Answer:
    try:
        row = clean(json.loads(line))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON ({str(e)[:100]}). {FORM}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__} and not an object. {FORM}")
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise UserError(f"{where} has messages that are not a list of objects. {FORM}")
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError(f"{where} has messages that do not end in an answer. {FORM}")
        return Answer(messages[:-1], messages[-1:], row)
    if row.get("prompt") is None or row.get("completion") is None:
        raise UserError(f"{where} has the keys {', '.join(sorted(row))}. {FORM}")
    return Answer(row["prompt"], row["completion"], row)


def _hash(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
