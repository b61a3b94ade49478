"""config.json of a Hugging Face model to `config.Model` and back.

Every key is one of: an option of the model, a key that must have the value which this version computes, or a key that changes nothing
that a model computes. Any other key is refused by name, as it may change the mathematics. Where a key is missing the default is that
of `transformers` for the family.
"""

import dataclasses
from typing import Any, NamedTuple

from deepseek_jax.config import Model, RopeScaling, UserError

# Keys of every family that change nothing in what a trained model computes, with those that begin with "_" (transformers' notes to itself) or
# end with "_token_id" (which generation reads). `router_aux_loss_coef` is a term of transformers' training loss; ours is aux_loss_alpha.
HARMLESS = {
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "name_or_path", "use_cache",
    "temperature", "top_p", "top_k", "do_sample", "max_length", "repetition_penalty", "ep_size", "output_router_logits", "router_aux_loss_coef",
    "max_window_layers", "qk_head_dim",
    "output_attentions", "output_hidden_states", "return_dict", "tokenizer_class", "id2label", "label2id", "problem_type",
    "task_specific_params", "unsloth_version", "unsloth_fixed", "chunk_size_feed_forward", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "quantization_config", "num_mtp_layers", "is_llama_config", "transformers.js_config",
}
# Keys that must have one of these values: others would compute something else. None is always fine.
ONLY = {
    "hidden_act": ("silu",), "attention_dropout": (0, 0.0), "mlp_bias": (False,), "pretraining_tp": (1,), "moe_layer_freq": (1,),
    "router_jitter_noise": (0, 0.0), "use_sliding_window": (False,), "use_mrope": (False,), "is_decoder": (False,), "add_cross_attention": (False,),
    "is_encoder_decoder": (False,), "cross_attention_hidden_size": (), "pruned_heads": ({},), "tie_encoder_decoder": (False,),
    "residual_dropout": (0.0,), "rope_interleaved": (False,),
    "num_nextn_predict_layers": (0,),
}
ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
             "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor"}

EVERY = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "max_position_embeddings",
         "initializer_range", "tie_word_embeddings")
OF_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
OF_GROUPED_QUERY = ("num_key_value_heads", "head_dim")
OF_DEEPSEEK_EXPERTS = ("moe_intermediate_size", "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
                       "topk_group", "norm_topk_prob", "routed_scaling_factor", "aux_loss_alpha", "seq_aux")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_ALL = dict(initializer_range=0.02, tie_word_embeddings=False, rms_norm_eps=1e-6, aux_loss_alpha=0.0, seq_aux=True)
_SIGMOID = dict(scoring_func="sigmoid", topk_method="noaux_tc")
_SOFTMAX = dict(scoring_func="softmax", topk_method="greedy", n_shared_experts=0, n_group=1, topk_group=1, routed_scaling_factor=1.0)


class Family(NamedTuple):
    """What a `model_type` means."""

    architecture: str
    options: tuple[str, ...]  # keys that are options of ours by the same name
    defaults: dict[str, Any]  # of keys that may be missing or None
    fixed: dict[str, Any]  # options of ours that the family has no key for
    renamed: dict[str, str] = {}  # key -> option of ours
    only: dict[str, tuple] = {}  # as ONLY, of this family
    harmless: tuple[str, ...] = ()


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "topk_method"),
        _ALL | dict(q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0, first_k_dense_replace=0,
                    n_shared_experts=2),
        # transformers ignores norm_topk_prob here; DeepSeek's own code would not, and all of its releases have it off.
        dict(scoring_func="softmax", rope_interleave=True, norm_topk_prob=False),
        only=dict(scoring_func=("softmax",), attention_bias=(False,)), harmless=("num_key_value_heads", "head_dim", "num_local_experts")),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "rope_interleave", "num_nextn_predict_layers"),
        _ALL | dict(q_lora_rank=None, n_group=1, topk_group=1, rope_interleave=True, num_nextn_predict_layers=0, norm_topk_prob=True,
                    n_shared_experts=1, first_k_dense_replace=3, routed_scaling_factor=2.5),
        _SIGMOID, renamed=dict(num_mtp_layers="num_nextn_predict_layers"),
        only=dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",), attention_bias=(False,)),
        harmless=("num_key_value_heads", "head_dim", "num_local_experts")),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM", (*EVERY, *OF_MLA, *OF_DEEPSEEK_EXPERTS, "rope_interleave", "num_nextn_predict_layers"),
        _ALL | dict(rms_norm_eps=1e-5, n_group=1, topk_group=1, rope_interleave=True, num_nextn_predict_layers=0, norm_topk_prob=True,
                    n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.8),
        _SIGMOID, only=dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",), attention_bias=(False,)),
        harmless=("num_key_value_heads", "head_dim", "num_local_experts", "mlp_layer_types")),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", (*EVERY, *OF_GROUPED_QUERY, *OF_DEEPSEEK_EXPERTS, "attention_bias", "use_qk_norm", "num_nextn_predict_layers"),
        _ALL | dict(rms_norm_eps=1e-5, head_dim=None, attention_bias=False, use_qk_norm=False, n_group=1, topk_group=1, norm_topk_prob=True,
                    n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.0, num_nextn_predict_layers=0),
        _SIGMOID | dict(attention_out_bias=False, rope_interleave=False), only=dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
        harmless=("num_local_experts",)),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", (*EVERY, *OF_GROUPED_QUERY, "attention_bias", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob"),
        _ALL | dict(head_dim=128, attention_bias=False, norm_topk_prob=False),
        _SOFTMAX | dict(use_qk_norm=True, rope_interleave=False), renamed=dict(num_experts="n_routed_experts", num_local_experts="n_routed_experts"),
        harmless=("mlp_only_layers", "decoder_sparse_step", "sliding_window")),
    "mixtral": Family(
        "MixtralForCausalLM", (*EVERY, *OF_GROUPED_QUERY, "num_experts_per_tok"),
        _ALL | dict(rms_norm_eps=1e-5, head_dim=None),
        _SOFTMAX | dict(norm_topk_prob=True, rope_interleave=False, first_k_dense_replace=0), renamed=dict(num_local_experts="n_routed_experts"),
        only=dict(attention_bias=(False,)), harmless=("sliding_window",)),
    "qwen2": Family(
        "Qwen2ForCausalLM", (*EVERY, *OF_GROUPED_QUERY), _ALL | dict(head_dim=None),
        dict(attention_bias=True, rope_interleave=False), only=dict(attention_bias=(True,)), harmless=("sliding_window", "layer_types")),
    "qwen3": Family(
        "Qwen3ForCausalLM", (*EVERY, *OF_GROUPED_QUERY, "attention_bias"), _ALL | dict(head_dim=128, attention_bias=False),
        dict(use_qk_norm=True, rope_interleave=False), harmless=("sliding_window", "layer_types")),
    "llama": Family(
        "LlamaForCausalLM", (*EVERY, *OF_GROUPED_QUERY, "attention_bias"), _ALL | dict(head_dim=None, attention_bias=False),
        dict(rope_interleave=False)),
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # the same model under another name
BIAS_OUT_TOO = ("llama", "qwen3", "qwen3_moe")  # attention_bias is of the output projection as well


def family_of(config: dict[str, Any]) -> str:
    """The family of a config.json: a key of FAMILIES.

    Raises:
      UserError: it has no model_type of ours.
    """
    kind = config.get("model_type")
    kind = ALIASES.get(kind, kind)
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type={kind!r} is not known. These are: {', '.join([*FAMILIES, *ALIASES])}.")
    return kind


def to_model(config: dict[str, Any]) -> Model:
    """The options of the model that a config.json describes.

    Raises:
      UserError: a key is missing, unknown, or has a value that this version does not compute.
    """
    kind = family_of(config)
    family = FAMILIES[kind]
    given = {k: v for k, v in config.items() if v is not None}
    only = {k: v for k, v in (ONLY | family.only).items() if k not in family.options}
    known = HARMLESS | set(family.options) | set(family.renamed) | set(only) | set(family.harmless)
    if unknown := [k for k in given if k not in known and not k.startswith("_") and not k.endswith("_token_id")]:
        raise UserError(f"config.json: {unknown[0]}={given[unknown[0]]!r} is not a key of {kind} that this version knows, and it may change what the "
                        f"model computes. Remove it if it does not.")
    for key, values in only.items():
        if key in given and given[key] not in values:
            raise UserError(f"config.json: {key}={given[key]!r} is not in this version, which computes {kind} with "
                            f"{key}={', '.join(map(repr, values)) or None} only.")
    types = {f.name: f for f in dataclasses.fields(Model)}
    for key in (*family.options, *family.renamed):
        if key in given:
            _typed(types[family.renamed.get(key, key)], given[key])
    quantised = given.get("quantization_config", {})
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised and method != "fp8":
        raise UserError(f"config.json: quantization_config.quant_method={method!r} is not in this version, which reads fp8 with scales of blocks. "
                        f"Take the checkpoint in bfloat16.")
    _check_window(given, kind)
    options = dict(family.defaults) | dict(family.fixed)
    for key in family.options:
        if key in given and key not in family.fixed:
            options[key] = given[key]
    for key, option in family.renamed.items():
        if key in given:
            options[option] = given[key]
    if "num_key_value_heads" in family.options:
        options.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        options["attention_out_bias"] = kind in BIAS_OUT_TOO and options["attention_bias"]
        if options["head_dim"] is None and given.get("num_attention_heads"):
            options["head_dim"] = given.get("hidden_size", 0) // given["num_attention_heads"]
    else:
        options["num_key_value_heads"] = None
    _layers(kind, given, options)
    options.setdefault("max_position_embeddings", 4096)
    missing = [k for k in (*REQUIRED, *family.options) if k not in options]
    if missing:
        raise UserError(f"config.json: {missing[0]} is missing. Copy config.json again from where the checkpoint came from.")
    options |= _rope(given, kind, options["max_position_embeddings"])
    return Model(**{f.name: _typed(f, options[f.name]) for f in dataclasses.fields(Model) if f.name in options})


def _typed(field: dataclasses.Field, value: Any) -> Any:
    wanted = {float: (int, float), int | None: (int, type(None))}.get(field.type, (field.type,))
    if type(value) not in wanted:
        raise UserError(f"config.json: {field.name}={value!r} has the type {type(value).__name__}. Correct it.")
    return float(value) if field.type is float else value


def _check_window(given: dict[str, Any], kind: str) -> None:
    window, most = given.get("sliding_window"), given.get("max_position_embeddings", 0)
    if window is not None and given.get("use_sliding_window", kind in ("mixtral",)) and window < most:
        raise UserError(f"config.json: sliding_window={window} is not in this version, and max_position_embeddings={most} is above it. "
                        f"Set sliding_window to null, if attention to all positions is wanted.")
    if any(t != "full_attention" for t in given.get("layer_types", ())):
        raise UserError(f"config.json: layer_types={given['layer_types']!r} has layers of other than full attention, which are not in this version.")


def _layers(kind: str, given: dict[str, Any], options: dict[str, Any]) -> None:
    """Which layers have experts: ours are those after the first `first_k_dense_replace`."""
    layers = given.get("num_hidden_layers", 0)
    if kind in ("qwen2", "qwen3", "llama"):
        options["first_k_dense_replace"] = layers
    if kind == "mixtral":
        options["moe_intermediate_size"] = given.get("intermediate_size")
    if kind == "qwen3_moe":
        every, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
        sparse = [i not in dense and every > 0 and (i + 1) % every == 0 for i in range(layers)]
        _dense_first(sparse, f"mlp_only_layers={dense} and decoder_sparse_step={every}", options)
    if "mlp_layer_types" in given:
        _dense_first([t == "sparse" for t in given["mlp_layer_types"]], "mlp_layer_types", options)


def _dense_first(sparse: list[bool], what: str, options: dict[str, Any]) -> None:
    first = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[first:]):
        raise UserError(f"config.json: {what} put dense layers after layers with experts, which is not in this version.")
    options["first_k_dense_replace"] = first


def _rope(given: dict[str, Any], kind: str, longest: int) -> dict[str, Any]:
    """Options of rotation, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    r = given.get("rope_scaling") or given.get("rope_parameters") or {}
    r = {k: v for k, v in r.items() if v is not None}
    type_ = r.get("rope_type", r.get("type", "default"))
    if r.pop("truncate", True) is not True:
        raise UserError("config.json: rope_scaling.truncate=false is not in this version.")
    if type_ not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"config.json: rope_scaling.rope_type={type_!r} is not in this version, which has default, linear, yarn and llama3.")
    if unknown := sorted(r.keys() - ROPE_KEYS):
        raise UserError(f"config.json: rope_scaling.{unknown[0]}={r[unknown[0]]!r} is not a key that this version knows, and it may change what "
                        f"the model computes. Remove it if it does not.")
    out: dict[str, Any] = {"rope_theta": float(r.get("rope_theta", given.get("rope_theta", 1e6 if kind == "mixtral" else 10000.0)))}
    partial = r.get("partial_rotary_factor", given.get("partial_rotary_factor", 0.5 if kind == "glm4_moe" else 1.0))
    if partial != 1.0 and kind != "glm4_moe":
        raise UserError(f"config.json: partial_rotary_factor={partial} of {kind} is not in this version.")
    if kind == "glm4_moe":
        out["partial_rotary_factor"] = float(partial)
    if type_ == "default":
        return out | {"rope_scaling": RopeScaling()}
    original = int(r.get("original_max_position_embeddings", longest))
    scaling = dict(type=type_, factor=float(r.get("factor", longest / original)))
    if type_ in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = original
    keys = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}
    for key in keys.get(type_, ()):
        if key in r:
            scaling[key] = float(r[key])
    return out | {"rope_scaling": RopeScaling(**scaling)}


def from_model(model: Model, kind: str) -> dict[str, Any]:
    """A config.json of the family, in the keys that checkpoints on the hub have."""
    family, m = FAMILIES[kind], model
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind, "hidden_act": "silu", "attention_dropout": 0.0}
    out |= {key: getattr(m, key) for key in family.options if key not in family.fixed}
    out |= {key: getattr(m, option) for key, option in family.renamed.items() if key in ("num_experts", "num_local_experts")}
    if kind == "qwen3_moe":
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(m.first_k_dense_replace))}
        out.pop("num_local_experts")
    if kind == "mixtral":
        out["intermediate_size"] = m.moe_intermediate_size
    if kind == "glm4_moe_lite":
        out["mlp_layer_types"] = ["dense" if i < m.first_k_dense_replace else "sparse" for i in range(m.num_hidden_layers)]
    if kind.startswith("deepseek"):
        out |= {"num_key_value_heads": m.num_attention_heads, "scoring_func": m.scoring_func, "topk_method": m.topk_method, "moe_layer_freq": 1,
                "attention_bias": False}
    if "head_dim" in out:
        out["head_dim"] = m.qk_head_dim
    out["rope_theta"] = m.rope_theta
    if kind == "glm4_moe":
        out["partial_rotary_factor"] = m.partial_rotary_factor
    r = m.rope_scaling
    if r.type != "default":
        keys = {"yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow"), "linear": (),
                "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}[r.type]
        out["rope_scaling"] = {"type": r.type, "rope_type": r.type, "factor": r.factor} | {k: getattr(r, k) for k in keys}
        if r.type == "yarn":
            out["rope_scaling"] |= {k: getattr(r, k) for k in ("mscale", "mscale_all_dim", "attention_factor") if getattr(r, k)}
    return out


def find_family(model: Model) -> str:
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
        differ = [f.name for f in dataclasses.fields(Model) if getattr(there, f.name) != getattr(model, f.name) and computes(model, f.name)]
        if not differ:
            return kind
        closest = min(closest, (kind, differ), key=lambda c: len(c[1]))
    kind, differ = closest
    raise UserError(f"no family of Hugging Face computes what config.model asks for: {kind} is closest, and has other {', '.join(differ)}. "
                    f"Set these as that family has them.")


def computes(model: Model, option: str) -> bool:
    """Whether an option has a part in what the model computes, given the others."""
    if option in ("aux_loss_alpha", "seq_aux", "initializer_range", "max_position_embeddings"):
        return False
    if option == "head_dim":
        return False  # qk_head_dim tells
    if option in (*OF_MLA, "rope_interleave") and model.num_key_value_heads is not None:
        return False
    routing = (*OF_DEEPSEEK_EXPERTS, "scoring_func", "topk_method")
    if option in routing and option != "first_k_dense_replace" and not model.has_experts:
        return False
    if option == "intermediate_size" and not model.first_k_dense_replace:
        return False
    return not (option in ("n_group", "topk_group") and (model.topk_method == "greedy" or model.topk_group == model.n_group))
