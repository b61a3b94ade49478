"""One migration under way: what was told, what each entry became, the options that follow."""

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.config.options import OPTIONS
from deepseek_jax.migrate.facts import COUNTS, FACTS
from deepseek_jax.migrate.source import Entry, Rank, Source

MOST = 1 << 30  # of what is counted: sequences of a step, devices
# A variable or a reference that nothing has filled in, and where one cannot stay.
OPEN = re.compile(r"\$\{|\$\w")
NAMES = {
    "workdir": "--workdir",
    "log.run_name": "config.log.run_name",
    "log.project": "config.log.project",
}
PATHS = ("data.path", "init_from", "distill.teacher", "data.tokenizer")
AUTO = "auto"  # of DeepSpeed: the value that others tell


@dataclass(frozen=True)
class Told:
    """A fact, or an option, and who says so."""

    name: str
    value: Any
    entry: Entry | None  # None: a default
    rank: Rank
    tool: str  # its title

    @property
    def origin(self) -> str:
        """For comments: "recipe.yaml:12 learning_rate=5e-05"; "transformers 5 by default"."""
        if self.entry is None:
            return f"{self.tool} by default"
        return self.entry.label


@dataclass(frozen=True)
class Setting:
    """An option of ours in the new config."""

    value: Any
    because: tuple[Told, ...]
    how: str = ""  # the arithmetic: "2 per device x 8 micro-batches x 8 devices"


@dataclass
class Verdict:
    """What became of an entry that did not become an option."""

    refused: bool
    why: str
    repair: str = ""


@dataclass
class Reading:
    """A source, beside the tool that reads it."""

    source: Source
    title: str  # of the tool
    kin: str  # its family: flags and recipe are of one
    key: Callable[[str], str]  # canonical keys


@dataclass
class Migration:
    """What handlers, defaults and arithmetic write to.

    Attributes:
      devices: GPUs in all, of --devices; None: as the sources say.
      recipe: whether a source says what is trained (a tool that is no companion).
      gpus_per_node: of --gpus_per_node; None: as the sources say, else 8 at most.
      match_tokens: keep tokens per step, and not sequences (--match=tokens).
      mean_length: tokens of an example on average, of --mean_length.
      rows: examples of the data, of --rows.
      settings: the options of the new config.
      flags: of the launch command, beside them: "--workdir".
      downloads: folder -> the words of the command that fills it from the hub.
    """

    devices: int | None = None
    gpus_per_node: int | None = None
    match_tokens: bool = False
    mean_length: float | None = None
    rows: int | None = None
    recipe: bool = True
    readings: list[Reading] = field(default_factory=list)
    told: dict[str, list[Told]] = field(default_factory=dict)
    verdicts: dict[Entry, Verdict] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)
    flags: dict[str, Setting] = field(default_factory=dict)
    downloads: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    absent: list[Entry] = field(default_factory=list)  # refused though no source has them
    _at: Reading | None = None  # whose entries are read now
    _settled: dict[str, tuple[Told, ...]] = field(default_factory=dict)
    _lost: dict[Entry, str] = field(default_factory=dict)
    _dropped: set[str] = field(default_factory=set)

    # ---- what handlers call

    def tell(self, entry: Entry, name: str, value: Any, rank: Rank | None = None) -> None:
        """An entry says a fact, or an option of ours. It may say several.

        Args:
          name: a key of FACTS, or an option's full name: "optimizer.b1".
          rank: in place of the entry's own.
        """
        if name in COUNTS and not 1 <= value <= MOST:
            self.refuse(entry, f"it is not between 1 and {MOST}", "Correct it there")
            return
        if isinstance(value, str) and OPEN.search(value):
            if name in NAMES:
                ours = NAMES[name]
                self.no_effect(entry, f"it has a variable that is not known here: {ours} sets it")
                return
            if name in PATHS:
                self.note(
                    f"To be given: config.{name}: {entry.text} has a variable that is not known here."
                )
        self._tell(name, value, entry, entry.rank if rank is None else rank)

    def tell_auto(self, entry: Entry, name: str) -> None:
        """An entry takes the value that a recipe tells; without one it is refused."""
        if not self.recipe:
            self.refuse(
                entry, "auto is what the recipe says, and there is none", "Give the recipe as well"
            )
        self._tell(name, AUTO, entry, entry.rank)

    def default(self, name: str, value: Any, rank: Rank = Rank.DEFAULT) -> None:
        """What the tool does where its files are silent: of the lowest rank, if not said otherwise."""
        self._tell(name, value, None, rank)

    def no_effect(self, entry: Entry, why: str) -> None:
        """An entry that changes nothing here, and why: "every device reads its own shards"."""
        self.verdicts.setdefault(entry, Verdict(False, why))

    def refuse(self, entry: Entry, why: str, repair: str = "") -> None:
        """Without what this entry asks for, training would not be theirs.

        Args:
          why: "there is no dropout here".
          repair: what else can be done: "Set it to 0".
        """
        self.verdicts[entry] = Verdict(True, why, repair)

    def refuse_absent(self, key: str, value: str, why: str, repair: str = "") -> None:
        """Refuses what the tool does where its files are silent. --allow=KEY counts here, too.

        Args:
          key: what would have to be set.
          value: what silence means: "LayerNorm".
        """
        title = self._at.title if self._at else ""
        entry = Entry(key, value, f"{title} by default", Rank.DEFAULT)
        self.absent.append(entry)
        self.refuse(entry, why, repair)

    def note(self, text: str) -> None:
        """A sentence below the lists: what differs though every key has its place."""
        if text not in self.notes:
            self.notes.append(text)

    def value(self, key: str, default: Any = None) -> Any:
        """What the sources of the tool at work set a canonical key to; flags win."""
        found = self.entry(key)
        return default if found is None else found.value

    def entry(self, key: str, kin: str | None = None) -> Entry | None:
        """The entry of a canonical key in the sources of the tool at work.

        Args:
          kin: of another family of tools: "hf", "accelerate", "deepspeed".
        """
        if kin is None:
            kin = self._at.kin if self._at else ""
        found = [
            e
            for r in self.readings
            if r.kin == kin
            for e in r.source.entries
            if r.key(e.key) == key
        ]
        return max(found, key=lambda e: e.rank, default=None)

    def told_of(self, name: str) -> Any:
        """The value of a fact so far, of the highest rank; None: nobody said so, or auto alone."""
        told = [t for t in self.told.get(name, ()) if t.value != AUTO]
        best = max(told, key=lambda t: t.rank, default=None)
        return None if best is None else best.value

    # ---- what arithmetic calls, after `settle`

    def fact(self, name: str, default: Any = None) -> Any:
        """The value of a fact or option that was told; `default`: nobody did."""
        known = self._settled.get(name)
        return known[0].value if known else default

    def said(self, name: str) -> bool:
        """Whether a source said a fact, and not a default only."""
        return any(t.entry for t in self._settled.get(name, ()))

    def set(self, option: str, value: Any, *names: str, how: str = "") -> None:
        """Sets an option of ours.

        Args:
          option: "train.batch_size".
          names: of the facts that it follows from.
          how: the arithmetic, for the comment.
        """
        because = tuple(t for name in names for t in self._settled.get(name, ()))
        if option not in OPTIONS:
            for told in because:
                if told.entry:
                    self.refuse(told.entry, f"it needs config.{option}, which this version lacks")
            return
        if option in self._dropped:
            return
        kind = OPTIONS[option].type
        value = float(value) if kind is float and isinstance(value, int) else value
        self.settings[option] = Setting(value, because, how)

    def set_flag(self, flag: str, value: Any, *names: str) -> None:
        """Sets a flag of train.py's command line, as `set` does an option."""
        because = tuple(t for name in names for t in self._settled.get(name, ()))
        self.flags[flag] = Setting(value, because)

    def drop(self, option: str, why: str) -> None:
        """Takes an option out of the new config: nothing there reads it."""
        self.settings.pop(option, None)
        self._dropped.add(option)
        self.without_effect(option, why)

    def refuse_fact(self, name: str, why: str, repair: str = "") -> None:
        """Refuses the entries that told a fact; of a default a note says so."""
        for told in self._settled.get(name, ()):
            if told.entry:
                self.refuse(told.entry, why, repair)
            else:
                self.note(f"{told.origin}: {why}. {repair}".strip())

    def without_effect(self, name: str, why: str) -> None:
        """Of the entries that told a fact."""
        for told in self._settled.get(name, ()):
            if told.entry:
                self.no_effect(told.entry, why)

    # ---- the engine's side

    def begin(self, reading: Reading) -> None:
        """The entries that follow are of this source."""
        self._at = reading

    def settle(self) -> None:
        """Decides each fact: the highest rank wins, and two of the same rank that differ are refused."""
        for name, all_told in self.told.items():
            told = [t for t in all_told if not (t.entry and self._is_refused(t.entry))]
            takers = [t for t in told if t.value == AUTO]
            told = [t for t in told if t.value != AUTO]
            if not told:
                self._refuse_auto(name, takers)
                continue
            best = max(t.rank for t in told)
            top = [t for t in told if t.rank == best]
            if best != Rank.DEFAULT and any(t.value != top[0].value for t in top):
                self._refuse_different(name, top)
                continue
            agreeing = [t for t in told if t.value == top[0].value and t.rank != Rank.DEFAULT]
            winners = [*top, *(t for t in agreeing if t not in top)] if best else top[-1:]
            self._settled[name] = (*winners, *takers)
            for lower in told:
                if lower.entry and lower.value != top[0].value:
                    self._lost[lower.entry] = f"{top[0].origin} wins"

    def set_told_options(self) -> None:
        """Options that were told as they are, where no arithmetic has set them."""
        for name in self._settled:
            if "." in name or name in OPTIONS:
                if name not in self.settings:
                    self.set(name, self.fact(name), name)

    def became(self, entry: Entry) -> dict[str, Setting]:
        """The options that follow from an entry."""
        return {
            name: setting
            for name, setting in (*self.settings.items(), *self.flags.items())
            if any(t.entry is entry for t in setting.because)
        }

    def verdict(self, entry: Entry) -> Verdict | None:
        """Of an entry; None: it became what `became` says."""
        if self._is_refused(entry):
            return self.verdicts[entry]
        if self.became(entry):
            return None
        if entry in self.verdicts:
            return self.verdicts[entry]
        if entry in self._lost:
            return Verdict(False, self._lost[entry])
        if any(t.entry is entry for all_told in self.told.values() for t in all_told):
            return Verdict(False, "nothing in this run reads it")
        return Verdict(True, "no table knows this key", "It may be misspelt, or of another version")

    def canonical(self, entry: Entry) -> str:
        """The key of an entry as its tool's table has it."""
        for reading in self.readings:
            if any(e is entry for e in reading.source.all_keys()):
                return reading.key(entry.key)
        return entry.key

    def allowed(self, entry: Entry, allow: Iterable[str]) -> bool:
        """Whether a pattern of --allow names an entry: its key, its canonical key, or the last part."""
        names = {entry.key, self.canonical(entry), entry.key.rpartition(".")[2]}
        return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in allow)

    def _is_refused(self, entry: Entry) -> bool:
        return entry in self.verdicts and self.verdicts[entry].refused

    def _refuse_auto(self, name: str, takers: list[Told]) -> None:
        for told in takers:
            if told.entry:
                self.refuse(
                    told.entry,
                    f"auto is what the recipe says ({name}), and none says it",
                    "Give the recipe beside this file",
                )

    def _refuse_different(self, name: str, top: list[Told]) -> None:
        first = top[0]
        for told in top[1:]:
            if told.value != first.value and told.entry:
                self.refuse(
                    told.entry, f"it differs from {first.origin}", "Write the same value in both"
                )

    def _tell(self, name: str, value: Any, entry: Entry | None, rank: Rank) -> None:
        if "." not in name and name not in FACTS and name not in OPTIONS:
            raise LookupError(f"{name} is no fact and no option")
        tool = self._at.title if self._at else ""
        self.told.setdefault(name, []).append(Told(name, value, entry, rank, tool))
