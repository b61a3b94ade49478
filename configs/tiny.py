"""A first DeepSeek-V3: multi-head latent attention, 8 routed experts and a shared one, on the bytes of Python's own source code.

  python train.py --config=configs/tiny.py --workdir=runs/tiny          (or: make train)

Hardware: 2 CPU cores, 3 minutes (5 when the machine is busy), 1.5 GB. On 8 virtual devices:
  JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny.py --workdir=runs/mesh --config.mesh.fsdp=2 --config.mesh.expert=4
Source: the shape of DeepSeek-V3 (arXiv:2412.19437) made small; sigmoid router, bias-balanced, no token dropped.
Parameters: 1.89M, 1.06M active a token.
Expected held-out loss after 1,000 steps (2.05M tokens): 1.29 nats a token = 1.87 bits a byte, within 0.05 nats. The tolerance is for
other seeds and for other Python versions, whose sources are a little different; the same machine gives the same number again.
It begins at about 6 nats (ln 320 is 5.8); bytes drawn by their frequency have 3.1. `python -m benchmarks.tiny` trains it and checks.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import UserError, base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Raises:
      UserError: any arg.
    """
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
    # Bytes are few and frequent: balance needs a faster bias than at scale, and a capacity of twice the mean load spares most
    # second rounds.
    c.moe.capacity_factor, c.moe.bias_update_rate = 2.0, 0.01
    c.data.eval_fraction = 0.02
    c.train.steps, c.train.batch_size, c.train.sequence_length = 1000, 8, 256
    c.train.dtype, c.train.remat = "float32", "none"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-3, 50
    c.eval.batches = 32
    return c
