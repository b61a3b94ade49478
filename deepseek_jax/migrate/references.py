"""`${...}` as OmegaConf has it, by a small resolver of our own.

References, absolute and relative; oc.env, oc.select, oc.decode; multiply, sum and the like, which NeMo
registers. Nothing is evaluated but these, and not more of them than a recipe needs.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.reading import MOST, scalar
from deepseek_jax.migrate.source import Entry, Source

REFERENCE = re.compile(r"\$\{([^${}]*)\}")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|AUTH", re.IGNORECASE)
DEEPEST = 20
LONGEST = 1 << 16  # characters of a value

ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "multiply": lambda *a: math.prod(a),
    "mul": lambda *a: math.prod(a),
    "sum": lambda *a: sum(a),
    "add": lambda *a: sum(a),
    "sub": lambda a, b: a - b,
    "subtract": lambda a, b: a - b,
    "divide": lambda a, b: a / b,
    "div": lambda a, b: a / b,
    "int_div": lambda a, b: a // b,
    "divide_floor": lambda a, b: a // b,
    "divide_ceil": lambda a, b: -(-a // b),
    "not": lambda a: not a,
}


class Unresolved(Exception):
    """A reference that cannot be followed, and why."""


def resolved(source: Source, environ: Mapping[str, str]) -> Source:
    """A source with every `${...}` that can be followed replaced by its value.

    What cannot be followed stays as it is: its handler, or the check of its value, says so.

    Args:
      source: as it was read.
      environ: for ${oc.env:NAME}; names that look like secrets are not read.

    Raises:
      UserError: the references multiply to more than a recipe can mean.
    """
    if not any("${" in str(e.value) for e in source.entries):
        return source
    to = _References(source, environ)
    entries = tuple(new for entry in source.entries for new in to.replaced(entry))
    return Source(source.name, entries, source.form, source.duplicates, source.files)


class _References:
    """What references of one source mean."""

    def __init__(self, source: Source, environ: Mapping[str, str]):
        self._name = source.name
        self._values = {e.key: e.value for e in source.entries}
        self._environ = environ
        self._left = MOST  # references and items that may still be followed
        self._below: dict[str, list[str]] = {}  # section -> its keys
        for key in self._values:
            section = key.rpartition(".")[0]
            while section:
                self._below.setdefault(section, []).append(key)
                section = section.rpartition(".")[0]

    def replaced(self, entry: Entry) -> Iterator[Entry]:
        """An entry with its value; of a reference to a section its keys, here as well."""
        whole = _whole(entry)
        if not whole or whole in self._values or whole not in self._below:
            yield Entry(entry.key, self._value(entry.value, entry.key), entry.where, entry.rank)
            return
        for key in self._below[whole]:
            self._spend(1)
            full = entry.key + key.removeprefix(whole)
            yield Entry(full, self._value(self._values[key], full), entry.where, entry.rank)

    def _value(self, value: Any, key: str) -> Any:
        try:
            return self._follow(value, key, 0)
        except (Unresolved, TypeError, ValueError, ArithmeticError):
            return value

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise UserError(
                f"{self._name}: its references lead to more than {MOST} values. Write the values there."
            )

    def _follow(self, value: Any, key: str, depth: int) -> Any:
        """The value of what may have references in it.

        Raises:
          Unresolved: one leads nowhere, or in a circle.
        """
        if depth > DEEPEST:
            raise Unresolved("in a circle")
        if isinstance(value, list):
            self._spend(len(value))
            return [self._follow(v, key, depth + 1) for v in value]
        while isinstance(value, str) and (found := REFERENCE.search(value)):
            self._spend(1)
            new = self._one(found[1].strip(), key, depth)
            if found[0] == value.strip():
                return self._follow(new, key, depth + 1)
            value = value[: found.start()] + str(new) + value[found.end() :]
            depth += 1
            if depth > DEEPEST:
                raise Unresolved("in a circle")
            if len(value) > LONGEST:
                raise Unresolved("too long")
        return value

    def _one(self, inside: str, key: str, depth: int) -> Any:
        """What one `${...}` stands for."""
        name, colon, rest = inside.partition(":")
        if not colon:
            full = self._known(_absolute(name, key))
            if full not in self._values:
                raise Unresolved(full)
            return self._follow(self._values[full], full, depth + 1)
        arguments = [a.strip().strip("'\"") for a in rest.split(",")] if rest else []
        if name in ("oc.env", "env") and arguments:
            if arguments[0] in self._environ and not SECRET.search(arguments[0]):
                return scalar(self._environ[arguments[0]])
            if len(arguments) > 1:
                return scalar(arguments[1])
        elif name == "oc.select" and arguments:
            full = _absolute(arguments[0], key)
            if full in self._values:
                return self._follow(self._values[full], full, depth + 1)
            return scalar(arguments[1]) if len(arguments) > 1 else None
        elif name == "oc.decode" and arguments:
            return scalar(arguments[0])
        elif name in ARITHMETIC:
            return _calculated(name, [scalar(a) for a in arguments])
        raise Unresolved(inside)

    def _known(self, name: str) -> str:
        """The key that a reference means. A file of a config group (NeMo's launcher: training/mixtral.yaml)
        names its own keys from the root of the whole: training.model.seq_length.
        """
        if name not in self._values:
            group, _, rest = name.partition(".")
            if rest in self._values and group not in self._below:
                return rest
        return name


def _calculated(name: str, numbers: list[Any]) -> Any:
    """Of numbers alone: a text times a number would be so many of it."""
    if not all(isinstance(n, (int, float)) for n in numbers):
        raise Unresolved(name)
    out = ARITHMETIC[name](*numbers)
    if isinstance(out, int) and out.bit_length() > 1000:
        raise Unresolved("too large")
    return out


def _whole(entry: Entry) -> str | None:
    """The absolute key of a value that is one reference and nothing else."""
    if not isinstance(entry.value, str):
        return None
    found = REFERENCE.fullmatch(entry.value.strip())
    return _absolute(found[1], entry.key) if found and ":" not in found[1] else None


def _absolute(name: str, key: str) -> str:
    """A reference from the root: `${.x}` is beside `key`, `${..x}` one section up."""
    up = len(name) - len(name.lstrip("."))
    if not up:
        return name
    parts = key.split(".")[:-up]
    return ".".join([*parts, name.lstrip(".")])
