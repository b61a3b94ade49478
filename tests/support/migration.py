"""Recipes of other trainers, migrated in this process."""

import dataclasses
import importlib.util
import os
from typing import Any

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.migrate import check, config_file, engine, launch, loading, reading, report
from deepseek_jax.migrate.migration import Migration


@dataclasses.dataclass
class Migrated:
    """What came out of one migration."""

    m: Migration
    lists: report.Lists
    config: Config | None  # None: something is refused
    launch: str

    def option(self, name: str) -> Any:
        """The value that the new config sets."""
        return self.m.settings[name].value

    def refused(self) -> set[str]:
        return {e.key for e, _ in self.lists.refused}

    def why(self, key: str) -> str:
        """What is said of a key that has no effect or is refused."""
        found = [why for e, why in self.lists.no_effect if e.key == key]
        found += [f"{v.why}. {v.repair}" for e, v in self.lists.refused if e.key == key]
        return found[0]

    def became(self, key: str) -> set[str]:
        """The options that a key became."""
        return {n for e, to in self.lists.became if e.key == key for n in to}


def migrate(*texts: str, command: str = "", tools: str = "", allow=(), **options) -> Migrated:
    """Recipes, given as text, and a command line.

    Args:
      texts: of files, which are named 0.yaml, 1.yaml, ...
      command: the command line.
      tools: names of --from.
      allow: of --allow.
      options: of Migration.
    """
    sources = [
        part
        for i, text in enumerate(texts)
        for part in loading._split(reading.from_text(text, f"{i}.yaml"))
    ]
    sources += loading.load([], [command] if command else [], {})
    return finished(sources, tools, allow, **options)


def of_files(files, command: str = "", tools: str = "", allow=(), **options) -> Migrated:
    """The same of files that are there."""
    sources = loading.load(files, [command] if command else [], {})
    return finished(sources, tools, allow, **options)


def finished(sources, tools="", allow=(), **options) -> Migrated:
    m = engine.migrate(sources, [t for t in tools.split(",") if t], Migration(**options))
    found = report.lists(m, allow)
    keys = sum(len(r.source.all_keys()) for r in m.readings) + len(m.absent)
    in_lists = (found.became, found.no_effect, found.refused, found.left_out)
    assert keys == sum(len(part) for part in in_lists)  # every key is in exactly one list
    config = None if found.refused else check.check(m)
    return Migrated(m, found, config, launch.command(m, "configs/mine.py"))


def loaded(path: str, migrated: Migrated) -> Config:
    """The file that a migration writes, read as train.py reads it."""
    text = config_file.text(migrated.m, "a test", migrated.launch)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    assert max(len(line) for line in text.splitlines()) <= 110
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())
