"""Llama, and the many models with its architecture (SmolLM2, DeepSeek-R1's distilled Llamas)."""

from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.families.keys import COMMON_DEFAULTS, COMMON_OPTIONS, GROUPED_QUERY_OPTIONS
from deepseek_jax.hf.families.name_tables import DENSE, GROUPED_QUERY, NORMS

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS, "attention_bias"),
    defaults=COMMON_DEFAULTS
    | dict(
        max_position_embeddings=2048,
        num_key_value_heads=None,
        head_dim=None,
        attention_bias=False,
    ),
    fixed=dict(rope_interleave=False),
    only=dict(qkv_bias=(False,)),
    dense=True,
    output_bias=True,
)
