"""The record of a family, and what its hooks share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.families.name_tables import NameTable

Options = dict[str, Any]  # of ModelConfig, by name, while they are collected


class Window(NamedTuple):
    """Which layers of a family see the last `sliding_window` positions only."""

    size: int | None  # sliding_window where it is missing
    switched: bool = False  # only with use_sliding_window
    # max_window_layers where it is missing: the first layer with a window. None: all layers have it.
    first: int | None = None


def _no_options(given: Options, options: Options) -> None:
    """Every option has a key of its own."""


def _no_keys(model: ModelConfig) -> dict[str, Any]:
    """Every key is an option."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means: its keys, its tensors and two hooks for what tables cannot say.

    Attributes:
      model_type: its name in config.json.
      architecture: the class that config.json names.
      tensors: where the arrays of a layer lie in a checkpoint (name_tables.py).
      options: keys that are options of ours by the same name.
      defaults: of keys that may be missing.
      fixed: options of ours that the family has no key for.
      renamed: key -> option of ours. Export writes those that are not options themselves.
      only: as keys.ONLY, of this family.
      harmless: keys that change nothing, of this family.
      aliases: other model_types of the same model.
      dense: no layer has experts.
      output_bias: attention_bias is of the output projection as well.
      partial_rotary: partial_rotary_factor may be below 1.
      window: None where the family has no sliding windows.
      complete: config.json to options: called with the keys that are not null and with the options found so
        far, to which it adds what no single key says.
      extra_keys: options to config.json: keys of the family that are no options.
    """

    model_type: str
    architecture: str
    tensors: NameTable
    options: tuple[str, ...]
    defaults: Options
    fixed: Options
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    only: dict[str, tuple] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    dense: bool = False
    output_bias: bool = False
    partial_rotary: bool = False
    window: Window | None = None
    complete: Callable[[dict[str, Any], Options], None] = _no_options
    extra_keys: Callable[[ModelConfig], dict[str, Any]] = _no_keys


def set_dense_layers(sparse: list[bool], keys: str, options: Options) -> None:
    """Sets first_k_dense_replace: ours are models whose dense layers come first.

    Args:
      sparse: whether each layer has experts.
      keys: the keys of config.json that say so, for the message.
      options: where it is set.

    Raises:
      UserError: a dense layer comes after one with experts.
    """
    first = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[first:]):
        raise UserError(
            f"config.json: {keys} put dense layers after layers with experts, which is not in this version."
        )
    options["first_k_dense_replace"] = first
