"""Moonlight-16B-A3B: the released shape, trained with AdamW.

  python train.py --config=configs/moonlight.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host.

Hardware: 256 GPUs of 141 GB, 8 per host. mesh.data takes what fsdp x expert = 32 leaves.
Compiled for 256 H200s, a step takes 48.5 GB per GPU: 6.0 of state, the rest temporaries (make plan; it has
  not been run there).
Source: "Muon is Scalable for LLM Training" (arXiv:2502.16982) and moonshotai/Moonlight-16B-A3B config.json.
Parameters: published as 16B and 3B active; in the paper 15.29B and 2.24B, both without embedding and output
  head (0.34B each). Here 15.96B and 2.91B with both, 15.29B and 2.24B without. No MTP.
As published: sequences of 8,192, plain rotary embedding with theta 50,000 (the released model has no YaRN),
  peak learning rate 4.2e-4, warmup 2000 steps, cosine to a tenth until 5.2T tokens, weight decay 0.1, batch
  of 2,048 sequences to 200B tokens, then 4,096; bias updates with their mean taken off (bias_centre), rate
  0.001.
Not as published: the optimizer (AdamW 0.9/0.95, clip 1.0 here; Moonlight used Muon); init 0.006 is
  DeepSeek's; the cooldown of the last 0.5T tokens, with other data, is left out.
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
    m.vocab_size = 163840
    m.hidden_size = 2048
    m.intermediate_size = 11264
    m.moe_intermediate_size = 1408
    m.num_hidden_layers = 27
    m.first_k_dense_replace = 1
    m.num_attention_heads = 16
    m.q_lora_rank = None
    m.kv_lora_rank = 512
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.n_routed_experts = 64
    m.n_shared_experts = 2
    m.num_experts_per_tok = 6
    m.topk_method = "noaux_tc"
    m.n_group = 1
    m.topk_group = 1
    m.scoring_func = "sigmoid"
    m.norm_topk_prob = True
    m.routed_scaling_factor = 2.446
    m.aux_loss_alpha = 0.001
    m.seq_aux = True
    m.initializer_range = 0.006
    m.rms_norm_eps = 1e-5
    m.rope_theta = 50000.0
    m.max_position_embeddings = 8192

    # Mesh and sharding
    c.mesh.data = -1
    c.mesh.fsdp = 4
    c.mesh.expert = 8
    c.sharding.strategy = "hybrid_shard"

    # Experts
    c.moe.bias_update_rate = 0.001
    c.moe.bias_centre = True

    # Training
    # Two micro-batches of 2048: a ramp that grows in whole micro-batches is then the published doubling at
    # one step.
    c.train.batch_size = 4096
    c.train.sequence_length = 8192
    c.train.accumulation = 2
    c.train.batch_ramp_start = 2048
    c.train.batch_ramp_steps = 11_921
    c.train.steps = 160_930

    # Optimizer
    c.optimizer.learning_rate = 4.2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 1000
    return c
