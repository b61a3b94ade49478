"""A first DeepSeek-V3-style model on Python's own source code."""

from ml_collections import ConfigDict

from deepseek_jax.config import UserError, base_config


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise UserError(f"configs/tiny.py:{arg} is not known. Write configs/tiny.py.")
    c = base_config()
    m = c.model
    m.hidden_size, m.intermediate_size, m.moe_intermediate_size = 160, 448, 96
    m.num_hidden_layers, m.first_k_dense_replace = 4, 1
    m.num_attention_heads, m.kv_lora_rank = 4, 64
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 32, 16, 32
    m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = 8, 1, 2
    m.max_position_embeddings, m.initializer_range = 512, 0.05
    # Bytes are few and frequent: balance needs a faster bias than at scale, and two places a mean load spare most second rounds.
    c.moe.capacity_factor, c.moe.bias_update_rate = 2.0, 0.01
    c.data.eval_fraction = 0.02
    c.train.steps, c.train.batch_size, c.train.sequence_length = 1000, 8, 256
    c.train.dtype, c.train.remat = "float32", "none"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-3, 50
    c.eval.batches = 32
    return c
