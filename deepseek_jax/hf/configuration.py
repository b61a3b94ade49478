"""config.json of a Hugging Face model to `ModelConfig` and back.

What its keys mean is said by the record of its family (families/), what it must not say by config_checks.py,
how q and k are rotated by rotation.py. Where a key is missing the default is that of `transformers` for the
family.
"""

import dataclasses
from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import rotation, shared_core
from deepseek_jax.hf.config_checks import check_keys, check_quantisation, check_window
from deepseek_jax.hf.families import ALIASES, FAMILIES, Family
from deepseek_jax.hf.families.keys import (
    DEEPSEEK_EXPERT_OPTIONS,
    NULL,
    NULL_IS_MISSING,
    REQUIRED,
)


def family_of(config: dict[str, Any]) -> str:
    """The family of a config.json: a key of FAMILIES.

    Raises:
      UserError: it has no model_type of ours.
    """
    kind = config.get("model_type")
    if isinstance(kind, str):
        kind = ALIASES.get(kind, kind)
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r} is not known. These are: {', '.join([*FAMILIES, *ALIASES])}."
        )
    return kind


def to_model(config: dict[str, Any]) -> ModelConfig:
    """The options of the model that a config.json describes.

    Raises:
      UserError: a key is missing, unknown, or has a value that this version does not compute.
    """
    family = FAMILIES[family_of(config)]
    given = {k: v for k, v in config.items() if v is not None}
    check_keys(given, family)
    check_quantisation(given)
    options = dict(family.defaults) | dict(family.fixed) | _stated_options(config, family)
    check_window(config, family, options)
    _complete_heads(given, family, options)
    if family.dense:
        options["first_k_dense_replace"] = given.get("num_hidden_layers", 0)
    family.complete(given, options)
    options["shared_core_rank"] = shared_core.rank_of(given, family)
    if missing := [k for k in (*REQUIRED, *family.options) if k not in options]:
        raise UserError(
            f"config.json: {missing[0]} is missing. Copy config.json again from where the "
            f"checkpoint came from."
        )
    options |= rotation.read(given, family, options["max_position_embeddings"])
    return ModelConfig(
        **{
            f.name: _typed(f, options[f.name])
            for f in dataclasses.fields(ModelConfig)
            if f.name in options
        }
    )


def _stated_options(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Options that a config.json states, under their own names or others that transformers takes for them."""
    out: dict[str, Any] = {}
    types = {f.name: f for f in dataclasses.fields(ModelConfig)}
    null_is_missing = (*NULL_IS_MISSING, *family.renamed, *REQUIRED)
    keys = {key: key for key in family.options if key not in family.fixed} | family.renamed
    for key, option in keys.items():
        if key not in config or (config[key] is None and key in null_is_missing):
            continue
        if config[key] is None and option not in NULL:
            raise UserError(
                f"config.json: {key}=null says nothing. Give its value, or leave it out for "
                f"{family.model_type}'s default, {family.defaults.get(option)}."
            )
        value = NULL[option] if config[key] is None else _typed(types[option], config[key])
        if out.setdefault(option, value) != value:
            first = next(k for k in keys if keys[k] == option and k in config)
            raise UserError(
                f"config.json: {first}={config[first]!r} and {key}={config[key]!r} are the same "
                f"option of {family.model_type}. Remove one of them."
            )
    return out


def _typed(field: dataclasses.Field, value: Any) -> Any:
    types: dict[Any, tuple] = {float: (int, float), int | None: (int, type(None))}
    if type(value) not in types.get(field.type, (field.type,)):
        raise UserError(
            f"config.json: {field.name}={value!r} has the type {type(value).__name__}. Correct it."
        )
    return float(value) if field.type is float else value


def _complete_heads(given: dict[str, Any], family: Family, options: dict[str, Any]) -> None:
    """Number and width of heads, where they follow from others; num_key_value_heads=None stands for MLA."""
    if "num_key_value_heads" not in family.options:
        options["num_key_value_heads"] = None
        return
    heads = given.get("num_attention_heads")
    width = given.get("hidden_size", 0) // heads if heads else None
    options["num_key_value_heads"] = options["num_key_value_heads"] or heads
    options["head_dim"] = options["head_dim"] or width
    options.setdefault("attention_out_bias", family.output_bias and options["attention_bias"])


def from_model(model: ModelConfig, kind: str) -> dict[str, Any]:
    """A config.json of the family, in the keys of the hub, and of transformers 5 where it has others."""
    family = FAMILIES[kind]
    out: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    out |= {key: getattr(model, key) for key in family.options if key not in family.fixed}
    out |= {
        key: getattr(model, option)
        for key, option in family.renamed.items()
        if option not in family.options
    }
    out |= family.extra_keys(model)
    if model.shared_core_rank:
        out[shared_core.KEY] = {"rank": model.shared_core_rank}
    if family.window is not None:
        out["sliding_window"] = None
    if "head_dim" in out:
        out["head_dim"] = model.qk_head_dim
    return out | rotation.write(model, family)


def find_family(model: ModelConfig) -> str:
    """The family that has a model with these options.

    Raises:
      UserError: none has.
    """
    closest = ("", [""] * 99)
    for kind in FAMILIES:
        try:
            there = to_model(from_model(model, kind))
        except UserError:
            continue
        differ = [
            f.name
            for f in dataclasses.fields(ModelConfig)
            if getattr(there, f.name) != getattr(model, f.name) and computes(model, f.name)
        ]
        if not differ:
            return kind
        closest = min(closest, (kind, differ), key=lambda c: len(c[1]))
    kind, differ = closest
    raise UserError(
        f"no family of Hugging Face computes what config.model asks for: {kind} is closest, and has other "
        f"{', '.join(differ)}. Set these as that family has them."
    )


def computes(model: ModelConfig, option: str) -> bool:
    """Whether an option has a part in what the model computes, given the others."""
    if option in ("aux_loss_alpha", "seq_aux", "initializer_range", "max_position_embeddings"):
        return False
    if option == "head_dim":
        return False  # qk_head_dim tells
    if option in model.attention_shape.unread:
        return False
    routing = (*DEEPSEEK_EXPERT_OPTIONS, "scoring_func", "topk_method", "shared_core_rank")
    if option in routing and option != "first_k_dense_replace" and not model.has_experts:
        return False
    if option == "intermediate_size" and not model.first_k_dense_replace:
        return False
    return not (
        option in ("n_group", "topk_group")
        and (model.topk_method == "greedy" or model.topk_group == model.n_group)
    )
