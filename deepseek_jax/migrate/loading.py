"""All sources of one run: the files that were named, command lines, and the files that these name."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from deepseek_jax.migrate import command, hydra, references, script
from deepseek_jax.migrate.reading import read_text
from deepseek_jax.migrate.source import Entry, Source

# Keys whose value is another file of the same run, where it ends as one.
NAMED = ("deepspeed", "deepspeed_config_file", "fsdp_config")
INLINE = "deepspeed"  # a section that is a file of DeepSpeed's, written in place


def load(files: Sequence[str], commands: Iterable[str], environ: Mapping[str, str]) -> list[Source]:
    """Reads them, follows references, and splits off what is of another tool.

    Args:
      files: paths; a shell script is a command line.
      commands: command lines.
      environ: for ${oc.env:NAME}.

    Raises:
      UserError: a file or a command line cannot be read.
    """
    sources: list[Source] = []
    there: dict[str, str] = {}
    commands = list(commands)
    for path in files:
        if path.endswith(script.ENDINGS):
            found = script.read(read_text(path, path), os.path.basename(path))
            commands.append(found.command)
            sources += [found.scheduler] if found.scheduler else []
        else:
            _add(path, sources, there, environ)
    for line in commands:
        taken = command.parse(line)
        for entry in taken.files:
            if not _is_known(str(entry.value), there) and os.path.isfile(str(entry.value)):
                _add(str(entry.value), sources, there, environ)
        for path in _by_name(taken):
            _add(path, sources, there, environ)
        sources += taken.sources
    return [part for source in sources for part in _split(source)]


def _by_name(taken: command.Command) -> list[str]:
    """Files that Hydra finds by --config-path and --config-name, or in the usual folders beside a script."""
    flags = next((s for s in taken.sources if s.form == "flags"), None)
    if flags is None:
        return []
    given = {e.key.replace("-", "_"): str(e.value) for e in flags.entries}
    name = given.get("config_name") or given.get("config", "")
    if not re.fullmatch(r"[\w./-]+", name) or name.endswith(command.ENDINGS):
        return []
    script = os.path.dirname(flags.name)
    folders = [given["config_path"]] if "config_path" in given else []
    folders += [os.path.join(script, f) for f in (*folders, "conf", "configs", "../configs")]
    for folder in folders:
        for ending in command.ENDINGS[:2]:
            path = os.path.join(folder, name + ending)
            if os.path.isfile(path):
                return [path]
    return []


def _add(
    path: str, sources: list[Source], there: dict[str, str], environ: Mapping[str, str]
) -> None:
    """A file, and the files that it names."""
    real = os.path.realpath(path)
    if real in there:
        return
    there[real] = path
    folder = os.path.dirname(path) or "."
    name = os.path.basename(path)
    if any(s.name == name for s in sources):
        name = path
    source = references.resolved(hydra.composed(path, name), environ)
    sources.append(source)
    for entry in source.entries:
        value = entry.value
        if entry.key.rpartition(".")[2] not in NAMED or not isinstance(value, str):
            continue
        for beside in (value, os.path.join(folder, value)):
            if value.endswith(command.ENDINGS) and os.path.isfile(beside):
                if not _is_known(value, there):
                    _add(beside, sources, there, environ)
                    if entry.key.endswith("fsdp_config"):
                        sources[-1] = _inside(sources[-1], "fsdp_config")
                break


def _inside(source: Source, section: str) -> Source:
    """A file that holds one section of a recipe."""
    entries = tuple(Entry(f"{section}.{e.key}", e.value, e.where, e.rank) for e in source.entries)
    return dataclasses.replace(source, entries=entries)


def _is_known(value: str, there: Mapping[str, str]) -> bool:
    name = os.path.basename(value)
    return os.path.realpath(value) in there or any(os.path.basename(p) == name for p in there)


def _split(source: Source) -> list[Source]:
    """A recipe with DeepSpeed's options in it is two sources."""
    inside = [e for e in source.entries if e.key.startswith(f"{INLINE}.")]
    if not inside or source.form == "launcher":
        return [source]
    own = tuple(e for e in source.entries if e not in inside)
    parts = tuple(Entry(e.key.partition(".")[2], e.value, e.where, e.rank) for e in inside)
    return [
        Source(source.name, own, source.form, source.duplicates, source.files),
        Source(f"{source.name} {INLINE}", parts, source.form),
    ]
