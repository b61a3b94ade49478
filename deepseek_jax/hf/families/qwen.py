"""Qwen2, Qwen2.5 and Qwen3, dense and with experts."""

from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families.family import Family, Options, Window, set_dense_layers
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    GROUPED_QUERY_OPTIONS,
    SOFTMAX_ROUTING,
)
from deepseek_jax.hf.families.name_tables import DENSE, EXPERTS, GROUPED_QUERY, NORMS


def read_sparse_step(given: dict[str, Any], options: Options) -> None:
    every, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
    layers = range(given.get("num_hidden_layers", 0))
    sparse = [i not in dense and every > 0 and (i + 1) % every == 0 for i in layers]
    set_dense_layers(sparse, f"mlp_only_layers={dense} and decoder_sparse_step={every}", options)


def write_sparse_step(model: ModelConfig) -> dict[str, Any]:
    dense = list(range(model.first_k_dense_replace))
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE | EXPERTS,
    options=(
        *COMMON_OPTIONS,
        *GROUPED_QUERY_OPTIONS,
        "attention_bias",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "norm_topk_prob",
    ),
    defaults=COMMON_DEFAULTS
    | dict(
        max_position_embeddings=32768,
        num_key_value_heads=4,
        head_dim=None,
        attention_bias=False,
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
    ),
    fixed=SOFTMAX_ROUTING | dict(use_qk_norm=True, rope_interleave=False),
    renamed=dict(num_experts="n_routed_experts", num_local_experts="n_routed_experts"),
    only=dict(qkv_bias=(False,), use_qk_norm=(True,), shared_expert_intermediate_size=(0,)),
    harmless=("mlp_only_layers", "decoder_sparse_step"),
    output_bias=True,
    window=Window(4096, switched=True),
    complete=read_sparse_step,
    extra_keys=write_sparse_step,
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS),
    defaults=COMMON_DEFAULTS
    | dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=None),
    fixed=dict(attention_bias=True, rope_interleave=False),
    only=dict(attention_bias=(True,), qkv_bias=(True,)),
    dense=True,
    window=Window(4096, switched=True, first=28),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS, "attention_bias"),
    defaults=COMMON_DEFAULTS
    | dict(
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=128,
        attention_bias=False,
    ),
    fixed=dict(use_qk_norm=True, rope_interleave=False),
    only=dict(qkv_bias=(False,), use_qk_norm=(True,)),
    dense=True,
    output_bias=True,
    window=Window(4096, switched=True, first=28),
)
