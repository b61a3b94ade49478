"""Options as an ml_collections.ConfigDict, which config files and flags change, and back."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from deepseek_jax.config import suggestions
from deepseek_jax.config.options import OPTIONS, Config
from deepseek_jax.errors import UserError


def base_config(arg: str = "", allowed: Sequence[str] = ("",)) -> ConfigDict:
    """A ConfigDict with every option at its default.

    An option that may be None is a placeholder: it takes None and a value of its type.

    Args:
      arg: what follows the colon in --config=configs/NAME.py:ARG.
      allowed: the values of arg that the config knows; "" for none.

    Raises:
      UserError: arg is none of them.
    """
    if arg not in allowed:
        named = " or ".join(a for a in allowed if a)
        repair = f"Write {named}, or leave it out." if named else "Leave it out: there is none."
        raise UserError(f"the argument {arg!r} of this config is not known. {repair}")
    return _defaults(Config)


class _Section(ConfigDict):
    """Takes True and False where "true" and "false" stand beside "auto", and lists for JSON text."""

    _BOOLS = frozenset(o.name.rpartition(".")[2] for o in OPTIONS.values() if o.takes_bools)
    _JSON = frozenset(o.name.rpartition(".")[2] for o in OPTIONS.values() if o.json)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, bool) and key in self._BOOLS:
            value = str(value).lower()
        if isinstance(value, (list, tuple)) and key in self._JSON:
            value = _as_json(value, key)
        super().__setitem__(key, value)


def _as_json(value: Any, name: str) -> str:
    """JSON text of lists and dicts, those of ml_collections among them."""
    try:
        return json.dumps(value, default=lambda d: d.to_dict())
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{name}={value!r} cannot be written as JSON ({e}).") from e


def _defaults(cls: Any) -> ConfigDict:
    out = _Section()
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            out[f.name] = _defaults(kind)
        elif isinstance(kind, types.UnionType):
            out[f.name] = config_dict.placeholder(typing.get_args(kind)[0])
        else:
            out[f.name] = f.default
    return out


def yarn(model: ConfigDict, factor: float, mscale: float, beta_fast: float = 32.0) -> None:
    """Sets a model's options for a context that YaRN extended, from the length the config trains at.

    Args:
      model: `config.model`, with max_position_embeddings at the length before the extension, in tokens.
      factor: the length after it / the length before it.
      mscale: both mscale and mscale_all_dim, as DeepSeek's and Kimi's models have them.
      beta_fast: rotations above which a frequency is kept as it is.
    """
    before = model.max_position_embeddings
    model.max_position_embeddings = round(factor * before)
    model.rope_scaling.type = "yarn"
    model.rope_scaling.factor = float(factor)
    model.rope_scaling.original_max_position_embeddings = before
    model.rope_scaling.beta_fast = float(beta_fast)
    model.rope_scaling.beta_slow = 1.0
    model.rope_scaling.mscale = float(mscale)
    model.rope_scaling.mscale_all_dim = float(mscale)


def from_config_dict(tree: Any) -> Config:
    """The dataclasses of a ConfigDict or of nested dicts. Options that are missing have their defaults.

    Raises:
      UserError: an unknown option or one of the wrong type, by its full name.
    """
    return _read(Config, tree, "config")


def _read(cls: type, values: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not hasattr(values, "items"):
        raise UserError(
            f"{where} is {values!r}, but it is a section with the options {', '.join(hints)}."
        )
    for name in values:
        if name not in hints:
            full = f"{where}.{name}"
            meant = suggestions.suggestion(full.removeprefix("config."))
            meant = "" if meant == suggestions.SEE_HELP else f"{meant} "
            raise UserError(f"{full} is not an option. {meant}{where} has: {', '.join(hints)}.")
    return cls(
        **{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def _value(kind: Any, value: Any, full: str) -> Any:
    """The value of the option `full`, whose type is `kind`."""
    if dataclasses.is_dataclass(kind):
        return _read(typing.cast(type, kind), value, full)
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and type(value) is int:
        value = float(value)
    if types.NoneType in allowed and value == 0:
        value = None  # a flag cannot spell None
    option = OPTIONS[full.removeprefix("config.")]
    if isinstance(value, bool) and option.takes_bools:
        value = str(value).lower()
    if isinstance(value, (list, tuple)) and option.json:
        value = _as_json(value, full)
    if type(value) not in allowed:
        wanted = " or ".join("None" if a is types.NoneType else a.__name__ for a in allowed)
        raise UserError(
            f"{full}={value!r} has the type {type(value).__name__}. Give it a value of type {wanted}."
        )
    return value
