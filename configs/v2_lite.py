"""DeepSeek-V2-Lite, 16B: the released shape and its pretraining recipe.

  python train.py --config=configs/v2_lite.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/v2_lite.py:yarn is the released long-context model (YaRN x40, 163,840 positions), for
going on from its weights; pretraining at 4,096 tokens used plain rotary embedding.

Hardware: 64 GPUs of 80 GB, 8 per host. Any multiple of 8 that divides the micro-batch works; on 8 GPUs set
  --config.train.accumulation=72, which keeps 64 sequences per micro-batch.
Compiled for 64 H200s, a step takes 68.8 GB per GPU: 23.6 of state, the rest temporaries (make plan; it has
  not been run there).
Source: DeepSeek-V2 (arXiv:2405.04434) appendix B and deepseek-ai/DeepSeek-V2-Lite config.json.
Parameters: published 15.7B in all and 2.4B active. Here 15.71B with embedding and output head (0.21B each),
  and 2.45B active without the embedding, which is looked up and not multiplied (2.66B with it). No MTP.
As published: AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate 4.2e-4, warmup 2000, constant batch of
  4,608 sequences of 4,096 tokens, 5.7T tokens, balance alpha 0.001 per sequence; by the V2 paper, init 0.006
  (config.json has 0.02); the learning rate falls by 0.316 after 80% and 90% of the training.
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
    m.hidden_size = 2048
    m.intermediate_size = 10944
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
    m.topk_method = "greedy"
    m.n_group = 1
    m.topk_group = 1
    m.scoring_func = "softmax"
    m.norm_topk_prob = False
    m.routed_scaling_factor = 1.0
    m.aux_loss_alpha = 0.001
    m.seq_aux = True
    m.initializer_range = 0.006
    m.max_position_embeddings = 4096
    if arg == "yarn":
        yarn(m, factor=40, mscale=0.707)

    # Mesh and sharding
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.expert = 8
    c.sharding.strategy = "hybrid_shard"

    # Training
    c.train.steps = 302_000
    c.train.batch_size = 4608
    c.train.sequence_length = 4096
    c.train.accumulation = 9

    # Optimizer
    c.optimizer.learning_rate = 4.2e-4
    c.optimizer.schedule = "deepseek_v2"
    c.optimizer.warmup_steps = 2000
    # the first drop comes after 80% of the training, the second after 90%
    c.optimizer.decay_fraction = 0.2

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 1000
    c.eval.every_steps = 1000
    return c
