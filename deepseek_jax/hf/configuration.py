"""config.json of a Hugging Face model to `config.Model` and back.

Every key is one of: an option of the model, a key that must have the value which this version computes, or a key that changes nothing
that a model computes (families.py). Any other key is refused by name, as it may change the mathematics. Where
a key is missing the default is that of `transformers` for the family.
"""

import dataclasses
import math
from typing import Any

from deepseek_jax.config.options import ModelConfig, RopeScaling
from deepseek_jax.errors import UserError
from deepseek_jax.hf.families import (
    ALIASES,
    FAMILIES,
    HARMLESS,
    NULL,
    NULL_IS_MISSING,
    OF_DEEPSEEK_EXPERTS,
    ONLY,
    REQUIRED,
    Family,
)
from deepseek_jax.model.rope import attention_factor

ROPE_KEYS = {
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
# Keys of config.json that say how q and k are rotated.
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def family_of(config: dict[str, Any]) -> str:
    """The family of a config.json: a key of FAMILIES.

    Raises:
      UserError: it has no model_type of ours.
    """
    kind = config.get("model_type")
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
    kind = family_of(config)
    family = FAMILIES[kind]
    given = {k: v for k, v in config.items() if v is not None}
    _check_keys(given, kind)
    _check_quantisation(given)
    options = dict(family.defaults) | dict(family.fixed) | _given_options(config, kind)
    _check_window(config, kind, options)
    if "num_key_value_heads" in family.options:
        heads = given.get("num_attention_heads")
        options["num_key_value_heads"] = options["num_key_value_heads"] or heads
        options["head_dim"] = options["head_dim"] or (
            given.get("hidden_size", 0) // heads if heads else None
        )
        options.setdefault("attention_out_bias", family.out_bias and options["attention_bias"])
    else:
        options["num_key_value_heads"] = None
    if "initializer_range" in options and options["initializer_range"] is None:  # youtu's own
        options["initializer_range"] = 2 / math.sqrt(5 * given.get("hidden_size", 1))
    _layers(kind, given, options)
    if missing := [k for k in (*REQUIRED, *family.options) if k not in options]:
        raise UserError(
            f"config.json: {missing[0]} is missing. Copy config.json again from where the "
            f"checkpoint came from."
        )
    options |= _rope(given, family, kind, options["max_position_embeddings"])
    return ModelConfig(
        **{
            f.name: _typed(f, options[f.name])
            for f in dataclasses.fields(ModelConfig)
            if f.name in options
        }
    )


def _check_keys(given: dict[str, Any], kind: str) -> None:
    """Refuses keys that may change the mathematics, and values that do."""
    family = FAMILIES[kind]
    only = {
        k: v
        for k, v in (ONLY | family.only).items()
        if k not in family.options and k not in family.harmless
    }
    known = HARMLESS | set(family.options) | set(family.renamed) | set(only) | set(family.harmless)
    if unknown := [
        k for k in given if k not in known and not k.startswith("_") and not k.endswith("_token_id")
    ]:
        raise UserError(
            f"config.json: {unknown[0]}={given[unknown[0]]!r} is not a key of {kind} that this version knows, and it may change what the "
            f"model computes. Remove it if it does not."
        )
    for key, values in only.items():
        if key in given and given[key] not in values:
            raise UserError(
                f"config.json: {key}={given[key]!r} is not in this version, which computes {kind} with "
                f"{key}={', '.join(map(repr, values)) or None} only."
            )


def _check_quantisation(given: dict[str, Any]) -> None:
    quantised = given.get("quantization_config", {})
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised and method != "fp8":
        raise UserError(
            f"config.json: quantization_config.quant_method={method!r} is not in this version, which reads fp8 with scales of blocks. "
            f"Take the checkpoint in bfloat16."
        )


def _given_options(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Options that a config.json states, under their own names or others that transformers takes for them."""
    family, out = FAMILIES[kind], {}
    types = {f.name: f for f in dataclasses.fields(ModelConfig)}
    missing = (*NULL_IS_MISSING, *family.renamed, *REQUIRED)  # where they are null
    keys = {key: key for key in family.options if key not in family.fixed} | family.renamed
    for key, option in keys.items():
        if key not in config or (config[key] is None and key in missing):
            continue
        if config[key] is None and option not in NULL:
            raise UserError(
                f"config.json: {key}=null says nothing. Give its value, or leave it out for "
                f"{kind}'s default, {family.defaults.get(option)}."
            )
        value = NULL[option] if config[key] is None else _typed(types[option], config[key])
        if out.setdefault(option, value) != value:
            first = next(k for k in keys if keys[k] == option and k in config)
            raise UserError(
                f"config.json: {first}={config[first]!r} and {key}={config[key]!r} are the same "
                f"option of {kind}. Remove one of them."
            )
    return out


def _typed(field: dataclasses.Field, value: Any) -> Any:
    wanted = {float: (int, float), int | None: (int, type(None))}.get(field.type, (field.type,))
    if type(value) not in wanted:
        raise UserError(
            f"config.json: {field.name}={value!r} has the type {type(value).__name__}. Correct it."
        )
    return float(value) if field.type is float else value


def _check_window(config: dict[str, Any], kind: str, options: dict[str, Any]) -> None:
    """Refuses a sliding window that a layer has and a sequence can be longer than."""
    types, layers = config.get("layer_types"), options.get("num_hidden_layers", 0)
    most = options["max_position_embeddings"]
    if types is not None and (
        not isinstance(types, list) or any(t != "full_attention" for t in types)
    ):
        raise UserError(
            f"config.json: layer_types={str(types)[:200]} has layers of other than full "
            f"attention, which are not in this version."
        )
    window = FAMILIES[kind].window
    size, first = config.get("sliding_window", window and window.size), 0
    # transformers looks at use_sliding_window in some families; where it has no windows, a file may mean it.
    enabled = True
    if window is None or window.switched:
        enabled = config.get("use_sliding_window", window is None)
    if window is not None and window.first is not None:
        first = config.get("max_window_layers", window.first) if types is None else layers
    if size is None or not enabled:
        return
    for key, value in (("sliding_window", size), ("max_window_layers", first)):
        if type(value) is not int:
            raise UserError(
                f"config.json: {key}={value!r} has the type {type(value).__name__}. Correct it."
            )
    if first < layers and size < most:
        absent = "" if "sliding_window" in config else f" (what {kind} has where it is missing)"
        raise UserError(
            f"config.json: sliding_window={size}{absent} is not in this version, and "
            f"max_position_embeddings={most} is above it. "
            f"Set sliding_window to null, if attention to all positions is wanted."
        )


def _layers(kind: str, given: dict[str, Any], options: dict[str, Any]) -> None:
    """Which layers have experts: ours are those after the first `first_k_dense_replace`."""
    layers = given.get("num_hidden_layers", 0)
    if FAMILIES[kind].dense:
        options["first_k_dense_replace"] = layers
    if kind == "mixtral" and "intermediate_size" in options:
        options["moe_intermediate_size"] = options["intermediate_size"]
    if kind == "solar_open":  # no layer has one
        options.setdefault("intermediate_size", options["moe_intermediate_size"])
    if kind == "qwen3_moe":
        every, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
        sparse = [i not in dense and every > 0 and (i + 1) % every == 0 for i in range(layers)]
        _dense_first(sparse, f"mlp_only_layers={dense} and decoder_sparse_step={every}", options)
    if "mlp_layer_types" in given:
        _dense_first([t == "sparse" for t in given["mlp_layer_types"]], "mlp_layer_types", options)
    if (
        options.get("topk_method") == "group_limited_greedy"
        and not {"n_group", "topk_group"} <= given.keys()
    ):
        raise UserError(
            "config.json: topk_method='group_limited_greedy' needs n_group and topk_group. Give "
            "both."
        )


def _dense_first(sparse: list[bool], what: str, options: dict[str, Any]) -> None:
    first = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[first:]):
        raise UserError(
            f"config.json: {what} put dense layers after layers with experts, which is not in this version."
        )
    options["first_k_dense_replace"] = first


def _rope(given: dict[str, Any], family: Family, kind: str, longest: int) -> dict[str, Any]:
    """Options of rotation, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    r = given.get("rope_scaling") or given.get("rope_parameters") or {}
    r = {k: v for k, v in r.items() if v is not None}
    type_ = r.get("rope_type", r.get("type", "default"))
    if r.pop("truncate", True) is not True:
        raise UserError("config.json: rope_scaling.truncate=false is not in this version.")
    if type_ not in ("default", "linear", "yarn", "llama3"):
        raise UserError(
            f"config.json: rope_scaling.rope_type={type_!r} is not in this version, which has default, linear, yarn and llama3."
        )
    if unknown := sorted(r.keys() - ROPE_KEYS):
        raise UserError(
            f"config.json: rope_scaling.{unknown[0]}={r[unknown[0]]!r} is not a key that this version knows, and it may change what "
            f"the model computes. Remove it if it does not."
        )
    value = lambda key: r.get(key, given.get(key, family.defaults[key]))
    theta, partial = value("rope_theta"), value("partial_rotary_factor")
    if partial != 1.0 and kind != "glm4_moe":
        raise UserError(
            f"config.json: partial_rotary_factor={partial} of {kind} is not in this version."
        )
    out: dict[str, Any] = {"rope_theta": float(theta), "partial_rotary_factor": float(partial)}
    if type_ == "default":
        return out | {"rope_scaling": RopeScaling()}
    needed = ("factor",) if type_ == "linear" or "original_max_position_embeddings" not in r else ()
    needed = ("factor", "low_freq_factor", "high_freq_factor") if type_ == "llama3" else needed
    if missing := [k for k in needed if k not in r]:
        raise UserError(
            f"config.json: rope_scaling.{missing[0]} of rope_type={type_!r} is missing. Give it."
        )
    original = int(r.get("original_max_position_embeddings", longest))
    scaling = dict(type=type_, factor=float(r.get("factor", longest / original)))
    if type_ in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = original
    keys = {
        "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }
    for key in keys.get(type_, ()):
        if key in r:
            scaling[key] = float(r[key])
    if type_ == "yarn" and "attn_factor" in r and "attention_factor" not in r:
        # DeepSeek-R1-0528-Qwen3-8B has it. YaRN's own code, vLLM and SGLang multiply what cos and sin are
        # scaled by with it, which gives 1 there; transformers knows attention_factor only, warns of this key
        # and computes 1.139. Ours is what the model was released for, and an export says it in both words, so
        # that all compute the same from then on.
        scaling["attention_factor"] = attention_factor(RopeScaling(**scaling)) * float(
            r["attn_factor"]
        )
    return out | {"rope_scaling": RopeScaling(**scaling)}


def from_model(model: ModelConfig, kind: str) -> dict[str, Any]:
    """A config.json of the family, in the keys of the hub, and of transformers 5 where it has others."""
    family, m = FAMILIES[kind], model
    out: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    out |= {key: getattr(m, key) for key in family.options if key not in family.fixed}
    out |= {
        key: getattr(m, option)
        for key, option in family.renamed.items()
        if option not in family.options
    }
    if kind == "qwen3_moe":
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(m.first_k_dense_replace))}
    if kind == "mixtral":
        out["intermediate_size"] = m.moe_intermediate_size
    if kind == "glm4_moe_lite":
        out["mlp_layer_types"] = [
            "dense" if i < m.first_k_dense_replace else "sparse" for i in range(m.num_hidden_layers)
        ]
    if kind.startswith("deepseek"):
        out |= {
            "num_key_value_heads": m.num_attention_heads,
            "scoring_func": m.scoring_func,
            "topk_method": m.topk_method,
            "moe_layer_freq": 1,
            "attention_bias": False,
        }
    if kind == "youtu":
        out["num_key_value_heads"] = m.num_attention_heads
    if family.window is not None:
        out["sliding_window"] = None
    if "head_dim" in out:
        out["head_dim"] = m.qk_head_dim
    return out | rope_keys(m, kind)


def rope_keys(m: ModelConfig, kind: str) -> dict[str, Any]:
    """How q and k are rotated: rope_theta and rope_scaling up to transformers 4, rope_parameters for 5."""
    out: dict[str, Any] = {"rope_theta": m.rope_theta}
    if kind == "glm4_moe":
        out["partial_rotary_factor"] = m.partial_rotary_factor
    r = m.rope_scaling
    scaling: dict[str, Any] = {"rope_type": r.type}
    if r.type != "default":
        keys = {
            "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow"),
            "linear": (),
            "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        }[r.type]
        scaling |= {"factor": r.factor} | {k: getattr(r, k) for k in keys}
        if r.type == "yarn":
            scaling |= {
                k: getattr(r, k)
                for k in ("mscale", "mscale_all_dim", "attention_factor")
                if getattr(r, k)
            }
        if r.attention_factor:  # for vLLM and SGLang, as _rope explains
            plain = dataclasses.replace(r, attention_factor=0.0)
            scaling["attn_factor"] = r.attention_factor / attention_factor(plain)
        out["rope_scaling"] = {
            "type": r.type,
            **scaling,
        }  # "type": DeepSeek's code, transformers before 4.45
    return out | {
        "rope_parameters": {k: v for k, v in out.items() if k != "rope_scaling"} | scaling
    }


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
        f"no family of Hugging Face computes what config.model asks for: {kind} is closest, and has other {', '.join(differ)}. "
        f"Set these as that family has them."
    )


def computes(model: ModelConfig, option: str) -> bool:
    """Whether an option has a part in what the model computes, given the others."""
    if option in ("aux_loss_alpha", "seq_aux", "initializer_range", "max_position_embeddings"):
        return False
    if option == "head_dim":
        return False  # qk_head_dim tells
    if option in model.attention_shape.unread:
        return False
    routing = (*OF_DEEPSEEK_EXPERTS, "scoring_func", "topk_method")
    if option in routing and option != "first_k_dense_replace" and not model.has_experts:
        return False
    if option == "intermediate_size" and not model.first_k_dense_replace:
        return False
    return not (
        option in ("n_group", "topk_group")
        and (model.topk_method == "greedy" or model.topk_group == model.n_group)
    )
