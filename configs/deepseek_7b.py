"""The FSDP guide's model: 61 blocks, 8 experts, top-2, multi-head latent attention, about 7B parameters.

  python train.py --config=configs/deepseek_7b.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 8 GPUs of 80 GB, or 4 with --config.train.accumulation=32. The guide's strategies are
  expert-level sharding, experts 0 and 1 on GPU 0 and so on:  this config (mesh.expert=4)
  plain FSDP of every block:                                  --config.mesh.expert=1
Compiled for 8 H200s, a step takes 32.8 GB per GPU: 10.8 of state, the rest temporaries (make plan; it has not
  been run there).
Source: "DeepSeek FSDP Training Guide" and "Tutorial 7: FSDP" (7B on 8 GPUs: FULL_SHARD, bf16, activation
  checkpointing).
Parameters: the guide has 4 x ~1.75B = 7B. Here 6.98B in the 61 blocks and 7.19B in all with embedding and
  output head (0.10B each); 2.58B active with them. No MTP.
As published: by the guide, blocks, experts, top-k; by DeepSeek LLM 7B (arXiv:2401.02954) and V2-Lite, init
  0.006, AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate 4.2e-4, warmup 2000; by V3, bias update
  rate 0.001, balance alpha 0.0001.
Chosen here: the widths that make 7B (hidden 2048, experts 2048, V2-Lite's attention), batch (2.1M tokens),
  cosine schedule.
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
    m.hidden_size = 2048
    m.num_hidden_layers = 61
    m.first_k_dense_replace = 0
    m.n_routed_experts = 8
    m.n_shared_experts = 0
    m.num_experts_per_tok = 2
    m.intermediate_size = 2048
    m.moe_intermediate_size = 2048
    m.num_attention_heads = 16
    m.kv_lora_rank = 512
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.initializer_range = 0.006
    m.aux_loss_alpha = 0.0001

    # Mesh and sharding
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.expert = 4

    # Training
    c.train.steps = 50_000
    c.train.batch_size = 512
    c.train.sequence_length = 4096
    c.train.accumulation = 16

    # Optimizer
    c.optimizer.learning_rate = 4.2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 1000
    c.eval.every_steps = 1000
    return c
