"""Hydra's `defaults:` list: config groups, read from the folder of the file."""

import os
import re

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.reading import read_file
from deepseek_jax.migrate.source import Entry, Source

MOST_FILES = 200


def composed(path: str, name: str) -> Source:
    """A file with the config groups of its `defaults:` list, which lie in folders beside it, and theirs.

    Args:
      path: of the file.
      name: what it is called in messages.

    Raises:
      UserError: it, or a file of a list, cannot be read or is not there; or the lists lead in a circle.
    """
    return _Composition(os.path.dirname(path) or ".").of(path, name)


class _Composition:
    """The files of one recipe. `root`: the folder from which groups with a slash before them are named."""

    def __init__(self, root: str):
        self._root = root
        self._open: list[str] = []  # the files that lead to the one that is read now
        self._read = 0

    def of(self, path: str, name: str = "") -> Source:
        real = os.path.realpath(path)
        if real in self._open:
            circle = " -> ".join(os.path.basename(p) for p in (*self._open, real))
            raise UserError(f"defaults lead in a circle: {circle}. Take one of them out.")
        self._read += 1
        if self._read > MOST_FILES:
            raise UserError(
                f"{self._open[0]}: its defaults name more than {MOST_FILES} files. Give one file of all keys."
            )
        self._open.append(real)
        source = self._with_groups(read_file(path, name), os.path.dirname(path) or ".")
        self._open.pop()
        return source

    def _with_groups(self, source: Source, folder: str) -> Source:
        chosen = _defaults(source)
        if not chosen:
            return source
        own = tuple(e for e in source.entries if not _of_defaults(e))
        listed = tuple(e for e in source.entries if _of_defaults(e))
        layers: list[tuple[Entry, ...]] = []
        duplicates = list(source.duplicates)
        files: list[str] = []
        after_self = False
        for group, name in chosen:
            if (group, name) == ("", "_self_"):
                layers.append(own)
                after_self = True
                continue
            path, prefix = _place(group, name)
            top = self._root if (group or name).startswith("/") else folder
            file = _find(top, path, source, (group or name).startswith("optional "))
            if file is None:
                continue
            found = self.of(file)
            files += [file, *found.files]
            listed += tuple(e for e in found.entries if _of_defaults(e))
            duplicates += found.duplicates
            layers.append(
                tuple(
                    Entry(prefix + e.key, e.value, e.where, e.rank)
                    for e in found.entries
                    if not _of_defaults(e)
                )
            )
        if not after_self:
            layers.append(own)
        winners: dict[str, Entry] = {}
        for entry in (e for layer in layers for e in layer):
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


def _find(folder: str, path: str, source: Source, optional: bool) -> str | None:
    inside = os.path.realpath(folder)
    for ending in (".yaml", ".yml"):
        file = os.path.join(folder, path + ending)
        if os.path.isfile(file) and os.path.realpath(file).startswith(inside + os.sep):
            return file
    if optional:
        return None
    raise UserError(
        f"{source.name}: its defaults name {path}.yaml, which is not in {folder}. Put it there, or take the "
        f"line out of defaults."
    )
