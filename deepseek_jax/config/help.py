"""The options as the text of --help."""

import dataclasses
import textwrap
import typing

from deepseek_jax.config.option import Option, number
from deepseek_jax.config.options import OPTIONS, Config

WIDTH = 110


def describe() -> str:
    """Every option by section: its default, what it does, its unit, limits and choices."""
    out = []
    for section in dict.fromkeys(o.name.rpartition(".")[0] for o in OPTIONS.values()):
        if section:
            about = (section_class(section).__doc__ or "").partition("\n\n")[0]
            out += ["", *textwrap.wrap(f"{section}: {' '.join(about.split())}", WIDTH)]
        out += [entry(o) for o in OPTIONS.values() if o.name.rpartition(".")[0] == section]
    return "\n".join(out)


def section_class(name: str) -> type:
    """The dataclass of a section: "model.rope_scaling" -> RopeScaling."""
    cls: type = Config
    for part in name.split("."):
        cls = typing.get_type_hints(cls)[part]
    assert dataclasses.is_dataclass(cls)
    return cls


def entry(o: Option) -> str:
    """The lines of one option."""
    default = repr(o.default) if isinstance(o.default, str) else o.default
    lines = [f"  --{o.full_name}={default}", *_wrapped(o.help + _facts(o))]
    spelled = {value: [value or "''"] for value in o.choices}
    for synonym, value in o.synonyms.items():
        spelled[value].append(synonym)
    for value, does in o.choices.items():
        names = "=".join(spelled[value])
        lines += _wrapped(f"{names}: {does}" if does else names, "  ")
    if o.names:
        lines += _wrapped(f"NAME: {', '.join(o.names)}", "  ")
    return "\n".join(lines)


def _facts(o: Option) -> str:
    """[tokens; 1 or more; 0: off]"""
    special = [f"{number(value)}: {meaning}" for value, meaning in o.special.items()]
    facts = [o.unit, o.limits(), *special]
    if o.optional:
        facts.append("or None")
    if o.any_case:
        facts.append("in either case")
    if o.changes_shapes:
        facts.append("changes shapes")
    if o.on_resume == "new pass":
        facts.append("another one on resuming needs data.on_change=new_pass")
    facts = [fact for fact in facts if fact]
    return f" [{'; '.join(facts)}]" if facts else ""


def _wrapped(text: str, indent: str = "") -> list[str]:
    indent = f"        {indent}"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
