"""What is known about another trainer: how its files look, what its keys mean, what it does unasked."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Rank, Source

Handler = Callable[[Migration, Entry], None]


def unchanged(key: str) -> str:
    """The canonical key of a tool that has one spelling for each."""
    return key


def nothing(m: Migration) -> None:
    """Of a tool that does nothing unasked."""


@dataclass(frozen=True)
class Tool:
    """A trainer, in one version of its words.

    `table` is looked up by the canonical key: an exact one first, then the longest pattern that matches
    (fnmatch: `*` also matches dots).
    """

    name: str  # as --from has it: "hf5"
    title: str  # for people: "transformers 5"
    # 0: not its file; the highest of all takes it. 100: no doubt
    recognise: Callable[[Source], int]
    table: Mapping[str, Handler]
    family: str = ""  # tools of which only the version differs: hf4 and hf5 are "hf"; "": its name
    # a key as the table has it: without prefix, dashes, sections
    key: Callable[[str], str] = unchanged
    # After all entries: defaults (`m.default`), and what follows from several keys together.
    finish: Callable[[Migration], None] = nothing
    # A file beside a recipe (Accelerate, DeepSpeed, a launcher): it does not say what is trained.
    companion: bool = False
    rank: Rank | None = None  # of the entries of its files, in place of RECIPE

    @property
    def kin(self) -> str:
        """Its family."""
        return self.family or self.name

    def handler(self, key: str) -> Handler | None:
        """Of a canonical key; None: unknown."""
        if found := self.table.get(key):
            return found
        patterns = [p for p in self.table if "*" in p and fnmatch.fnmatchcase(key, p)]
        return self.table[max(patterns, key=len)] if patterns else None
