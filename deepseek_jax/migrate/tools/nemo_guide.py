"""The "DeepSeek V3 NeMo Migration Guide": NeMo's sections with words of its own for the model.

The guide's model is DeepSeek's, so that RMSNorm, SwiGLU and latent attention need not be said. What it does
not give is as in configs/distributed.py.
"""

from deepseek_jax.migrate.handlers import option
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import nemo
from deepseek_jax.migrate.tools.shared import need

WORDS = ("model.emb_dim", "model.n_layers", "model.expert_dim", "model.top_k", "model.num_heads")
SIZES: dict[str, int | float | bool | str] = {
    "model.vocab_size": 50257,
    "model.hidden_size": 1024,
    "model.num_hidden_layers": 24,
    "model.first_k_dense_replace": 0,
    "model.n_routed_experts": 16,
    "model.n_shared_experts": 0,
    "model.num_experts_per_tok": 2,
    "model.num_attention_heads": 16,
    "model.kv_lora_rank": 256,
    "model.qk_nope_head_dim": 64,
    "model.qk_rope_head_dim": 32,
    "model.v_head_dim": 64,
    "model.topk_method": "greedy",
    "model.scoring_func": "softmax",
    "model.norm_topk_prob": False,
    "model.routed_scaling_factor": 1.0,
    "model.initializer_range": 0.006,
    "model.aux_loss_alpha": 0.01,
    "moe.router_z_loss_coef": 0.001,
    "train.remat": "full",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.grad_clip": 1.0,
    "optimizer.name": "adamw",
    "checkpoint.keep_best": 5,
    "eval.batches": 50,
    "data.document_mask": False,
    "data.eval_fraction": 0.01,
}
FACTS = {
    "per_device_batch": 2,
    "global_batch": 32,
    "sequence_length": 2048,
    "steps": 10_000,
    "learning_rate": 1e-4,
    "min_lr": 1e-5,
    "schedule": "cosine",
    "warmup_steps": 2000,
    "hold_steps": 1000,
    "strategy": "no_shard",
    "save_every": 500,
    "eval_every": 500,
    "log_every": 50,
}


def recognise(source: Source) -> int:
    """Its words for the model."""
    return 100 if source.has(*WORDS) >= 2 else 0


TABLE: dict[str, Handler] = {
    **nemo.TABLE,
    "vocab_size": option("model.vocab_size"),
    "emb_dim": option("model.hidden_size"),
    "n_layers": option("model.num_hidden_layers"),
    "num_heads": option("model.num_attention_heads"),
    "n_heads": option("model.num_attention_heads"),
    "num_experts": option("model.n_routed_experts"),
    "top_k": option("model.num_experts_per_tok"),
    "expert_dim": option("model.moe_intermediate_size"),
    "num_shared_experts": option("model.n_shared_experts"),
    "aux_loss_coef": option("model.aux_loss_alpha"),
    "z_loss_coef": option("moe.router_z_loss_coef"),
}


def finish(m: Migration) -> None:
    """What the guide's file has where an excerpt of it is silent."""
    for name, value in (SIZES | FACTS).items():
        m.default(name, value)
    width = m.told_of("model.moe_intermediate_size") or 4096
    m.default("model.moe_intermediate_size", width)
    m.default("model.intermediate_size", width)
    m.default("train.dtype", "bfloat16")
    m.default("seed", 0)
    m.default("log.trackers", "tensorboard")
    if not m.value("data.data_prefix"):
        need(m, "data.path", "the guide's file names no data", "FILES")


TOOL = Tool(
    name="nemo_guide",
    title="the NeMo guide",
    recognise=recognise,
    table=TABLE,
    family="nemo",
    key=nemo.canonical,
    finish=finish,
)
