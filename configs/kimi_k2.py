"""Kimi K2, 1.04T: the released shape, trained with AdamW.

  python train.py --config=configs/kimi_k2.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/kimi_k2.py:yarn is the released long-context model (YaRN x32, 131,072 positions; the
0905 release has x64 and 262,144), for going on from its weights; pretraining at 4,096 tokens used plain
rotary embedding.

Hardware: 1,024 GPUs of 80 GB, 8 per host. 7168 = 7 x 1024, so that at most 1,024 GPUs can share a weight.
  2,048 GPUs are two replicas on mesh.data, with --config.train.accumulation=8.
Compiled for 1,024 H200s, a step takes 46.8 GB per GPU: 12.0 of state, the rest temporaries (make plan; it has
  not been run there).
Source: "Kimi K2: Open Agentic Intelligence" (arXiv:2507.20534) sections 2.3 and 2.5 and
  moonshotai/Kimi-K2-Base config.json.
Parameters: published 1.04T in all and 32.6B active. Here 1,026.4B with embedding and output head (1.17B
  each), 1.3% below the published figure, and 32.9B active with both (31.7B without the embedding). No MTP.
As published: weight decay 0.1, learning rate 2e-4 after 500 steps of warmup, constant for 10T of 15.5T
  tokens, then down to 2e-5; constant batch of 67M tokens in sequences of 4,096; rotary theta 50,000; balance
  alpha 0.001 (config.json).
Not as published: the optimizer (AdamW 0.9/0.95, clip 1.0 here; K2 used MuonClip); the decay is linear, K2's
  was a cosine; init 0.006 and bias update rate 0.001 are V3's; the annealing after 15.5T tokens is left out.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import base_config, yarn


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Args:
      arg: "" for pretraining at 4,096 tokens, "yarn" for the released long-context setting.

    Raises:
      UserError: any other arg.
    """
    c = base_config(arg, allowed=("", "yarn"))

    # Model
    m = c.model
    m.vocab_size = 163840
    m.hidden_size = 7168
    m.intermediate_size = 18432
    m.moe_intermediate_size = 2048
    m.num_hidden_layers = 61
    m.first_k_dense_replace = 1
    m.num_attention_heads = 64
    m.q_lora_rank = 1536
    m.kv_lora_rank = 512
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.n_routed_experts = 384
    m.n_shared_experts = 1
    m.num_experts_per_tok = 8
    m.topk_method = "noaux_tc"
    m.n_group = 1
    m.topk_group = 1
    m.scoring_func = "sigmoid"
    m.norm_topk_prob = True
    m.routed_scaling_factor = 2.827
    m.aux_loss_alpha = 0.001
    m.seq_aux = True
    m.initializer_range = 0.006
    m.rms_norm_eps = 1e-6
    m.rope_theta = 50000.0
    m.max_position_embeddings = 4096
    if arg == "yarn":
        yarn(m, factor=32, mscale=1, beta_fast=1)

    # Mesh and sharding
    c.mesh.data = -1
    c.mesh.fsdp = 16
    c.mesh.expert = 64
    c.sharding.strategy = "hybrid_shard"

    # Training
    c.train.steps = 231_000
    c.train.batch_size = 16384
    c.train.sequence_length = 4096
    c.train.accumulation = 16

    # Optimizer
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup_steps = 500
    c.optimizer.final_fraction = 0.1
    c.optimizer.decay_fraction = 5.5 / 15.5

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 1000
    return c
