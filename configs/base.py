"""8 experts, top-2, on one GPU: the FSDP guide's MoE layer at a size for development.

  python train.py --config=configs/base.py --workdir=runs/base

trains on Python's standard library, read as bytes; for text of your own add
  --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 1 GPU of 24 GB. On more GPUs the same command divides parameters and batch over them (up to 8, see
  batch_size).
Compiled for 1 H200, a step takes 18.0 GB per GPU: 9.0 of state, the rest temporaries (make plan; it has not
  been run there).
Source: "DeepSeek FSDP Training Guide" (every block an MoE of 8 experts with top-2 routing, multi-head latent
  attention) and the single-GPU base configuration of the NeMo guide (GPT-2's vocabulary, bf16, 10,000 steps).
  Neither gives the widths.
Parameters: 0.75B in all, 0.30B active, embedding and output head (0.05B each) included; nothing is published.
As published: by the guides, experts, top-k, vocabulary and steps; by DeepSeek-V2 and V3, init 0.006, AdamW
  0.9/0.95, weight decay 0.1, clip 1.0, bias update rate 0.001, balance alpha 0.0001; by V2-Lite, learning
  rate 4.2e-4.
Chosen here: widths, depth, batch, cosine schedule, a warmup of 500 steps of 10,000.
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
    m.vocab_size = 50257
    m.hidden_size = 1024
    m.num_hidden_layers = 12
    m.first_k_dense_replace = 0
    m.n_routed_experts = 8
    m.n_shared_experts = 0
    m.num_experts_per_tok = 2
    m.intermediate_size = 2048
    m.moe_intermediate_size = 2048
    m.num_attention_heads = 8
    m.kv_lora_rank = 256
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.initializer_range = 0.006
    m.aux_loss_alpha = 0.0001

    # Training
    c.train.steps = 10_000
    c.train.batch_size = 64
    c.train.sequence_length = 2048
    c.train.accumulation = 8

    # Optimizer
    c.optimizer.learning_rate = 4.2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 500

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 500
    return c
