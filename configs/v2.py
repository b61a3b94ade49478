"""DeepSeek-V2, 236B: the released shape and its pretraining recipe.

  python train.py --config=configs/v2.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/v2.py:yarn is the released long-context model (YaRN x40, 163,840 positions), for going
on from its weights; pretraining at 4,096 tokens used plain rotary embedding.

Hardware: 256 GPUs of 80 GB, 8 per host; the 8 experts' groups lie on the 8 GPUs of a host. mesh.data takes
  further replicas of 256: then lower --config.train.accumulation.
Compiled for 256 H200s, a step takes 56.7 GB per GPU: 11.1 of state, the rest temporaries (make plan; it has
  not been run there).
Source: DeepSeek-V2 (arXiv:2405.04434) sections 2.2 and 3.1 and deepseek-ai/DeepSeek-V2 config.json.
Parameters: published 236B in all and 21B active. Here 235.7B with embedding and output head (0.52B each), and
  20.9B active without the embedding, which is looked up and not multiplied (21.4B with it). No MTP.
As published: init 0.006 (config.json has 0.02), AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate
  2.4e-4, warmup 2000, x 0.316 after 60% and 90%, sequences of 4,096, batch from 2,304 to 9,216 sequences over
  the first 225B of 8.1T tokens, each token to at most 3 of 8 groups, balance alpha 0.003 per sequence
  (config.json has 0.001).
Not as published: no device-level (0.05) and no communication (0.02) balance loss, and no token is dropped in
  training; the ramp is linear in steps and the schedule's shares are of steps, not tokens (at most 0.8% of
  the training apart).
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
    m.vocab_size = 102400
    m.hidden_size = 5120
    m.intermediate_size = 12288
    m.moe_intermediate_size = 1536
    m.num_hidden_layers = 60
    m.first_k_dense_replace = 1
    m.num_attention_heads = 128
    m.q_lora_rank = 1536
    m.kv_lora_rank = 512
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.n_routed_experts = 160
    m.n_shared_experts = 2
    m.num_experts_per_tok = 6
    m.topk_method = "group_limited_greedy"
    m.n_group = 8
    m.topk_group = 3
    m.scoring_func = "softmax"
    m.norm_topk_prob = False
    m.routed_scaling_factor = 16.0
    m.aux_loss_alpha = 0.003
    m.seq_aux = True
    m.initializer_range = 0.006
    m.max_position_embeddings = 4096
    if arg == "yarn":
        yarn(m, factor=40, mscale=0.707)

    # Mesh and sharding
    c.mesh.data = -1
    c.mesh.fsdp = 32
    c.mesh.expert = 8
    c.sharding.strategy = "hybrid_shard"

    # Training
    # A micro-batch must divide both ends of the ramp: 768 = 2304 / 3 = 9216 / 12, three sequences per GPU.
    c.train.batch_size = 9216
    c.train.sequence_length = 4096
    c.train.accumulation = 12
    c.train.batch_ramp_start = 2304
    c.train.batch_ramp_steps = 10_219
    c.train.steps = 218_800

    # Optimizer
    c.optimizer.learning_rate = 2.4e-4
    c.optimizer.schedule = "deepseek_v2"
    c.optimizer.warmup_steps = 2000
    # the first drop comes after 60% of the training
    c.optimizer.decay_fraction = 0.4

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 1000
    return c
