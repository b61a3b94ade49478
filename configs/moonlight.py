"""Moonlight-16B-A3B: the released shape, trained with AdamW.

  python train.py --config=configs/moonlight.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

on every host.

Hardware: 256 GPUs of 141 GB, 8 a host. mesh.data takes what fsdp x expert = 32 leaves.
Compiled for 256 H200s, a step takes 48.5 GB a GPU: 6.0 of state, the rest temporaries (make plan; it has not been run there).
Source: "Muon is Scalable for LLM Training" (arXiv:2502.16982) and moonshotai/Moonlight-16B-A3B config.json.
Parameters: published as 16B and 3B active; in the paper 15.29B and 2.24B, both without embedding and output head (0.34B each).
Here 15.96B and 2.91B with both, 15.29B and 2.24B without. No MTP.
As published: sequences of 8,192, plain rotary embedding with theta 50,000 (the released model has no YaRN), peak learning rate
4.2e-4, warmup 2000 steps, cosine to a tenth until 5.2T tokens, weight decay 0.1, batch of 2,048 sequences to 200B tokens, then
4,096; bias updates with their mean taken off (bias_centre), rate 0.001.
Not as published: the optimizer (AdamW 0.9/0.95, clip 1.0 here; Moonlight used Muon); init 0.006 is DeepSeek's; the cooldown of
the last 0.5T tokens, with other data, is left out.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import UserError, base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options. It takes no arg.

    Raises:
      UserError: any arg.
    """
    if arg:
        raise UserError(
            f"configs/moonlight.py:{arg} is not known. configs/moonlight.py takes no arg."
        )
    c = base_config()
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.moe_intermediate_size = (
        163840,
        2048,
        11264,
        1408,
    )
    m.num_hidden_layers, m.first_k_dense_replace = 27, 1
    m.num_attention_heads, m.q_lora_rank, m.kv_lora_rank = 16, None, 512
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 128, 64, 128
    m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = 64, 2, 6
    m.topk_method, m.n_group, m.topk_group = "noaux_tc", 1, 1
    m.scoring_func, m.norm_topk_prob, m.routed_scaling_factor = "sigmoid", True, 2.446
    m.aux_loss_alpha, m.seq_aux, m.initializer_range = 0.001, True, 0.006
    m.rms_norm_eps, m.rope_theta, m.max_position_embeddings = 1e-5, 50000.0, 8192

    c.mesh.data, c.mesh.fsdp, c.mesh.expert = -1, 4, 8
    c.sharding.strategy = "hybrid_shard"
    c.moe.bias_update_rate, c.moe.bias_centre = 0.001, True
    # Two micro-batches of 2048: a ramp that grows in whole micro-batches is then the published doubling at one step.
    c.train.batch_size, c.train.sequence_length, c.train.accumulation = 4096, 8192, 2
    c.train.batch_ramp_start, c.train.batch_ramp_steps, c.train.steps = 2048, 11_921, 160_930
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = (
        4.2e-4,
        "cosine",
        2000,
    )
    c.checkpoint.every_steps, c.eval.every_steps = 500, 1000
    return c
