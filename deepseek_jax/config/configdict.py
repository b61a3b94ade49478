"""Options as an ml_collections.ConfigDict, which configs and flags change, and back; and as the text of --help."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError

OPTIONAL = (
    "model.q_lora_rank",
    "model.num_key_value_heads",
    "model.head_dim",
)  # options that may be None


def base_config() -> ConfigDict:
    """A ConfigDict with every option at its default. An optional option is a placeholder: None and 512 both fit."""

    def build(cls: type) -> ConfigDict:
        out = ConfigDict()
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            if dataclasses.is_dataclass(kind):
                out[f.name] = build(kind)
            elif isinstance(kind, types.UnionType):
                out[f.name] = config_dict.placeholder(typing.get_args(kind)[0])
            else:
                out[f.name] = f.default
        return out

    return build(Config)


def from_config_dict(tree: Any) -> Config:
    """The dataclasses of a ConfigDict or of nested dicts.

    Raises:
      UserError: an unknown option or one of the wrong type, by its full name.
    """

    def build(cls: type, values: Any, where: str) -> Any:
        hints = typing.get_type_hints(cls)
        if not hasattr(values, "items"):
            raise UserError(
                f"{where} is {values!r}, but it is a section with the options {', '.join(hints)}."
            )
        unknown = [k for k in values if k not in hints]
        if unknown:
            raise UserError(
                f"{where}.{unknown[0]} is not an option. {where} has: {', '.join(hints)}."
            )
        out = {}
        for name, value in values.items():
            kind, full = hints[name], f"{where}.{name}"
            if dataclasses.is_dataclass(kind):
                out[name] = build(kind, value, full)
                continue
            allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            if float in allowed and type(value) is int:
                value = float(value)
            if types.NoneType in allowed and value == 0:
                value = None  # a flag cannot spell None
            if type(value) not in allowed:
                wanted = " or ".join("None" if a is types.NoneType else a.__name__ for a in allowed)
                raise UserError(
                    f"{full}={value!r} has the type {type(value).__name__}. Give it a value of type {wanted}."
                )
            out[name] = value
        return cls(**out)

    return build(Config, tree, "config")


def comments_of(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, read as Python reads its source, whatever its
    indentation; none without a source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # of a program that was packed without its sources
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {f.target.id: by_line[f.end_lineno] for f in fields if f.end_lineno in by_line}


def describe() -> str:
    """Every option with its default and the comment above: the text of --help."""
    lines = []

    def add(cls: type, where: str) -> None:
        comments = comments_of(cls)
        nested = []
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING:
                nested.append((typing.get_type_hints(cls)[f.name], f"{where}.{f.name}"))
            else:
                default = repr(f.default) if isinstance(f.default, str) else f.default
                lines.append(
                    f"  --{where}.{f.name}={default}\n        {comments.get(f.name, '')}".rstrip()
                )
        for kind, name in nested:
            add(kind, name)

    add(Config, "config")
    return "\n".join(lines)
