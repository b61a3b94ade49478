"""DeepSeek-V3, 671B: the released shape and its pretraining recipe.

  python train.py --config=configs/v3.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/v3.py:yarn is the released long-context model (YaRN x40, 163,840 positions), for going
on from its weights; pretraining at 4,096 tokens used plain rotary embedding.

Hardware: 1,024 GPUs of 141 GB, 8 per host. 7168 = 7 x 1024, so that at most 1,024 GPUs can share a weight;
  here fsdp x expert is 512 and the rest are replicas on mesh.data. The published batch of 15,360 = 15 x 1,024
  does not divide by 2,048: there set --config.train.batch_size=16384 --config.train.accumulation=8
  --config.train.batch_ramp_start=4096.
Compiled for 1,024 H200s, a step takes 66.6 GB per GPU: 16.0 of state, the rest temporaries (make plan; it has
  not been run there).
Source: DeepSeek-V3 (arXiv:2412.19437) sections 4.1 and 4.2 and deepseek-ai/DeepSeek-V3 config.json.
Parameters: published 671B in all and 37B active (README_WEIGHTS.md: 36.6B with the output head, without the
  embedding), and 11.5B in the MTP module without the embedding and head it shares. Here 671.03B with
  embedding and output head (0.93B each), 36.6B active without the embedding (37.6B with it), 11.6B more in
  the MTP layer (its 2 x 7168 x 7168 projection included).
As published: init 0.006 (config.json has 0.02), AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate
  2.2e-4, warmup 2000, constant to 10T tokens, cosine to 2.2e-5 over 4.3T, constant for 333B, 7.3e-6 for the
  last 167B of 14.8T; sequences of 4,096, batch from 3,072 to 15,360 sequences over the first 469B tokens;
  bias update rate 0.001 for 14.3T, then 0; balance alpha 0.0001 per sequence (config.json has 0.001); MTP
  depth 1 with weight 0.3 for 10T, then 0.1; attention across packed documents. Each token goes to at most 4
  of 8 groups, and with mesh.expert=64 a group of 32 experts is the 8 GPUs of one host.
Not as published: bf16 instead of FP8; no pipeline; the ramp is linear in steps and the shares are of steps,
  not tokens (at most 0.8% of the training apart).
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
    m.vocab_size = 129280
    m.hidden_size = 7168
    m.intermediate_size = 18432
    m.moe_intermediate_size = 2048
    m.num_hidden_layers = 61
    m.first_k_dense_replace = 3
    m.num_nextn_predict_layers = 1
    m.num_attention_heads = 128
    m.q_lora_rank = 1536
    m.kv_lora_rank = 512
    m.qk_nope_head_dim = 128
    m.qk_rope_head_dim = 64
    m.v_head_dim = 128
    m.n_routed_experts = 256
    m.n_shared_experts = 1
    m.num_experts_per_tok = 8
    m.topk_method = "noaux_tc"
    m.n_group = 8
    m.topk_group = 4
    m.scoring_func = "sigmoid"
    m.norm_topk_prob = True
    m.routed_scaling_factor = 2.5
    m.aux_loss_alpha = 0.0001
    m.seq_aux = True
    m.initializer_range = 0.006
    m.max_position_embeddings = 4096
    if arg == "yarn":
        yarn(m, factor=40, mscale=1)

    # Mesh and sharding
    c.mesh.data = -1
    c.mesh.fsdp = 8
    c.mesh.expert = 64
    c.sharding.strategy = "hybrid_shard"

    # Experts
    c.moe.bias_update_rate = 0.001
    c.moe.bias_update_fraction = 14.3 / 14.8

    # Data
    c.data.document_mask = False

    # Training
    # One sequence per GPU in a micro-batch of 1024, which divides both ends of the ramp.
    c.train.batch_size = 15360
    c.train.sequence_length = 4096
    c.train.accumulation = 15
    c.train.batch_ramp_start = 3072
    c.train.batch_ramp_steps = 13_156
    c.train.steps = 240_900
    c.train.mtp_loss_weight = 0.3
    c.train.mtp_loss_weight_final = 0.1
    c.train.mtp_switch_fraction = 10 / 14.8

    # Optimizer
    c.optimizer.learning_rate = 2.2e-4
    c.optimizer.schedule = "deepseek_v3"
    c.optimizer.warmup_steps = 2000

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 1000
    return c
