"""16 experts over 4 GPUs: the NeMo guide's distributed configuration.

  python train.py --config=configs/distributed.py --workdir=runs/distributed \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 8 GPUs of 80 GB, or 4: parameters are divided over what the expert axis of 4 leaves. On several
  hosts run the same command on each (train.py --help).
Compiled for 4 H200s, a step takes 35.4 GB per GPU: 15.1 of state, the rest temporaries (make plan; it has not
  been run there).
Source: "DeepSeek V3 NeMo Migration Guide", deepseek_v3_distributed.yaml. Its words and ours: vocab_size
  50257, emb_dim 1024 = hidden_size, n_layers 24 = num_hidden_layers, num_experts 16 = n_routed_experts, top_k
  2 = num_experts_per_tok, expert_dim 4096 = moe_intermediate_size, expert_model_parallel_size 4 =
  mesh.expert, precision bf16 = train.dtype, max_steps 10000 = train.steps, strategy ddp = sharding.strategy
  (full_shard here: it needs less memory; with --config.sharding.strategy=ddp the state takes 22 GB per GPU
  and fits as well).
Parameters: 5.0B in all, 0.79B active, embedding and output head (0.05B each) included; nothing is published.
As published: the guide's values above; by DeepSeek-V2 and V3, init 0.006, AdamW 0.9/0.95, weight decay 0.1,
  clip 1.0, warmup 2000, bias update rate 0.001, balance alpha 0.0001; by V2-Lite, learning rate 4.2e-4.
Chosen here: attention widths (DeepSeek's 128 + 64 and 128 per head), batch, sequence length, cosine schedule.
  The guide names no shared expert and no dense layer: there are none.
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
    m.num_hidden_layers = 24
    m.first_k_dense_replace = 0
    m.n_routed_experts = 16
    m.n_shared_experts = 0
    m.num_experts_per_tok = 2
    m.intermediate_size = 4096
    m.moe_intermediate_size = 4096
    m.num_attention_heads = 8
    m.kv_lora_rank = 256
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
    c.train.steps = 10_000
    c.train.batch_size = 256
    c.train.sequence_length = 2048
    c.train.accumulation = 4

    # Optimizer
    c.optimizer.learning_rate = 4.2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 500
    return c
