"""The FSDP guide's model: 61 blocks, 8 experts, top-2, multi-head latent attention, about 7B parameters.

  python train.py --config=configs/deepseek_7b.py --workdir=DIR \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 8 GPUs of 80 GB, or 4 with --config.train.accumulation=32. The guide's strategies are
  expert-level sharding, experts 0 and 1 on GPU 0 and so on:  this config (mesh.expert=4)
  plain FSDP of every block:                                  --config.mesh.expert=1
Compiled for 8 H200s, a step takes 32.8 GB a GPU: 10.8 of state, the rest temporaries (make plan; it has not been run there).
Source: "DeepSeek FSDP Training Guide" and "Tutorial 7: FSDP" (7B on 8 GPUs: FULL_SHARD, bf16, activation checkpointing).
Parameters: the guide has 4 x ~1.75B = 7B. Here 6.98B in the 61 blocks and 7.19B in all with embedding and output head
(0.10B each); 2.58B active with them. No MTP.
As published: by the guide, blocks, experts, top-k; by DeepSeek LLM 7B (arXiv:2401.02954) and V2-Lite, init 0.006,
AdamW 0.9/0.95, weight decay 0.1, clip 1.0, learning rate 4.2e-4, warmup 2000; by V3, bias update rate 0.001, balance
alpha 0.0001.
Chosen here: the widths that make 7B (hidden 2048, experts 2048, V2-Lite's attention), batch (2.1M tokens), cosine schedule.
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
            f"configs/deepseek_7b.py:{arg} is not known. configs/deepseek_7b.py takes no arg."
        )
    c = base_config()
    m = c.model
    m.vocab_size, m.hidden_size, m.num_hidden_layers = 50257, 2048, 61
    m.first_k_dense_replace, m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = (
        0,
        8,
        0,
        2,
    )
    m.moe_intermediate_size = m.intermediate_size = 2048
    m.num_attention_heads, m.kv_lora_rank = 16, 512
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 128, 64, 128
    m.initializer_range, m.aux_loss_alpha = 0.006, 0.0001

    c.mesh.data, c.mesh.fsdp, c.mesh.expert = 1, -1, 4
    c.train.steps, c.train.batch_size, c.train.sequence_length, c.train.accumulation = (
        50_000,
        512,
        4096,
        16,
    )
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = (
        4.2e-4,
        "cosine",
        2000,
    )
    c.checkpoint.every_steps, c.eval.every_steps = 1000, 1000
    return c
