"""rednote's dots.llm1."""

from deepseek_jax.hf.families.family import Family, Window
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    DEEPSEEK_EXPERT_OPTIONS,
    EXPERT_DEFAULTS,
    GROUPED_QUERY_OPTIONS,
    SIGMOID_ROUTING,
)
from deepseek_jax.hf.families.name_tables import DEEPSEEK_EXPERTS, DENSE, GROUPED_QUERY, NORMS

DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE | DEEPSEEK_EXPERTS,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS, *DEEPSEEK_EXPERT_OPTIONS, "attention_bias"),
    defaults={k: v for k, v in EXPERT_DEFAULTS.items() if k != "n_shared_experts"}
    | COMMON_DEFAULTS
    | dict(
        max_position_embeddings=2048,
        num_key_value_heads=32,
        head_dim=None,
        attention_bias=False,
        moe_intermediate_size=1408,
        first_k_dense_replace=0,
        norm_topk_prob=False,
    ),
    fixed=SIGMOID_ROUTING | dict(use_qk_norm=True, rope_interleave=False),
    renamed=dict(num_local_experts="n_routed_experts"),
    # transformers has one way to choose, whatever these say; releases call it by either name in
    # scoring_func.
    only=dict(scoring_func=("sigmoid", "noaux_tc"), topk_method=("noaux_tc",), use_qk_norm=(True,)),
    output_bias=True,
    window=Window(4096, first=62),
)
