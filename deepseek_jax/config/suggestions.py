"""What an unknown option was probably meant to be."""

import difflib
from collections.abc import Mapping

from deepseek_jax.config import words
from deepseek_jax.config.options import OPTIONS

# Options that had another name: old -> new, as "train.grad_clip": "optimizer.grad_clip". The old one is
# refused by this name.
RENAMED: Mapping[str, str] = {"log.tensorboard": "log.trackers"}
VALUES = {"log.tensorboard": ": True is tensorboard, False is ''"}  # what the old values are now
SEE_HELP = "See --help for all options."


def section_of(name: str) -> str:
    """ "train.steps" -> "train"."""
    return name.rpartition(".")[0]


def is_known(name: str) -> bool:
    """Whether an option or a section has this name."""
    return name in OPTIONS or any(o.startswith(f"{name}.") for o in OPTIONS)


def unknown_part(name: str) -> str:
    """What of "modle.layers" or "train.stepz" is not known: "modle", "stepz"."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if not is_known(".".join(parts[:i])):
            return parts[i - 1]
    return parts[-1]


def suggestion(name: str) -> str:
    """A sentence for a name that is no option: "Did you mean steps?", or which option another tool's word is.

    Args:
      name: "train.stepz".
    """
    if name in RENAMED:
        return f"It is config.{RENAMED[name]} now{VALUES.get(name, '')}."
    if found := words.find_path(name):
        return found
    section, _, key = name.rpartition(".")
    elsewhere = [f"config.{o}" for o in OPTIONS if o.rpartition(".")[2] == key and o != name]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    if found := words.find(name):
        return found
    beside = [o.removeprefix(f"{section}.") for o in OPTIONS if section_of(o) == section]
    if near := difflib.get_close_matches(key, beside, n=1):
        return f"Did you mean {near[0]}?"
    known = {section_of(o) for o in OPTIONS} - {""}
    if section not in known and (near := difflib.get_close_matches(section, sorted(known), n=1)):
        return f"Did you mean {near[0]}?"
    if near := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.75):
        return f"Did you mean config.{near[0]}?"
    return SEE_HELP
