"""DeepSeek-V2, V3 and R1, and Kimi-K2, which is a V3 under another name."""

from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.families.family import Family, Options
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    DEEPSEEK_EXPERT_OPTIONS,
    EXPERT_DEFAULTS,
    MLA_OPTIONS,
    ONLY_SIGMOID,
    SIGMOID_ROUTING,
    UNUSED_BY_MLA,
)
from deepseek_jax.hf.families.name_tables import DEEPSEEK_EXPERTS, DENSE, MLA, MTP, NORMS


def check_groups(given: dict[str, Any], options: Options) -> None:
    """transformers fails on such a file, and our defaults of both would choose among all experts."""
    limited = options.get("topk_method") == "group_limited_greedy"
    if limited and not {"n_group", "topk_group"} <= given.keys():
        raise UserError(
            "config.json: topk_method='group_limited_greedy' needs n_group and topk_group. Give "
            "both."
        )


def extra_keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": model.num_attention_heads,
        "scoring_func": model.scoring_func,
        "topk_method": model.topk_method,
        "moe_layer_freq": 1,
        "attention_bias": False,
    }


V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    tensors=NORMS | MLA | DENSE | DEEPSEEK_EXPERTS,
    options=(*COMMON_OPTIONS, *MLA_OPTIONS, *DEEPSEEK_EXPERT_OPTIONS, "topk_method"),
    defaults=COMMON_DEFAULTS
    | EXPERT_DEFAULTS
    | dict(
        max_position_embeddings=2048,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        topk_method="greedy",
        n_shared_experts=2,
        n_routed_experts=64,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
    ),
    # transformers ignores norm_topk_prob here; DeepSeek's own code would not, and all of its releases
    # have it off.
    fixed=dict(scoring_func="softmax", rope_interleave=True, norm_topk_prob=False),
    renamed=dict(num_experts="n_routed_experts"),
    only=dict(scoring_func=("softmax",), attention_bias=(False,)),
    harmless=(*UNUSED_BY_MLA, "num_local_experts"),
    complete=check_groups,
    extra_keys=extra_keys,
)

V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
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
        max_position_embeddings=4096,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_interleave=True,
        n_group=8,
        topk_group=4,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
    fixed=SIGMOID_ROUTING,
    renamed=dict(num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"),
    only=ONLY_SIGMOID | dict(attention_bias=(False,)),
    harmless=UNUSED_BY_MLA,
    aliases=("kimi_k2",),
    extra_keys=extra_keys,
)
