"""`${...}` and `defaults:` as OmegaConf and Hydra have them, by a small resolver of our own.

References, absolute and relative; oc.env, oc.select, oc.decode; multiply, sum and the like, which NeMo
registers. Config groups are read from the folder of the file.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.reading import read_file, scalar
from deepseek_jax.migrate.source import Entry, Source

REFERENCE = re.compile(r"\$\{([^${}]*)\}")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY", re.IGNORECASE)
DEEPEST = 20

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
    """
    if not any(isinstance(e.value, str) and "${" in e.value for e in source.entries):
        return source
    values = {e.key: e.value for e in source.entries}
    out: list[Entry] = []
    for entry in source.entries:
        whole = _whole(entry)
        below = [k for k in values if whole and k.startswith(f"{whole}.")]
        if below and whole not in values:  # a reference to a section: its keys, here as well
            for key in below:
                full = entry.key + key.removeprefix(whole or "")
                out.append(
                    _value(Entry(full, values[key], entry.where, entry.rank), values, environ)
                )
        else:
            out.append(_value(entry, values, environ))
    return Source(source.name, tuple(out), source.form, source.duplicates, source.files)


def composed(source: Source, folder: str) -> Source:
    """A file with the config groups of its `defaults:` list, which lie in folders beside it.

    Args:
      source: as it was read.
      folder: of its file.

    Raises:
      UserError: a file of the list is not there.
    """
    chosen = _defaults(source)
    if not chosen:
        return source
    layers: list[tuple[Entry, ...]] = []
    files: list[str] = []
    own = tuple(e for e in source.entries if not _of_defaults(e))
    listed = tuple(e for e in source.entries if _of_defaults(e))
    after_self = False
    for group, name in chosen:
        if (group, name) == ("", "_self_"):
            layers.append(own)
            after_self = True
            continue
        path, prefix = _place(group, name)
        file = _find(folder, path, source, group)
        if file is None:
            continue
        files.append(file)
        found = read_file(file)
        layers.append(tuple(Entry(prefix + e.key, e.value, e.where, e.rank) for e in found.entries))
    if not after_self:
        layers.append(own)
    winners: dict[str, Entry] = {}
    duplicates = list(source.duplicates)
    for layer in layers:
        for entry in layer:
            if entry.key in winners:
                duplicates.append((winners[entry.key], entry))
            winners[entry.key] = entry
    return Source(
        source.name, (*listed, *winners.values()), source.form, tuple(duplicates), tuple(files)
    )


def _of_defaults(entry: Entry) -> bool:
    return entry.key == "defaults" or entry.key.startswith("defaults.")


def _defaults(source: Source) -> list[tuple[str, str]]:
    """(group, name) of each of the list that is a file; those of Hydra's own are left out."""
    out = []
    for entry in source.entries:
        if entry.key == "defaults" and isinstance(entry.value, list):
            out += [("", str(v)) for v in entry.value]
        elif re.fullmatch(r"defaults\.\d+", entry.key):
            out.append(("", str(entry.value)))
        elif found := re.fullmatch(r"defaults\.\d+\.(.+)", entry.key):
            if entry.value is not None:
                out.append((found[1], str(entry.value)))
    own = ("hydra/", "override hydra/", "override /hydra/", "/hydra/")
    return [(g, n) for g, n in out if not g.startswith(own)]


def _place(group: str, name: str) -> tuple[str, str]:
    """Path of a group's file without its ending, and the prefix of its keys: "@here:" changes that."""
    for word in ("override ", "optional "):
        group, name = group.removeprefix(word), name.removeprefix(word)
    group, _, package = group.partition("@")
    if not group:
        name, _, package = name.partition("@")
    path = os.path.join(group.strip("/"), name.strip("/")) if group else name.strip("/")
    section = package or os.path.dirname(path).replace(os.sep, ".").replace("/", ".")
    return path, f"{section}." if section not in ("", "_global_") else ""


def _find(folder: str, path: str, source: Source, group: str) -> str | None:
    inside = os.path.realpath(folder)
    for ending in (".yaml", ".yml"):
        file = os.path.join(folder, path + ending)
        if os.path.isfile(file) and os.path.realpath(file).startswith(inside + os.sep):
            return file
    if group.startswith("optional "):
        return None
    raise UserError(
        f"{source.name}: its defaults name {path}.yaml, which is not in {folder}. Put it there, or take the "
        f"line out of defaults."
    )


def _whole(entry: Entry) -> str | None:
    """The absolute key of a value that is one reference and nothing else."""
    if not isinstance(entry.value, str):
        return None
    found = REFERENCE.fullmatch(entry.value.strip())
    return _absolute(found[1], entry.key) if found and ":" not in found[1] else None


def _known(name: str, values: Mapping[str, Any]) -> str:
    """The key that a reference means. A file of a config group (NeMo's launcher: training/mixtral.yaml) names
    its own keys from the root of the whole: training.model.seq_length.
    """
    if name not in values:
        group, _, rest = name.partition(".")
        if rest in values and not any(k.startswith(f"{group}.") for k in values):
            return rest
    return name


def _absolute(name: str, key: str) -> str:
    """A reference from the root: `${.x}` is beside `key`, `${..x}` one section up."""
    up = len(name) - len(name.lstrip("."))
    if not up:
        return name
    parts = key.split(".")[:-up]
    return ".".join([*parts, name.lstrip(".")])


def _value(entry: Entry, values: Mapping[str, Any], environ: Mapping[str, str]) -> Entry:
    try:
        value = _follow(entry.value, entry.key, values, environ, 0)
    except (Unresolved, TypeError, ValueError, ZeroDivisionError):
        return entry
    return Entry(entry.key, value, entry.where, entry.rank) if value is not entry.value else entry


def _follow(
    value: Any, key: str, values: Mapping[str, Any], environ: Mapping[str, str], depth: int
) -> Any:
    """The value of what may have references in it.

    Raises:
      Unresolved: one leads nowhere, or in a circle.
    """
    if depth > DEEPEST:
        raise Unresolved("in a circle")
    if isinstance(value, list):
        return [_follow(v, key, values, environ, depth + 1) for v in value]
    while isinstance(value, str) and (found := REFERENCE.search(value)):
        new = _one(found[1].strip(), key, values, environ, depth)
        if found[0] == value.strip():
            return _follow(new, key, values, environ, depth + 1)
        value = value[: found.start()] + str(new) + value[found.end() :]
        depth += 1
        if depth > DEEPEST:
            raise Unresolved("in a circle")
    return value


def _one(
    inside: str, key: str, values: Mapping[str, Any], environ: Mapping[str, str], depth: int
) -> Any:
    """What one `${...}` stands for."""
    name, colon, rest = inside.partition(":")
    if not colon:
        full = _known(_absolute(name, key), values)
        if full not in values:
            raise Unresolved(full)
        return _follow(values[full], full, values, environ, depth + 1)
    arguments = [a.strip().strip("'\"") for a in rest.split(",")] if rest else []
    if name in ("oc.env", "env") and arguments:
        if arguments[0] in environ and not SECRET.search(arguments[0]):
            return scalar(environ[arguments[0]])
        if len(arguments) > 1:
            return scalar(arguments[1])
    elif name == "oc.select" and arguments:
        full = _absolute(arguments[0], key)
        if full in values:
            return _follow(values[full], full, values, environ, depth + 1)
        return scalar(arguments[1]) if len(arguments) > 1 else None
    elif name == "oc.decode" and arguments:
        return scalar(arguments[0])
    elif name in ARITHMETIC:
        return ARITHMETIC[name](*(scalar(a) for a in arguments))
    raise Unresolved(inside)
