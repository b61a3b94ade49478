"""Kimi K2, 1.04T: the released shape, trained with AdamW.

  python train.py --config=configs/kimi_k2.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host. configs/kimi_k2.py:yarn is the released long-context model (YaRN x32, 131,072 positions; the 0905 release has
x64 and 262,144), for going on from its weights; pretraining at 4,096 tokens used plain rotary embedding.

Hardware: 1,024 GPUs of 80 GB, 8 a host. 7168 = 7 x 1024, so that at most 1,024 GPUs can share a weight. 2,048 GPUs are two
replicas on mesh.data, with --config.train.accumulation=8.
Compiled for 1,024 H200s, a step takes 46.8 GB a GPU: 12.0 of state, the rest temporaries (make plan; it has not been run there).
Source: "Kimi K2: Open Agentic Intelligence" (arXiv:2507.20534) sections 2.3 and 2.5 and moonshotai/Kimi-K2-Base config.json.
Parameters: published 1.04T in all and 32.6B active. Here 1,026.4B with embedding and output head (1.17B each), 1.3% below the
published figure, and 32.9B active with both (31.7B without the embedding). No MTP.
As published: weight decay 0.1, learning rate 2e-4 after 500 steps of warmup, constant for 10T of 15.5T tokens, then down to
2e-5; constant batch of 67M tokens in sequences of 4,096; rotary theta 50,000; balance alpha 0.001 (config.json).
Not as published: the optimizer (AdamW 0.9/0.95, clip 1.0 here; K2 used MuonClip); the decay is linear, K2's was a cosine;
init 0.006 and bias update rate 0.001 are V3's; the annealing after 15.5T tokens is left out.
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
            f"configs/kimi_k2.py:{arg} is not known. Write configs/kimi_k2.py or configs/kimi_k2.py:yarn."
        )
    c = base_config()
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.moe_intermediate_size = (
        163840,
        7168,
        18432,
        2048,
    )
    m.num_hidden_layers, m.first_k_dense_replace = 61, 1
    m.num_attention_heads, m.q_lora_rank, m.kv_lora_rank = 64, 1536, 512
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 128, 64, 128
    m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = 384, 1, 8
    m.topk_method, m.n_group, m.topk_group = "noaux_tc", 1, 1
    m.scoring_func, m.norm_topk_prob, m.routed_scaling_factor = "sigmoid", True, 2.827
    m.aux_loss_alpha, m.seq_aux, m.initializer_range = 0.001, True, 0.006
    m.rms_norm_eps, m.rope_theta, m.max_position_embeddings = 1e-6, 50000.0, 4096
    if arg == "yarn":
        m.max_position_embeddings = 131072
        m.rope_scaling.update(
            type="yarn",
            factor=32.0,
            original_max_position_embeddings=4096,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        )

    c.mesh.data, c.mesh.fsdp, c.mesh.expert = -1, 16, 64
    c.sharding.strategy = "hybrid_shard"
    c.train.steps, c.train.batch_size, c.train.sequence_length, c.train.accumulation = (
        231_000,
        16384,
        4096,
        16,
    )
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 2e-4, "wsd", 500
    c.optimizer.final_fraction, c.optimizer.decay_fraction = 0.1, 5.5 / 15.5
    c.checkpoint.every_steps, c.eval.every_steps = 500, 1000
    return c
