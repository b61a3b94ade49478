"""adapter_config.json of PEFT: what is read of it, what must be as it is by default, and what is refused."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.hf.tensors import MAX_CONFIG
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

CONFIG = "adapter_config.json"
# Keys that change nothing in what an adapter computes, or that the tensors say themselves.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
}
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
ONLY = {"bias": ("none",), "fan_in_fan_out": (False,), "use_dora": (False,)}
# What begins with another base than the checkpoint's, so that the factors alone mean nothing.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Patterns without groups, which could take for ever on a long name.
_PLAIN = re.compile(r"(?:\w|\\?\.|\.\*|\||\^|\$|-){1,300}")


def read_config(folder: str) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
      UserError: there is none, or it asks for what this version does not compute.
    """
    path = os.path.join(os.path.expanduser(folder), CONFIG)
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} holds no adapter: there is no {CONFIG}. Name a folder that PEFT wrote."
        )
    try:
        config = bounded_json.read(path, CONFIG, MAX_CONFIG)
    except BadFile as e:
        raise UserError(f"{folder}: {e}. Copy it again from where the adapter came from.") from e
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type={kind!r} is not in this version, which has LORA.")
    for key, value in config.items():
        if key in ONLY and value not in ONLY[key] and value is not None:
            raise UserError(
                f"{path}: {key}={value!r} is not in this version. Merge the adapter with PEFT."
            )
        if key == "init_lora_weights":
            if isinstance(value, str) and value.lower().startswith(CHANGES_BASE):
                raise UserError(
                    f"{path}: {key}={value!r} changes the base. Save the adapter with PEFT's "
                    f"path_initial_model_for_weight_conversion first."
                )
        elif key not in HARMLESS | READ | ONLY.keys() and value not in (None, False, {}, []):
            raise UserError(
                f"{path}: {key}={value!r} is not known, and may change what the adapter computes. Merge the "
                f"adapter with PEFT."
            )
    _number(config, "r", path)
    _number(config, "lora_alpha", path)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            if (
                not isinstance(pattern, str)
                or not _PLAIN.fullmatch(pattern)
                or pattern.count("*") > 4
            ):
                raise UserError(
                    f"{path}: {key} has the pattern {str(pattern)[:80]!r}, and only names and .* are read. "
                    f"Write it so."
                )
            _number(config[key], pattern, path)
    return config


def _number(values: Mapping[str, Any], key: str, path: str) -> float:
    value: Any = values.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise UserError(f"{path}: {key}={value!r} is no number above 0. Correct it.")
    return value


def _pattern(values: Mapping[str, float] | None, name: str) -> float | None:
    """What the first pattern that matches a module says, as PEFT looks it up."""
    for pattern, value in (values or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def scale_of(config: Mapping[str, Any], name: str, r: int, folder: str) -> float:
    """What the product of two factors is multiplied by.

    Raises:
      UserError: their rank is not what the config says.
    """
    said = _pattern(config.get("rank_pattern"), name) or config["r"]
    alpha = _pattern(config.get("alpha_pattern"), name) or config["lora_alpha"]
    if said != r:
        raise UserError(
            f"{folder}: {name[:120]} has rank {r}, and {CONFIG} says {said:g} (r, rank_pattern). Copy both "
            f"files again."
        )
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)
