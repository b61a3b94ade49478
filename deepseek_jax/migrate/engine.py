"""From sources to options: every entry to its handler, then the arithmetic."""

import dataclasses
import os
import re
from collections.abc import Sequence

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import arithmetic, command
from deepseek_jax.migrate.detect import Assigned, assign
from deepseek_jax.migrate.migration import Migration, Reading
from deepseek_jax.migrate.source import Entry, Rank, Source

# What handlers raise where a list stands for a number, and the like.
WRONG_KIND = (TypeError, ValueError, ArithmeticError, AttributeError)
# Flags whose value is a recipe, or its name in a folder of configs.
NAMING = ("config", "config_file", "config_name", "config_path")


def migrate(
    sources: Sequence[Source], wanted: Sequence[str] = (), into: Migration | None = None
) -> Migration:
    """Reads the sources of one run.

    Args:
      sources: all of them: recipe, Accelerate's file, DeepSpeed's, launcher, flags.
      wanted: names of tools, of --from.
      into: with what the command line says; None: nothing.

    Returns:
      `into`, with settings and a verdict on every entry.

    Raises:
      UserError: no tool recognises a source.
    """
    m = Migration() if into is None else into
    assigned = [_ranked(a) for a in assign(sources, wanted)]
    _say_guesses(m, assigned)
    m.recipe = any(not a.tool.companion for a in assigned)
    m.readings = [Reading(a.source, a.tool.title, a.tool.kin, a.tool.key) for a in assigned]
    for reading, found in zip(m.readings, assigned, strict=True):
        m.begin(reading)
        _read(m, found)
    finished = set()
    for reading, found in zip(m.readings, assigned, strict=True):
        if found.tool.name not in finished:
            finished.add(found.tool.name)
            m.begin(reading)
            found.tool.finish(m)
    m.settle()
    arithmetic.settle(m)
    return m


def _read(m: Migration, found: Assigned) -> None:
    for earlier, later in found.source.duplicates:
        m.no_effect(earlier, f"the same key stands again at {later.where}, and the last one counts")
    for entry in found.source.entries:
        if found.source.form in ("flags", "launcher") and _names_a_file(m, entry):
            continue
        handler = found.tool.handler(found.tool.key(entry.key))
        if handler is None:
            if re.match(r"(defaults|hydra)(\.|$)", entry.key):
                m.no_effect(entry, "it is Hydra's: what defaults name is read")
            continue  # unknown: Migration.verdict
        if entry.value == "???":
            m.refuse(entry, "??? stands for a value that must be given", "Write it there")
            continue
        try:
            handler(m, entry)
        except UserError as e:
            m.refuse(entry, str(e).rstrip("."))
        except WRONG_KIND:
            m.refuse(entry, "its value is not of the right kind", "Correct it there")


def _names_a_file(m: Migration, entry: Entry) -> bool:
    """Whether a flag names a recipe: read beside it, by its path or as a name of Hydra's."""
    plain = entry.key.startswith("argument ")
    value = str(entry.value)
    named = entry.key.replace("-", "_") in NAMING or (plain and value.endswith(command.ENDINGS))
    if not named or not isinstance(entry.value, str):
        return False
    files = [r.source.name for r in m.readings if r.source.form in ("yaml", "json")]
    wanted = os.path.basename(value)
    here = any(
        os.path.splitext(os.path.basename(f))[0] == os.path.splitext(wanted)[0] for f in files
    )
    if here or (files and not value.endswith(command.ENDINGS)):
        m.no_effect(entry, "the file is read beside it" if here else f"{files[0]} is read for it")
    else:
        m.refuse(entry, "it names a file that is not here", "Give the file as well")
    return True


def _ranked(found: Assigned) -> Assigned:
    """A source whose entries have the rank of its tool."""
    rank = found.tool.rank
    if rank is None or found.source.form == "flags":
        return found
    if found.source.form == "launcher":
        rank = Rank.LAUNCHER_FLAG
    entries = tuple(Entry(e.key, e.value, e.where, rank) for e in found.source.entries)
    return found._replace(source=dataclasses.replace(found.source, entries=entries))


def _say_guesses(m: Migration, assigned: Sequence[Assigned]) -> None:
    for found in assigned:
        if found.guessed:
            m.note(
                f"{found.source.name} was read as of {found.tool.title}, by its keys; --from= says otherwise."
            )
