"""ByteDance's Seed-OSS."""

from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.families.keys import COMMON_DEFAULTS, COMMON_OPTIONS, GROUPED_QUERY_OPTIONS
from deepseek_jax.hf.families.name_tables import DENSE, GROUPED_QUERY, NORMS

SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    tensors=NORMS | GROUPED_QUERY | DENSE,
    options=(*COMMON_OPTIONS, *GROUPED_QUERY_OPTIONS, "attention_bias", "attention_out_bias"),
    defaults=COMMON_DEFAULTS
    | dict(
        max_position_embeddings=524288,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        attention_out_bias=False,
    ),
    fixed=dict(rope_interleave=False),
    # Its releases name dropouts of 0.1. They act in training only, and ours has none.
    harmless=("attention_dropout", "residual_dropout"),
    dense=True,
)
