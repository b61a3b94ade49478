"""Handlers that most keys need: what a table is made of.

TABLE = {
    "learning_rate": fact("learning_rate", as_float),
    "adam_beta1": option("optimizer.b1"),
    "dataloader_num_workers": no_effect("batches are read ahead by a thread"),
    "tie_weights": neutral({False: ""}, "there are no tied experts here", "Set it to false"),
}
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.config.options import OPTIONS
from deepseek_jax.errors import UserError
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler

TRUE = {"true", "yes", "on", "1"}
FALSE = {"false", "no", "off", "0", "none", "null", ""}


def as_int(entry: Entry) -> int:
    """A whole number, also "8" and 1e3.

    Raises:
      UserError: it is none.
    """
    number = as_float(entry)
    if number != int(number):
        raise wrong(entry, "a whole number")
    return int(number)


def as_float(entry: Entry) -> float:
    """A number, also "5e-5".

    Raises:
      UserError: it is none.
    """
    if isinstance(entry.value, bool) or entry.value is None:
        raise wrong(entry, "a number")
    try:
        number = float(entry.value)
    except (TypeError, ValueError, OverflowError):
        raise wrong(entry, "a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise wrong(entry, "a finite number")
    return number


def as_bool(entry: Entry) -> bool:
    """True or False, also "yes" and "no".

    Raises:
      UserError: it is neither.
    """
    text = str(entry.value).lower()
    if text not in TRUE | FALSE:
        raise wrong(entry, "true or false")
    return text in TRUE


def as_text(entry: Entry) -> str:
    """A text; a list becomes one with commas, None an empty one."""
    if entry.value is None:
        return ""
    if isinstance(entry.value, (list, tuple)):
        return ",".join(str(v) for v in entry.value)
    return str(entry.value)


def wrong(entry: Entry, wanted: str) -> UserError:
    """The mistake of a value of the wrong kind."""
    return UserError(f"{entry.where}: {entry.text} is not {wanted}. Correct it there.")


READ: Mapping[type, Callable[[Entry], Any]] = {
    int: as_int,
    float: as_float,
    bool: as_bool,
    str: as_text,
}


def is_off(value: Any) -> bool:
    """Whether a value says that nothing is asked for: None, False, "no", "none", an empty list."""
    return value is None or value is False or value in ([], {}, ()) or str(value).lower() in FALSE


def fact(name: str, read: Callable[[Entry], Any] = as_float) -> Handler:
    """The entry says a fact. None says nothing: the tool's default."""

    def handle(m: Migration, entry: Entry) -> None:
        if entry.value is None:
            m.no_effect(entry, "null is the default")
        else:
            m.tell(entry, name, read(entry))

    return handle


def option(name: str, read: Callable[[Entry], Any] | None = None) -> Handler:
    """The entry is an option of ours, by its full name. None says nothing: the tool's default."""

    def handle(m: Migration, entry: Entry) -> None:
        if entry.value is None:
            m.no_effect(entry, "null is the default")
            return
        known = OPTIONS.get(name)
        m.tell(entry, name, (read or READ[known.type if known else str])(entry))

    return handle


def no_effect(why: str) -> Handler:
    """Whatever its value is."""
    return lambda m, entry: m.no_effect(entry, why)


def refuse(why: str, repair: str = "", unless: Sequence[Any] = (None, False)) -> Handler:
    """What there is not, unless the value is one that asks for nothing: then it has no effect."""
    neutral = [str(v).lower() for v in unless]

    def handle(m: Migration, entry: Entry) -> None:
        if str(entry.value).lower() in neutral or (None in unless and is_off(entry.value)):
            m.no_effect(entry, "it is off")
        else:
            m.refuse(entry, why, repair)

    return handle


def neutral(values: Mapping[Any, str], why: str, repair: str = "") -> Handler:
    """Some values are what is done here, and no effect; all others are refused.

    Args:
      values: value -> why it has no effect; "": it is how this trainer works.
    """
    known = {str(v).lower(): text for v, text in values.items()}

    def handle(m: Migration, entry: Entry) -> None:
        text = known.get(str(entry.value).lower())
        if text is None:
            m.refuse(entry, why, repair)
        else:
            m.no_effect(entry, text or "that is how this trainer works")

    return handle


def one_of(choices: Mapping[Any, Mapping[str, Any] | str], why: str, repair: str = "") -> Handler:
    """The value says facts or options, by this table; of a text it has no effect; others are refused.

    Args:
      choices: value (any case) -> {fact or option: value}, or why it has no effect.
    """
    known = {str(v).lower(): told for v, told in choices.items()}

    def handle(m: Migration, entry: Entry) -> None:
        told = known.get(str(entry.value).lower())
        if told is None:
            m.refuse(entry, why, repair)
        elif isinstance(told, str):
            m.no_effect(entry, told)
        else:
            for name, value in told.items():
                m.tell(entry, name, value)

    return handle
