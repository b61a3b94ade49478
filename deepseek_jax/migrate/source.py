"""What is migrated: files and flags, as dotted keys with their values and places."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.cli.texts import printable


class Rank(enum.IntEnum):
    """Who wins where several say the same."""

    DEFAULT = 0  # of the tool, where its files are silent
    LAUNCHER = 1  # Accelerate's file
    LAUNCHER_FLAG = 2  # of accelerate launch
    RECIPE = 3
    FLAG = 4
    ABOVE = 5  # wins over all: the scheduler and optimizer of a DeepSpeed file


@dataclass(frozen=True, eq=False)
class Entry:
    """One key of a source. Lists of plain values, empty lists and empty mappings are one value; other lists
    count their items: "datasets.0.path". Two entries are never equal.
    """

    key: str  # with its path: "fsdp_config.fsdp_offload_params"; of a flag without dashes
    value: Any
    where: str  # "recipe.yaml:12"; "--learning_rate"
    rank: Rank = Rank.RECIPE

    @property
    def text(self) -> str:
        """As it is quoted in messages: "learning_rate=5e-05"."""
        return f"{shown(self.key)}={self._value}"

    @property
    def label(self) -> str:
        """Where it stands, and what: "recipe.yaml:12 learning_rate=5e-05"; "--learning_rate=5e-05"."""
        if self.rank in (Rank.FLAG, Rank.LAUNCHER_FLAG):
            return f"{shown(self.where)}={self._value}"
        return f"{shown(self.where)} {self.text}"

    @property
    def _value(self) -> str:
        value = shown(str(self.value)[:1000])
        return f"{value[:57]}..." if len(value) > 60 else value


def shown(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return printable(" ".join(text.split()))


@dataclass(frozen=True)
class Source:
    """A file, or what a command line sets."""

    name: str  # of the file as it was given; "torchrun", "the command"
    entries: tuple[Entry, ...]
    form: str = "yaml"  # yaml, json; flags: of a script; launcher: of what started it
    # an entry that the same file sets again, and the one that wins
    duplicates: tuple[tuple[Entry, Entry], ...] = ()
    # files that it is made of, or names as its own: recipes that a flag named
    files: tuple[str, ...] = field(default=())

    def keys(self) -> Iterator[str]:
        """The dotted keys."""
        return (e.key for e in self.entries)

    def value(self, key: str, default: Any = None) -> Any:
        """Of a dotted key."""
        return next((e.value for e in self.entries if e.key == key), default)

    def has(self, *keys: str) -> int:
        """How many of these dotted keys, or of sections so named, there are."""
        return sum(any(k == key or k.startswith(f"{key}.") for k in self.keys()) for key in keys)

    def all_keys(self) -> tuple[Entry, ...]:
        """Every entry that must be accounted for, those that were set again among them."""
        return (*self.entries, *(earlier for earlier, _ in self.duplicates))
