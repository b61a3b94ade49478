"""DeepSeek-V2-Lite, 16B: the released shape and its pretraining recipe.

  python train.py --config=configs/v2_lite.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/v2_lite.py:yarn is the released long-context model (YaRN x40, 163,840 positions), for going on from
its weights; pretraining at 4,096 tokens used plain rotary embedding.

Hardware: 64 GPUs of 80 GB, 8 a host. Any multiple of 8 that divides the micro-batch works; on 8 GPUs set
--config.train.accumulation=72, which keeps 64 sequences a micro-batch.
Compiled for 64 H200s, a step takes 68.8 GB a GPU: 23.6 of state, the rest temporaries (make plan; it has not been run there).
Source: DeepSeek-V2 (arXiv:2405.04434) appendix B and deepseek-ai/DeepSeek-V2-Lite config.json.
Parameters: published 15.7B in all and 2.4B active. Here 15.71B with embedding and output head (0.21B each), and 2.45B active
without the embedding, which is looked up and not multiplied (2.66B with it). No MTP.
As published: AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate 4.2e-4, warmup 2000, constant batch of 4,608 sequences
of 4,096 tokens, 5.7T tokens, balance alpha 0.001 per sequence; by the V2 paper, init 0.006 (config.json has 0.02);
the learning rate falls by 0.316 after 80% and 90% of the training.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import UserError, base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Args:
      arg: "" for pretraining at 4,096 tokens, "yarn" for the released long-context setting.

    Raises:
      UserError: any other arg.
    """
    if arg not in ("", "yarn"):
        raise UserError(
            f"configs/v2_lite.py:{arg} is not known. Write configs/v2_lite.py or configs/v2_lite.py:yarn."
        )
    c = base_config()
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.moe_intermediate_size = (
        102400,
        2048,
        10944,
        1408,
    )
    m.num_hidden_layers, m.first_k_dense_replace = 27, 1
    m.num_attention_heads, m.q_lora_rank, m.kv_lora_rank = 16, None, 512
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 128, 64, 128
    m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = 64, 2, 6
    m.topk_method, m.n_group, m.topk_group = "greedy", 1, 1
    m.scoring_func, m.norm_topk_prob, m.routed_scaling_factor = "softmax", False, 1.0
    m.aux_loss_alpha, m.seq_aux, m.initializer_range = 0.001, True, 0.006
    m.max_position_embeddings = 4096
    if arg == "yarn":
        m.max_position_embeddings = 163840
        m.rope_scaling.update(
            type="yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=0.707,
            mscale_all_dim=0.707,
        )

    c.mesh.data, c.mesh.fsdp, c.mesh.expert = -1, 1, 8
    c.sharding.strategy = "hybrid_shard"
    c.train.steps, c.train.batch_size, c.train.sequence_length, c.train.accumulation = (
        302_000,
        4608,
        4096,
        9,
    )
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = (
        4.2e-4,
        "deepseek_v2",
        2000,
    )
    c.optimizer.decay_fraction = (
        0.2  # the first drop comes after 80% of the training, the second after 90%
    )
    c.checkpoint.every_steps, c.eval.every_steps = 1000, 1000
    return c
