"""What an option knows about itself: the metadata of a dataclass field, and the record that is read back.

    steps: int = option(1000, "Optimizer steps.", unit="steps", at_least=1, aliases={"hf": "max_steps"})

The sections (sections/) are written with `option`; `options.of("train.steps")` gives the `Option`.
Validation, --help, docs/words.md, and the hints in messages read the records, so that each fact about an
option stands in one place.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError

# PyTorch's FSDP and DDP; NeMo and Megatron; Hugging Face's Trainer, Accelerate and models; the files of
# github.com/LawrenceRLiu/MoE_Factorize_Compress, whose guide many distil by
SYSTEMS = {
    "fsdp": "PyTorch",
    "deepspeed": "DeepSpeed",
    "nemo": "NeMo",
    "hf": "Hugging Face",
    "mfc": "MoE_Factorize_Compress",
}
NAMES = "NAME,..."  # at the end of a choice: any of `Option.names`, separated by commas
_KEY = "option"  # of a field's metadata
Words = str | Sequence[str]  # one, or several


@dataclass(frozen=True)
class Alias:
    """What other tools call an option, or one value of it: a row of docs/words.md.

    A word is a key as it is written there, with its path and value where those are needed:
    "gradient_accumulation_steps", "zero_optimization.stage: 3", "FULL_SHARD".
    """

    value: Any = None  # our value that the words stand for; None: the value carries over
    fsdp: Words = ()
    deepspeed: Words = ()
    nemo: Words = ()
    hf: Words = ()
    mfc: Words = ()
    also: Mapping[str, Any] = field(default_factory=dict)  # other options to set: {"mesh.data": 2}
    note: str = ""  # what differs, as the end of a sentence

    def words(self) -> Iterator[tuple[str, str]]:
        """(key of SYSTEMS, word) of each."""
        for system in SYSTEMS:
            words = getattr(self, system)
            for word in (words,) if isinstance(words, str) else words:
                yield system, word


class Word(NamedTuple):
    """Words of other tools that no option here stands for: a row of docs/words.md, too."""

    theirs: tuple[str, ...]
    here: str  # what to do instead
    keys: tuple[str, ...] = ()  # further spellings that a user may type as an option


@dataclass(frozen=True)
class Option:
    """One option with all that is known about it."""

    name: str  # "train.steps"
    type: type  # int, float, bool or str
    default: Any
    help: str  # a sentence
    unit: str = ""  # "tokens"
    optional: bool = False  # may be None; on a command line 0 and None both mean that
    choices: Mapping[str, str] = field(default_factory=dict)  # value -> what it does
    synonyms: Mapping[str, str] = field(default_factory=dict)  # another spelling -> the choice
    any_case: bool = False  # FULL_SHARD is full_shard
    names: tuple[str, ...] = ()  # what NAME may be in the choices that end in NAME,...
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    special: Mapping[float, str] = field(default_factory=dict)  # allowed, too: {-1: "what is left"}
    example: Any = None  # a value that a message proposes
    changes_shapes: bool | None = None  # of the model's arrays; None: not an option of the model
    # another value when a run goes on: "free", "refused", "new pass" (data.on_change=new_pass); "": not known
    on_resume: str = ""
    path: bool = False  # names a file or folder; its choices are words that name none
    several: bool = False  # several paths, separated by commas
    or_text: bool = False  # what has { or a line break is no path, but what its file would hold
    json: bool = False  # a config file may write lists and dicts: they become JSON text
    aliases: tuple[Alias, ...] = ()

    @property
    def full_name(self) -> str:
        """As it is written on a command line and in messages."""
        return f"config.{self.name}"

    def check(self, value: Any) -> None:
        """Checks a value of the right type.

        Raises:
          UserError: it is no choice, or out of range.
        """
        if isinstance(value, str):
            self._check_choice(value)
        elif value is not None and not isinstance(value, bool):
            self._check_range(value)

    @property
    def takes_bools(self) -> bool:
        """Whether True and False are choices, beside words such as auto."""
        return self.any_case and {"true", "false"} <= self.choices.keys()

    def is_text(self, value: str) -> bool:
        """Whether a value is what a file would hold, and not its path."""
        return self.or_text and ("{" in value or "\n" in value)

    def limits(self) -> str:
        """The range in words, "" without one: "1 or more", "above 0 and below 1"."""
        if self.at_least is not None and self.at_most is not None:
            return f"{number(self.at_least)} up to {number(self.at_most)}"
        parts = []
        if self.above is not None:
            parts.append(f"above {number(self.above)}")
        if self.at_least is not None:
            parts.append(f"{number(self.at_least)} or more")
        if self.below is not None:
            parts.append(f"below {number(self.below)}")
        if self.at_most is not None:
            parts.append(f"at most {number(self.at_most)}")
        return " and ".join(parts)

    def _check_range(self, value: float) -> None:
        if value in self.special:
            return
        why = ""
        if not math.isfinite(value):
            why = "not a finite number"
        elif self.at_least is not None and value < self.at_least:
            why = f"below {number(self.at_least)}"
        elif self.above is not None and value <= self.above:
            why = f"not above {number(self.above)}"
        elif self.at_most is not None and value > self.at_most:
            why = f"above {number(self.at_most)}"
        elif self.below is not None and value >= self.below:
            why = f"not below {number(self.below)}"
        if why:
            raise UserError(f"{self.full_name}={value} is {why}. {self._repair()}")

    def _repair(self) -> str:
        """ "Set it to 1 or more." """
        limits = self.limits()
        if not limits or limits.startswith("above"):
            limits = f"a number {limits}".rstrip()
        example = f", for instance {self.example}" if self.example is not None else ""
        return f"Set it to {', '.join((limits, *self._specials()))}{example}."

    def _specials(self) -> list[str]:
        """The special values that the range does not hold, for messages."""
        outside = [
            n
            for n in self.special
            if (self.at_least is not None and n < self.at_least)
            or (self.above is not None and n <= self.above)
        ]
        return [f"or to {number(n)} ({self.special[n]})" for n in outside]

    def _check_choice(self, value: str) -> None:
        if not self.choices or self.path:
            return
        text = value.lower() if self.any_case else value
        if text in self.choices or text in self.synonyms:
            return
        for choice in self.choices:
            prefix = choice.removesuffix(NAMES)
            if prefix != choice and text.startswith(prefix):
                self._check_names(value, text.removeprefix(prefix))
                return
        allowed = [c or "''" for c in (*self.choices, *self.synonyms)]
        raise UserError(
            f"{self.full_name}={value!r} is not known. {self._meant(text, allowed)}"
            f"Set {self.full_name} to one of: {', '.join(allowed)}."
        )

    def _check_names(self, value: str, names: str) -> None:
        for name in names.split(","):
            if name not in self.names:
                raise UserError(
                    f"{self.full_name}={value}: {name!r} is not known. {self._meant(name, self.names)}"
                    f"Set names of these: {', '.join(self.names)}."
                )

    def _meant(self, text: str, allowed: Iterable[str]) -> str:
        """A sentence about the choice that was probably meant, and a space; "" if there is none."""
        for alias in self.aliases:
            for system, word in alias.words():
                theirs = word.rpartition(":")[2].strip().strip('"')
                if alias.value is not None and theirs.lower() == text.lower():
                    return f"{theirs} ({SYSTEMS[system]}) is {alias.value or repr('')} here. "
        near = difflib.get_close_matches(text, list(allowed), n=1)
        return f"Did you mean {near[0]}? " if near else ""


def number(value: float) -> str:
    """1 -> "1", 0.5 -> "0.5", 4294967295 -> "4294967295"."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def option(
    default: Any, help: str, *, aliases: Mapping[str, Words] | Iterable[Alias] = (), **facts: Any
) -> Any:
    """A field of a section.

    Args:
      default: its default value.
      help: a sentence.
      aliases: what other tools call it, by system, where the value carries over; or one `Alias` per row of
        the table.
      facts: further fields of `Option`.
    """
    rows = (Alias(**aliases),) if isinstance(aliases, Mapping) else tuple(aliases)
    return field(default=default, metadata={_KEY: {"help": help, "aliases": rows, **facts}})


def section(cls: type) -> Any:
    """A field that is a section of its own, at its defaults."""
    return field(default_factory=cls)


def options_of(cls: type, where: str = "") -> Iterator[Option]:
    """The options of a dataclass and of its sections, in the order in which they are written.

    Args:
      where: the name of the section, "" for all of `Config`.
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name = f"{where}.{f.name}" if where else f.name
        kind = hints[f.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from options_of(kind, name)
            continue
        optional = isinstance(kind, types.UnionType)
        yield Option(
            name=name,
            type=typing.get_args(kind)[0] if optional else kind,
            optional=optional,
            default=f.default,
            **f.metadata[_KEY],
        )
