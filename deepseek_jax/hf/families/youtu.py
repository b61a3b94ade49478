"""Tencent's Youtu: MLA without experts."""

import math
from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families.family import Family, Options
from deepseek_jax.hf.families.keys import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    MLA_OPTIONS,
    UNUSED_BY_MLA,
)
from deepseek_jax.hf.families.name_tables import DENSE, MLA, NORMS


def set_initializer_range(given: dict[str, Any], options: Options) -> None:
    """Its default follows the width."""
    if options["initializer_range"] is None:
        options["initializer_range"] = 2 / math.sqrt(5 * given.get("hidden_size", 1))


def extra_keys(model: ModelConfig) -> dict[str, Any]:
    return {"num_key_value_heads": model.num_attention_heads}


YOUTU = Family(
    model_type="youtu",
    architecture="YoutuForCausalLM",
    tensors=NORMS | MLA | DENSE,
    options=(*COMMON_OPTIONS, *MLA_OPTIONS, "rope_interleave"),
    defaults=COMMON_DEFAULTS
    | dict(
        max_position_embeddings=131072,
        initializer_range=None,
        tie_word_embeddings=True,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_interleave=True,
    ),
    fixed={},
    only=dict(attention_bias=(False,)),
    harmless=(*UNUSED_BY_MLA, "embedding_initializer_range"),
    dense=True,
    complete=set_initializer_range,
    extra_keys=extra_keys,
)
