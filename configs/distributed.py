"""16 experts over 4 GPUs: the NeMo guide's distributed configuration.

  python train.py --config=configs/distributed.py --workdir=runs/distributed \\
    --config.data.path=FILE_OR_FOLDER --config.data.tokenizer=tokenizer.json

Hardware: 8 GPUs of 80 GB, or 4: parameters are divided over what the expert axis of 4 leaves. On several hosts run the same
command on each (train.py --help).
Compiled for 4 H200s, a step takes 35.4 GB a GPU: 15.1 of state, the rest temporaries (make plan; it has not been run there).
Source: "DeepSeek V3 NeMo Migration Guide", deepseek_v3_distributed.yaml. Its words and ours: vocab_size 50257,
emb_dim 1024 = hidden_size, n_layers 24 = num_hidden_layers, num_experts 16 = n_routed_experts, top_k 2 = num_experts_per_tok,
expert_dim 4096 = moe_intermediate_size, expert_model_parallel_size 4 = mesh.expert, precision bf16 = train.dtype,
max_steps 10000 = train.steps, strategy ddp = sharding.strategy (full_shard here: it needs less memory; with
--config.sharding.strategy=ddp the state takes 22 GB a GPU and fits as well).
Parameters: 5.0B in all, 0.79B active, embedding and output head (0.05B each) included; nothing is published.
As published: the guide's values above; by DeepSeek-V2 and V3, init 0.006, AdamW 0.9/0.95, weight decay 0.1, clip 1.0,
warmup 2000, bias update rate 0.001, balance alpha 0.0001; by V2-Lite, learning rate 4.2e-4.
Chosen here: attention widths (DeepSeek's 128 + 64 and 128 a head), batch, sequence length, cosine schedule. The guide names no
shared expert and no dense layer: there are none.
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
            f"configs/distributed.py:{arg} is not known. configs/distributed.py takes no arg."
        )
    c = base_config()
    m = c.model
    m.vocab_size, m.hidden_size, m.num_hidden_layers = 50257, 1024, 24
    m.first_k_dense_replace, m.n_routed_experts, m.n_shared_experts, m.num_experts_per_tok = (
        0,
        16,
        0,
        2,
    )
    m.moe_intermediate_size = m.intermediate_size = 4096
    m.num_attention_heads, m.kv_lora_rank = 8, 256
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 128, 64, 128
    m.initializer_range, m.aux_loss_alpha = 0.006, 0.0001

    c.mesh.data, c.mesh.fsdp, c.mesh.expert = 1, -1, 4
    c.train.steps, c.train.batch_size, c.train.sequence_length, c.train.accumulation = (
        10_000,
        256,
        2048,
        4,
    )
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = (
        4.2e-4,
        "cosine",
        2000,
    )
    c.checkpoint.every_steps, c.eval.every_steps = 500, 500
    return c
