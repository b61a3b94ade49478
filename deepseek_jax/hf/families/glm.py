"""GLM-4.5 and later (grouped-query attention), and GLM-4.7-Flash (MLA)."""

from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families.family import Family, Options, set_dense_layers
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    DEEPSEEK_EXPERT_OPTIONS,
    EXPERT_DEFAULTS,
    GROUPED_QUERY_OPTIONS,
    MLA_OPTIONS,
    ONLY_SIGMOID,
    SIGMOID_ROUTING,
)
from deepseek_jax.hf.families.name_tables import (
    DEEPSEEK_EXPERTS,
    DENSE,
    GROUPED_QUERY,
    MLA,
    MTP,
    NORMS,
)


def read_layer_types(given: dict[str, Any], options: Options) -> None:
    if "mlp_layer_types" in given:
        sparse = [kind == "sparse" for kind in given["mlp_layer_types"]]
        set_dense_layers(sparse, "mlp_layer_types", options)


def extra_keys(model: ModelConfig) -> dict[str, Any]:
    """transformers repeats keys and values for num_key_value_heads, of which its default is the release's."""
    dense = model.first_k_dense_replace
    layers = range(model.num_hidden_layers)
    return {
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in layers],
        "num_key_value_heads": model.num_attention_heads,
    }


MOE_LITE = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    tensors=NORMS | MLA | DENSE | DEEPSEEK_EXPERTS | MTP,
    options=(
        *COMMON_OPTIONS,
        *MLA_OPTIONS,
        *DEEPSEEK_EXPERT_OPTIONS,
        "rope_interleave",
        "num_nextn_predict_layers",
    ),
    defaults=COMMON_DEFAULTS
    | EXPERT_DEFAULTS
    | dict(
        rms_norm_eps=1e-5,
        max_position_embeddings=202752,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        rope_interleave=True,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
        routed_scaling_factor=1.8,
        num_nextn_predict_layers=0,
    ),
    fixed=SIGMOID_ROUTING,
    renamed=dict(num_local_experts="n_routed_experts", head_dim="qk_rope_head_dim"),
    only=ONLY_SIGMOID | dict(attention_bias=(False,)),
    harmless=("num_key_value_heads", "mlp_layer_types"),
    complete=read_layer_types,
    extra_keys=extra_keys,
)

MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE | DEEPSEEK_EXPERTS | MTP,
    options=(
        *COMMON_OPTIONS,
        *GROUPED_QUERY_OPTIONS,
        *DEEPSEEK_EXPERT_OPTIONS,
        "attention_bias",
        "use_qk_norm",
        "num_nextn_predict_layers",
    ),
    defaults=COMMON_DEFAULTS
    | EXPERT_DEFAULTS
    | dict(
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        partial_rotary_factor=0.5,
        num_key_value_heads=8,
        head_dim=None,
        attention_bias=False,
        use_qk_norm=False,
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    ),
    fixed=SIGMOID_ROUTING | dict(rope_interleave=False),
    renamed=dict(num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"),
    only=ONLY_SIGMOID,
    partial_rotary=True,
)
