"""Upstage's Solar Open: every layer has experts."""

from typing import Any

from deepseek_jax.hf.families.family import Family, Options
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    DEEPSEEK_EXPERT_OPTIONS,
    EXPERT_DEFAULTS,
    GROUPED_QUERY_OPTIONS,
    ONLY_SIGMOID,
    SIGMOID_ROUTING,
)
from deepseek_jax.hf.families.name_tables import DEEPSEEK_EXPERTS, GROUPED_QUERY, NORMS


def set_dense_width(given: dict[str, Any], options: Options) -> None:
    """No layer is dense, so that a file need not say how wide a dense one is."""
    options.setdefault("intermediate_size", options["moe_intermediate_size"])


SOLAR_OPEN = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DEEPSEEK_EXPERTS,
    options=(
        *COMMON_OPTIONS,
        *GROUPED_QUERY_OPTIONS,
        *(key for key in DEEPSEEK_EXPERT_OPTIONS if key != "first_k_dense_replace"),
        "attention_bias",
    ),
    defaults=COMMON_DEFAULTS
    | EXPERT_DEFAULTS
    | dict(
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=131072,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=False,
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1280,
    ),
    fixed=SIGMOID_ROUTING | dict(rope_interleave=False, first_k_dense_replace=0),
    renamed=dict(num_local_experts="n_routed_experts"),
    only=ONLY_SIGMOID | dict(first_k_dense_replace=(0,), use_qk_norm=(False,)),
    complete=set_dense_width,
)
