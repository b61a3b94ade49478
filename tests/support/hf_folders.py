"""Hugging Face checkpoints of a small model whose weights are all zero."""

import json
import os

import numpy as np
import safetensors.numpy

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf import configuration, names
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model

MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


def source(folder, config=(), generation=None, files=()):
    """A Hugging Face checkpoint of MODEL, all numbers zero."""
    os.makedirs(folder)
    _, params, bias = abstract_model(config_for(MODEL, None)[0])
    leaves = [
        *names.leaves(params, "deepseek_v3", MODEL),
        *names.leaves(bias, "deepseek_v3", MODEL),
    ]
    shapes = {n: s for leaf in leaves for n, s in names.tensors(leaf).items()}
    safetensors.numpy.save_file(
        {n: np.zeros(s, np.float32) for n, s in shapes.items()},
        os.path.join(folder, "model.safetensors"),
    )
    for file, value in {
        "config.json": configuration.from_model(MODEL, "deepseek_v3") | dict(config),
        "generation_config.json": generation,
        **dict(files),
    }.items():
        if value is not None:
            with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
                f.write(value if isinstance(value, str) else json.dumps(value))
    return str(folder)
