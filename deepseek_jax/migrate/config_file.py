"""The new config: a Python file with one option a line, each with where it came from."""

import textwrap
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.config import base_config
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import OPTIONS, Config
from deepseek_jax.migrate.migration import Migration, Setting
from deepseek_jax.migrate.source import shown

WIDTH = 110
TITLES = {
    "": "Run",
    "model": "Model",
    "model.rope_scaling": "Model: rotary positions",
    "mesh": "Mesh and sharding",
    "sharding": "",
    "offload": "",
    "moe": "Experts",
    "data": "Data",
    "train": "Training",
    "fp16": "",
    "optimizer": "Optimizer",
    "sft": "Fine-tuning",
    "lora": "LoRA",
    "distill": "Distillation",
    "esft": "",
    "eval": "Evaluation, checkpoints, log",
    "checkpoint": "",
    "log": "",
}
HEAD = '''"""{title}

{launch}

Made by `python -m deepseek_jax.migrate`. Beside each option: where it came from. What is not named here is at
this trainer's default.
{notes}"""

from ml_collections import ConfigDict

from deepseek_jax.config import base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Args:
      arg: none is known.

    Raises:
      UserError: any arg.
    """
    c = base_config(arg)
'''


def as_config(m: Migration) -> Config:
    """The options of a migration.

    Raises:
      UserError: one is of the wrong type.
    """
    tree = base_config()
    for name, setting in m.settings.items():
        _assign(tree, name, setting.value)
    return from_config_dict(tree)


def text(m: Migration, title: str, launch: str) -> str:
    """The file.

    Args:
      m: the migration, done.
      title: what it was made from, a line.
      launch: the command that runs it.
    """
    notes = "\n".join(f"\n{_filled(note, '  ', '')}" for note in m.notes)
    commands = "\n".join(f"  {line}" for line in launch.splitlines())
    head = HEAD.format(
        title=_docstring(_filled(title)),
        launch=_docstring(commands),
        notes=_docstring(f"{notes}\n" if notes else ""),
    )
    lines = [head]
    current = None
    for section in _sections(m.settings):
        heading = TITLES.get(section, section) or current
        if heading != current:
            lines.append(f"\n    # {heading}")
            current = heading
        for name in OPTIONS:
            if name in m.settings and name.rpartition(".")[0] == section:
                lines.append(_line(name, m.settings[name]))
    lines.append("    return c")
    return "\n".join(lines).replace("\n\n\n    #", "\n\n    #") + "\n"


def origins(setting: Setting) -> str:
    """Where an option came from, and the arithmetic: "recipe.yaml:3 max_steps=100"."""
    told = [t for t in setting.because if t.entry] or list(setting.because)
    places = list(dict.fromkeys(shown(t.origin) for t in told))
    if len(places) > 3:
        places = [*places[:3], "..."]
    return "; ".join(p for p in ("; ".join(places), setting.how) if p)


def _sections(settings: Mapping[str, Setting]) -> list[str]:
    given = {name.rpartition(".")[0] for name in settings}
    return [s for s in (*TITLES, *sorted(given - TITLES.keys())) if s in given]


def _line(name: str, setting: Setting) -> str:
    """`    c.train.steps = 100  # recipe.yaml:3`, or the comment above, where it is long."""
    left = f"    c.{name} = {_literal(setting.value, name)}"
    comment = origins(setting)
    if not comment:
        return left
    if "\n" not in left and len(left) + len(comment) + 4 <= WIDTH:
        return f"{left}  # {comment}"
    above = textwrap.wrap(comment, WIDTH - 6, break_on_hyphens=False)
    return "\n".join([*(f"    # {part}" for part in above), left])


def _literal(value: Any, name: str) -> str:
    """Of a long text a bracket with one piece a line."""
    if not isinstance(value, str):
        return repr(value)
    room = WIDTH - len(name) - 12
    quoted = _quoted(value)
    if len(quoted) <= room:
        return quoted
    parts = [value[i : i + 88] for i in range(0, len(value), 88)]
    inner = "\n".join(f"        {_quoted(part)}" for part in parts)
    return f"(\n{inner}\n    )"


def _quoted(value: str) -> str:
    single = repr(value)
    return f'"{single[1:-1]}"' if single.startswith("'") and '"' not in value else single


def _filled(line: str, indent: str = "", first: str = "") -> str:
    return textwrap.fill(
        line, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )


def _docstring(part: str) -> str:
    """Text that ends no docstring and escapes nothing."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in part)
    return shown.replace("\\", "\\\\").replace('"""', "'''")


def _assign(tree: ConfigDict, name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree[section]
    tree[key] = value
