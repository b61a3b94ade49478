"""Keys of config.json about the rotation of q and k, to options and back.

Files up to transformers 4 have `rope_theta` and `rope_scaling`, those of transformers 5 `rope_parameters`
with both.
"""

import dataclasses
from typing import Any

from deepseek_jax.config.options import ModelConfig, RopeScaling
from deepseek_jax.errors import UserError
from deepseek_jax.hf.families import Family
from deepseek_jax.model.rope import attention_factor

# Keys of config.json.
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# Keys of `rope_scaling` and `rope_parameters`.
SCALING_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "attn_factor",
    "low_freq_factor",
    "high_freq_factor",
}
TYPES = ("default", "linear", "yarn", "llama3")
# What a file must say, and what it may say, of each type beside `factor` and the original length.
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_FACTORS = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
# What export always writes of each type.
_WRITTEN = {
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow"),
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read(given: dict[str, Any], family: Family, longest: int) -> dict[str, Any]:
    """Options of rotation.

    Args:
      given: the keys of config.json that are not null.
      family: of its model_type.
      longest: max_position_embeddings.

    Returns:
      rope_theta, partial_rotary_factor and rope_scaling.

    Raises:
      UserError: a key is missing or unknown, or this version does not compute its value.
    """
    stated = given.get("rope_scaling") or given.get("rope_parameters") or {}
    stated = {k: v for k, v in stated.items() if v is not None}
    type_ = stated.get("rope_type", stated.get("type", "default"))
    if stated.pop("truncate", True) is not True:
        raise UserError("config.json: rope_scaling.truncate=false is not in this version.")
    if type_ not in TYPES:
        raise UserError(
            f"config.json: rope_scaling.rope_type={type_!r} is not in this version, which has default, "
            f"linear, yarn and llama3."
        )
    if unknown := sorted(stated.keys() - SCALING_KEYS):
        raise UserError(
            f"config.json: rope_scaling.{unknown[0]}={stated[unknown[0]]!r} is not a key that this version "
            f"knows, and it may change what the model computes. Remove it if it does not."
        )

    def value(key: str) -> Any:
        return stated.get(key, given.get(key, family.defaults[key]))

    theta, partial = value("rope_theta"), value("partial_rotary_factor")
    if partial != 1.0 and not family.partial_rotary:
        raise UserError(
            f"config.json: partial_rotary_factor={partial} of {family.model_type} is not in this version."
        )
    out: dict[str, Any] = {"rope_theta": float(theta), "partial_rotary_factor": float(partial)}
    return out | {"rope_scaling": _scaling(stated, type_, longest)}


def _scaling(stated: dict[str, Any], type_: str, longest: int) -> RopeScaling:
    if type_ == "default":
        return RopeScaling()
    needed = _NEEDED.get(type_, ())
    if type_ == "yarn" and "original_max_position_embeddings" not in stated:
        needed = ("factor",)
    if missing := [k for k in needed if k not in stated]:
        raise UserError(
            f"config.json: rope_scaling.{missing[0]} of rope_type={type_!r} is missing. Give it."
        )
    original = int(stated.get("original_max_position_embeddings", longest))
    scaling: dict[str, Any] = dict(
        type=type_, factor=float(stated.get("factor", longest / original))
    )
    if type_ in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = original
    for key in _FACTORS.get(type_, ()):
        if key in stated:
            scaling[key] = float(stated[key])
    if type_ == "yarn" and "attn_factor" in stated and "attention_factor" not in stated:
        # DeepSeek-R1-0528-Qwen3-8B has it. YaRN's own code, vLLM and SGLang multiply what cos and sin are
        # scaled by with it, which gives 1 there; transformers knows attention_factor only, warns of this key
        # and computes 1.139. Ours is what the model was released for, and an export says it in both words, so
        # that all compute the same from then on.
        plain = attention_factor(RopeScaling(**scaling))
        scaling["attention_factor"] = plain * float(stated["attn_factor"])
    return RopeScaling(**scaling)


def write(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Keys of config.json: rope_theta and rope_scaling up to transformers 4, rope_parameters for 5."""
    out: dict[str, Any] = {"rope_theta": model.rope_theta}
    if family.partial_rotary:
        out["partial_rotary_factor"] = model.partial_rotary_factor
    rope = model.rope_scaling
    scaling: dict[str, Any] = {"rope_type": rope.type}
    if rope.type != "default":
        scaling["factor"] = rope.factor
        scaling |= {key: getattr(rope, key) for key in _WRITTEN[rope.type]}
        if rope.type == "yarn":
            for key in ("mscale", "mscale_all_dim", "attention_factor"):
                if getattr(rope, key):
                    scaling[key] = getattr(rope, key)
        if rope.attention_factor:  # for vLLM and SGLang, as _scaling explains
            plain = dataclasses.replace(rope, attention_factor=0.0)
            scaling["attn_factor"] = rope.attention_factor / attention_factor(plain)
        # "type" is for DeepSeek's code and for transformers before 4.45.
        out["rope_scaling"] = {"type": rope.type, **scaling}
    parameters = {k: v for k, v in out.items() if k != "rope_scaling"} | scaling
    return out | {"rope_parameters": parameters}
