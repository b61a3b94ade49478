"""Files of prompts and questions that a user hands in: a line of text or a JSON object each."""

import json
import os
import sys
from collections.abc import Iterator, Set
from typing import Any

from deepseek_jax.cli.texts import clean, clean_text
from deepseek_jax.errors import UserError


def read_lines(path: str, option: str, form: str) -> Iterator[tuple[int, str]]:
    """(number, text without its end) of the lines of a UTF-8 file that are not blank; path - is stdin.

    Args:
      option: what error messages call the file.
      form: what to write instead, a sentence.

    Raises:
      UserError: it cannot be read, is not UTF-8, or has only blank lines.
    """
    number, empty = 0, True
    try:
        with (
            getattr(sys.stdin, "buffer", sys.stdin)
            if path == "-"
            else open(os.path.expanduser(path), "rb") as f
        ):
            for number, line in enumerate(f, 1):
                text = (
                    line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if isinstance(line, bytes)
                    else line
                )
                if text.strip():
                    empty = False
                    yield number, clean_text(text.rstrip("\r\n"))
    except UnicodeDecodeError as e:
        raise UserError(
            f"{option}={path} cannot be read: line {number} is not UTF-8 at byte {e.start}. Convert it, as "
            f"with iconv -t UTF-8."
        ) from None
    except OSError as e:
        raise UserError(f"{option}={path} cannot be read ({e.strerror or e}). {form}") from None
    if empty:
        raise UserError(f"{option}={path} has only blank lines. {form}")


def read_object(text: str, where: str, form: str) -> dict[str, Any]:
    """The JSON object of a line, its texts cleaned. Raises UserError: it is none."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON ({str(e)[:100]}). {form}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__} and not an object. {form}")
    return clean(value)


def unread_keys(
    row: dict[str, Any], where: str, reads: Set[str], options: dict[str, str], results: Set[str]
) -> set[str]:
    """The keys of a row that nothing reads: they come back with its result.

    Args:
      reads: keys that act.
      options: {key: what does the same here} of keys that look as if they acted.
      results: keys of the result.

    Raises:
      UserError: a key is of `options` or `results`.
    """
    for key in row.keys() - reads:
        if key in options:
            raise UserError(f"{where} has the key {key!r}, which is not read here. {options[key]}")
        if key in results:
            raise UserError(f"{where} has the key {key!r}, which the result has too. Rename it.")
    return row.keys() - reads


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
