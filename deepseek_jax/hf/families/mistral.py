"""Mixtral (experts) and Mistral (dense)."""

from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families.family import Family, Options, Window
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    GROUPED_QUERY_OPTIONS,
    SOFTMAX_ROUTING,
)
from deepseek_jax.hf.families.name_tables import DENSE, GROUPED_QUERY, NORMS, NameTable, shared_core

MIXTRAL_EXPERTS: NameTable = shared_core("block_sparse_moe.experts") | {
    "mlp/gate/kernel": (("block_sparse_moe.gate.weight",), ("mlp.gate.weight",)),
    "mlp/experts/gate_up_proj": (
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        ("mlp.experts.gate_up_proj",),
    ),
    "mlp/experts/down_proj": (
        ("block_sparse_moe.experts.{e}.w2.weight",),
        ("mlp.experts.down_proj",),
    ),
}


def read_expert_width(given: dict[str, Any], options: Options) -> None:
    """All layers have experts, and `intermediate_size` is theirs."""
    if "intermediate_size" in options:
        options["moe_intermediate_size"] = options["intermediate_size"]


def write_expert_width(model: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": model.moe_intermediate_size}


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors=NORMS | GROUPED_QUERY | MIXTRAL_EXPERTS,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS, "num_experts_per_tok"),
    defaults=COMMON_DEFAULTS
    | dict(
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=131072,
        num_key_value_heads=8,
        head_dim=None,
        n_routed_experts=8,
        num_experts_per_tok=2,
    ),
    fixed=SOFTMAX_ROUTING
    | dict(norm_topk_prob=True, rope_interleave=False, first_k_dense_replace=0),
    renamed=dict(num_local_experts="n_routed_experts", num_experts="n_routed_experts"),
    only=dict(attention_bias=(False,)),
    window=Window(None),
    complete=read_expert_width,
    extra_keys=write_expert_width,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS),
    defaults=COMMON_DEFAULTS
    | dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=None),
    fixed=dict(rope_interleave=False),
    only=dict(attention_bias=(False,)),
    dense=True,
    window=Window(4096),
)
