"""Small models with random weights in folders of Hugging Face, text for them, and commands on them."""

import dataclasses
import json
import os

import numpy as np
import safetensors.numpy

from deepseek_jax.compress import __main__ as command
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf import configuration
from deepseek_jax.hf.tokenizer_files import byte_tokenizer
from tests.support import conversion

# Widths all differ. One dense layer, three with experts, one of multi-token prediction.
GROUPED = ModelConfig(
    vocab_size=264,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=2,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
)
SIGMOID = dataclasses.replace(
    GROUPED, n_group=1, topk_group=1, num_nextn_predict_layers=0, norm_topk_prob=False
)
SOFTMAX = dataclasses.replace(
    SIGMOID, scoring_func="softmax", topk_method="greedy", routed_scaling_factor=1.0
)
WORDS = "the quick brown fox jumps over a lazy dog and then some more of it ".split()


def family_of(model: ModelConfig) -> str:
    return "deepseek_v2" if model.scoring_func == "softmax" else "deepseek_v3"


def folder(
    path, model: ModelConfig, seed: int = 0, weights=None, dtype="float32", family=""
) -> str:
    """A checkpoint of a model with random weights, or these, and a tokenizer of bytes."""
    os.makedirs(path)
    weights = conversion.random_weights(model, seed) if weights is None else weights
    stored = {
        n: a if n.endswith("e_score_correction_bias") else a.astype(np.dtype(dtype))
        for n, a in weights.items()
    }
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(a) for n, a in stored.items()},
        os.path.join(path, "model.safetensors"),
        {"format": "pt"},
    )
    config = configuration.from_model(model, family or family_of(model))
    files = {
        "config.json": json.dumps(config),
        "tokenizer.json": byte_tokenizer().to_str(),
        "generation_config.json": json.dumps({"eos_token_id": 256}),
    }
    for name, text in files.items():
        with open(os.path.join(path, name), "w", encoding="utf-8") as f:
            f.write(text)
    return str(path)


def text(path, documents: int = 6, seed: int = 0) -> str:
    """A file of short documents, a line each."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(documents):
            line = " ".join(rng.choice(WORDS, rng.integers(3, 7)))
            f.write(json.dumps({"text": line}) + "\n")
    return str(path)


def run(*argv: str) -> None:
    """A command of compress."""
    assert command.main([str(a) for a in argv]) == 0


def args_of(*argv: str):
    """Its options."""
    return command.parser().parse_args([str(a) for a in argv])


def tensors(path: str) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    out = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            out |= safetensors.numpy.load_file(os.path.join(path, name))
    return out
