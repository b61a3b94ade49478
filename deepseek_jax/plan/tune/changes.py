"""Options of a config changed by name, and why some changes cannot be."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config.options import Config, replaced, value_of
from deepseek_jax.config.validation import validate


def with_options(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with other values of "section.option"s, as they are given.

    Raises:
      TypeError: there is no such option.
    """
    for name, value in changes.items():
        config = replaced(config, name, value)
    return config


def checked(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same, where the options go together.

    Raises:
      UserError: they do not.
    """
    changed = with_options(config, changes)
    validate(changed)
    return changed


def said(changes: Mapping[str, Any]) -> str:
    """As one would write them on a command line."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def differing(config: Config, base: Config, names: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options whose values differ from a config's."""
    return {n: value_of(config, n) for n in names if value_of(config, n) != value_of(base, n)}
