"""The models that the benchmarks time: DeepSeek-V3 made small, in shapes that other programs are
timed with too.

small   a few layers, 8 experts
mid     8 layers of width 512, 16 experts of which a token takes 2
fine    many small experts: 64 of which a token takes 8, from 4 groups of 8
"""

from typing import Any

import numpy as np

from deepseek_jax.config.options import (
    Config,
    DataConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    TrainConfig,
)

_SHAPES: dict[str, dict[str, Any]] = {
    "small": dict(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
    "mid": dict(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        intermediate_size=1024,
        num_attention_heads=8,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        kv_lora_rank=128,
        q_lora_rank=192,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
    ),
    "fine": dict(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=4,
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_group=8,
        topk_group=4,
    ),
}
V2_LITE = ModelConfig(  # configs/v2_lite.py, for where there is no ml_collections to read it
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.001,
    seq_aux=True,
    initializer_range=0.006,
    max_position_embeddings=4096,
)
_TOKENS = {
    "small": (8, 256),
    "mid": (8, 512),
    "fine": (8, 256),
}  # sequences per step, tokens per sequence
NAMES = tuple(_SHAPES)


def config(name: str, dtype: str = "float32", remat: str = "dots") -> Config:
    """The options of a shape: AdamW, no token dropped, natural routing."""
    batch, length = _TOKENS[name]
    model = ModelConfig(
        **_SHAPES[name],
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        max_position_embeddings=length,
    )
    return Config(
        model=model,
        moe=MoeConfig(),
        data=DataConfig(),
        train=TrainConfig(batch_size=batch, sequence_length=length, dtype=dtype, remat=remat),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup_steps=0),
    )


def batches(config: Config, steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """A batch [n, S] for each step: text from a Markov chain with 8 successors per token, the
    likelier the earlier."""
    t, vocab = config.train, config.model.vocab_size
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, vocab, (vocab, 8))
    share = 1 / np.arange(1, 9)
    choices = np.searchsorted(
        np.cumsum(share / share.sum()), rng.random(steps * t.batch_size * (t.sequence_length + 1))
    )
    stream = np.empty(len(choices), np.int32)
    token = 0
    for i, choice in enumerate(np.minimum(choices, 7)):
        stream[i] = token
        token = successors[token, choice]
    position = np.broadcast_to(
        np.arange(t.sequence_length, dtype=np.int32), (t.batch_size, t.sequence_length)
    )
    return [
        {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": np.ones_like(position),
            "positions": position,
        }
        for text in stream.reshape(steps, t.batch_size, -1)
    ]
