"""A first DeepSeek-V3: latent attention, 8 routed experts and a shared one, on the bytes of Python's sources.

  python train.py --config=configs/tiny.py --workdir=runs/tiny          (or: make train)

Hardware: 2 CPU cores, 3 minutes (5 when the machine is busy), 1.5 GB. On 8 virtual devices:
  JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny.py --workdir=runs/mesh \\
    --config.mesh.fsdp=2 --config.mesh.expert=4
Source: the shape of DeepSeek-V3 (arXiv:2412.19437) made small; sigmoid router, bias-balanced, no token
  dropped.
Parameters: 1.89M, 1.06M active per token.
Expected held-out loss after 1,000 steps (2.05M tokens): 1.29 nats per token = 1.87 bits per byte, within 0.05
  nats. The tolerance is for other seeds and for other Python versions, whose sources are a little different;
  the same machine gives the same number again. It begins at about 6 nats (ln 320 is 5.8); bytes drawn by
  their frequency have 3.1. `python -m benchmarks tiny` trains it and checks.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Args:
      arg: none is known.

    Raises:
      UserError: any arg.
    """
    c = base_config(arg)

    # Model
    m = c.model
    m.hidden_size = 160
    m.intermediate_size = 448
    m.moe_intermediate_size = 96
    m.num_hidden_layers = 4
    m.first_k_dense_replace = 1
    m.num_attention_heads = 4
    m.kv_lora_rank = 64
    m.qk_nope_head_dim = 32
    m.qk_rope_head_dim = 16
    m.v_head_dim = 32
    m.n_routed_experts = 8
    m.n_shared_experts = 1
    m.num_experts_per_tok = 2
    m.max_position_embeddings = 512
    m.initializer_range = 0.05

    # Experts
    # Bytes are few and frequent: balance needs a faster bias than at scale, and a capacity of twice the mean
    # load spares most second rounds.
    c.moe.capacity_factor = 2.0
    c.moe.bias_update_rate = 0.01

    # Data
    c.data.eval_fraction = 0.02

    # Training
    c.train.steps = 1000
    c.train.batch_size = 8
    c.train.sequence_length = 256
    c.train.dtype = "float32"
    c.train.remat = "none"

    # Optimizer
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 50

    # Evaluation
    c.eval.batches = 32
    return c
