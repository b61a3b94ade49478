"""16 experts over 4 GPUs: the NeMo guide's distributed configuration.

  python train.py --config=configs/distributed.py --workdir=runs/distributed \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 8 GPUs of 80 GB, or 4: parameters are divided over what the expert axis of 4 leaves. On several
  hosts run the same command on each (train.py --help).
Memory: make plan CONFIG=configs/distributed.py DEVICES=4 says what a step takes, compiled for so many GPUs.
Source: "DeepSeek V3 NeMo Migration Guide" and the deepseek_v3_distributed.yaml that it names. Their words and
  ours: vocab_size 50257 (the guide), emb_dim 1024 = hidden_size, n_layers 24 = num_hidden_layers, num_heads
  16 = num_attention_heads, seq_len 2048 = train.sequence_length, num_experts 16 = n_routed_experts, top_k 2 =
  num_experts_per_tok, expert_dim 4096 = moe_intermediate_size, moe_aux_loss_coeff 0.01 =
  model.aux_loss_alpha, moe_z_loss_coeff 0.001 = moe.router_z_loss_coef, expert_model_parallel_size 4 =
  mesh.expert, precision bf16 = train.dtype, activations_checkpoint_granularity full = train.remat,
  max_steps 10000 = train.steps, global_batch_size 32 = train.batch_size, of which micro_batch_size 2 on 4
  GPUs makes train.accumulation 4 (on 8 GPUs a sequence each), gradient_clip_val 1.0 = optimizer.grad_clip,
  lr 1e-4, betas 0.9 and 0.95, weight_decay 0.1, CosineAnnealing with warmup_steps 2000, min_lr 1e-5 =
  optimizer.final_fraction 0.1 and constant_steps 1000 = optimizer.hold_steps, val_check_interval 500 =
  eval.every_steps, limit_val_batches 50 = eval.batches, log_every_n_steps 50 = log.every_steps, save_top_k 5
  = checkpoint.keep_best, splits_string "99,1,0" = data.eval_fraction 0.01, reset_attention_mask False =
  data.document_mask, strategy ddp = sharding.strategy (full_shard here: it needs less memory; the numbers are
  the same with --config.sharding.strategy=ddp).
Parameters: 5.0B in all, 0.79B active, embedding and output head (0.05B each) included; nothing is published.
As published: the file's values above; its experts are chosen by the softmax of all of them, whose values
  weight the top 2 as they are, and balanced by the loss alone. By DeepSeek-V2 and V3, init 0.006.
Chosen here: attention widths (64 + 32 and 64 per head: 16 heads are 1024 there, too), the balance loss of
  each sequence (the file's is of micro-batches of two). The file names no shared expert and no dense layer:
  there are none.
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
    m.num_attention_heads = 16
    m.kv_lora_rank = 256
    m.qk_nope_head_dim = 64
    m.qk_rope_head_dim = 32
    m.v_head_dim = 64
    m.topk_method = "greedy"
    m.scoring_func = "softmax"
    m.norm_topk_prob = False
    m.routed_scaling_factor = 1.0
    m.initializer_range = 0.006
    m.aux_loss_alpha = 0.01
    c.moe.router_z_loss_coef = 0.001

    # Mesh and sharding
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.expert = 4

    # Data
    c.data.document_mask = False
    c.data.eval_fraction = 0.01

    # Training
    c.train.steps = 10_000
    c.train.batch_size = 32
    c.train.sequence_length = 2048
    c.train.accumulation = 4
    c.train.dtype = "bfloat16"
    c.train.remat = "full"

    # Optimizer
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000
    c.optimizer.hold_steps = 1000
    c.optimizer.final_fraction = 0.1
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.grad_clip = 1.0

    # Checkpoints, evaluation and logs
    c.checkpoint.every_steps = 500
    c.checkpoint.keep_best = 5
    c.eval.every_steps = 500
    c.eval.batches = 50
    c.log.every_steps = 50
    return c
