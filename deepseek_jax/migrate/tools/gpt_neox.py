"""gpt-neox: YAML in the words of Megatron and DeepSpeed, with or without dashes.

Sources: megatron/neox_arguments/neox_args.py and arguments.py, snapshot of 2026-05.
"""

from deepseek_jax.migrate.handlers import (
    as_int,
    as_text,
    fact,
    is_off,
    neutral,
    no_effect,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import gpt_neox_words as words
from deepseek_jax.migrate.tools import megatron_data as md
from deepseek_jax.migrate.tools import megatron_lm, megatron_run
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_handlers import flag, has_experts, whole, yes_no
from deepseek_jax.migrate.tools.megatron_model import NO_DROPOUT, padded_vocabulary
from deepseek_jax.migrate.tools.nemo_words import betas
from deepseek_jax.migrate.tools.shared import because, need
from deepseek_jax.migrate.tracking import if_there

UNASKED = (
    ("norm", "layernorm", "layers are normed by RMSNorm here", "Set it to rmsnorm"),
    ("activation", "gelu", "MLPs are SwiGLU here", "Set it to swiglu"),
    ("pos_emb", "learned", "positions are rotary here", "Set it to rotary"),
    ("use_bias_in_attn_linear", "True", "linear maps have no biases here", "Set it to false"),
    ("use_bias_in_mlp", "True", "linear maps have no biases here", "Set it to false"),
)
VOCABULARIES = {"GPT2BPETokenizer": 50257}


def canonical(key: str) -> str:
    """ "pipe-parallel-size" -> "pipe_parallel_size"."""
    return key.replace("-", "_")


def recognise(source: Source) -> int:
    """Its own words beside Megatron's."""
    keys = {canonical(k) for k in source.keys()}
    own = {
        "pipe_parallel_size",
        "model_parallel_size",
        "pos_emb",
        "no_weight_tying",
        "rotary_pct",
        "gpt_j_residual",
    }
    own |= {
        "checkpoint_factor",
        "num_kv_heads",
        "output_layer_init_method",
        "partition_activations",
    }
    return min(25 * len(keys & own), 95)


PLAIN = neutral({False: ""}, "blocks are attention, then MLP, here", "Set it to false")

TABLE: dict[str, Handler] = {
    **mt.TRAINING,
    **megatron_run.AROUND,
    "pipe_parallel_size": words.stages,
    "model_parallel_size": fact("tensor", as_int),
    "pipe_partition_method": no_effect(mt.ANY_STAGES),
    "is_pipe_parallel": no_effect("pipe_parallel_size says so"),
    "world_size": fact("world", as_int),
    "global_num_gpus": fact("world", as_int),
    "num_nodes": fact("nodes", as_int),
    "num_gpus": fact("gpus_per_node", as_int),
    "num_layers": option("model.num_hidden_layers"),
    "hidden_size": option("model.hidden_size"),
    "intermediate_size": words.width,
    "mlp_multiple_of": no_effect("config.model.intermediate_size is a multiple of it"),
    "num_attention_heads": option("model.num_attention_heads"),
    "num_kv_heads": option("model.num_key_value_heads"),
    "seq_length": fact("sequence_length", as_int),
    "max_position_embeddings": option("model.max_position_embeddings"),
    "norm": neutral({"rmsnorm": ""}, "layers are normed by RMSNorm here", "Set it to rmsnorm"),
    "rms_norm_epsilon": option("model.rms_norm_eps"),
    "layernorm_epsilon": no_effect("it is of LayerNorm"),
    "scalenorm_epsilon": no_effect("it is of ScaleNorm"),
    "pos_emb": neutral({"rotary": ""}, "positions are rotary here", "Set it to rotary"),
    "rotary_pct": option("model.partial_rotary_factor"),
    "rotary_emb_base": option("model.rope_theta"),
    "no_weight_tying": yes_no("model.tie_word_embeddings", inverted=True),
    "activation": neutral({"swiglu": ""}, "MLPs are SwiGLU here", "Set it to swiglu"),
    "use_bias_in_attn_linear": refuse("linear maps have no biases here", "Set it to false"),
    "use_bias_in_mlp": refuse("linear maps have no biases here", "Set it to false"),
    "use_bias_in_norms": no_effect("RMSNorm has none"),
    "use_qk_layernorm": yes_no("model.use_qk_norm"),
    "sliding_window_width": refuse("there is no sliding window here", "Leave it out"),
    "attention_config*": words.kinds_of_attention,
    "sparsity_config*": refuse("attention is over the whole sequence here", "Leave it out"),
    "gpt_j_residual": PLAIN,
    "gpt_j_tied": PLAIN,
    "init_method": no_effect("weights begin at config.model.initializer_range; see the note"),
    "output_layer_init_method": no_effect(
        "weights begin at config.model.initializer_range; see the note"
    ),
    "init_method_std": option("model.initializer_range"),
    "use_mup": refuse("there is no muP here", "Set it to false"),
    "hidden_dropout": NO_DROPOUT,
    "attention_dropout": NO_DROPOUT,
    "moe_num_experts": words.experts,
    "moe_top_k": option("model.num_experts_per_tok"),
    "moe_router_type": words.router,
    "moe_expert_interval": neutral(
        {1: ""}, "all layers have experts but the first ones here", "Set it to 1"
    ),
    "moe_jitter_eps": refuse("the router's input is not noised here", "Leave it out", (None, 0)),
    "moe_lbl_in_fp32": no_effect("the balance loss is in float32"),
    "moe_*": no_effect(mt.XLA),
    "output_layer_parallelism": no_effect("the head is divided as the mesh says"),
    "optimizer.type": words.optimizer,
    "optimizer.params.lr": fact("learning_rate"),
    "optimizer.params.betas": betas,
    "optimizer.params.eps": option("optimizer.eps"),
    "optimizer.params.weight_decay": option("optimizer.weight_decay"),
    "scheduler*": no_effect(
        "lr_decay_style says so: DeepSpeed's scheduler is for 1-bit Adam alone"
    ),
    "lr_decay_fraction": refuse("the schedule's length is in steps here", "Write lr_decay_iters"),
    "warmup": fact("warmup_fraction"),
    "min_lr": words.last_rate,
    "zero_optimization.stage": words.stage_of_zero,
    "zero_optimization.*": no_effect(mt.OVERLAP),
    "train_micro_batch_size_per_gpu": fact("per_device_batch", as_int),
    "train_batch_size": fact("global_batch", as_int),
    "gradient_accumulation_steps": fact("accumulation", as_int),
    "gradient_clipping": option("optimizer.grad_clip"),
    "precision": mt.precision,
    "fp16.enabled": mt.flagged({"train.dtype": "float16"}),
    "bf16.enabled": mt.flagged({"train.dtype": "bfloat16"}),
    "fp16.loss_scale": mt.of_float16("fp16.loss_scale"),
    "fp16.loss_scale_window": mt.of_float16("fp16.loss_scale_window"),
    "fp16.initial_scale_power": mt.of_float16("fp16.initial_scale_power"),
    "fp16.hysteresis": mt.of_float16("fp16.hysteresis"),
    "fp16.min_loss_scale": mt.of_float16("fp16.min_loss_scale"),
    "fp16.type": no_effect("precision says so"),
    "data_types.grad_accum_dtype": one_of(
        {
            "fp32": {"train.accumulation_dtype": "float32"},
            "bf16": {"train.accumulation_dtype": "bfloat16"},
        },
        "gradients are summed in float32 or bfloat16",
    ),
    "checkpoint_activations": words.remat,
    "checkpoint_factor": fact("save_every", as_int),
    "checkpoint_scale": neutral(
        {"linear": ""}, "checkpoints are a number of steps apart", "Set it to linear"
    ),
    "keep_last_n_checkpoints": option(
        "checkpoint.keep", lambda e: 0 if is_off(e.value) else as_int(e)
    ),
    "train_epochs": fact("epochs"),
    "data_path": md.prefixes,
    "train_data_paths": md.prefixes,
    "train_data_weights": option("data.weights", as_text),
    "valid_data_paths": no_effect("a share of the data is held out (config.data.eval_fraction)"),
    "test_data_paths": no_effect("a run does not test"),
    "use_wandb": words.weights_and_biases,
    "wandb_project": if_there("log.project", "the tracker has a project of its own"),
    "wandb_run_name": if_there("log.run_name", "the run is its workdir"),
    "tensorboard_dir": no_effect("events are in WORKDIR/tensorboard"),
    "steps_per_print": no_effect("log_interval says how often"),
    **because(
        {
            "W&B reads its own environment variables": ("wandb_*"),
            "every layer is recomputed alike": (
                "checkpoint_num_layers partition_activations synchronize_each_layer "
                "contiguous_checkpointing deepspeed_activation_checkpointing profile_backward "
                "activation_checkpointing*"
            ),
            "gradients are summed in float32": (
                "fp32_allreduce prescale_gradients gradient_predivide_factor"
            ),
            "processes find each other, or python -m deepseek_jax.launch starts them": (
                "hostfile include exclude launcher master_port master_addr deepspeed* user_script"
            ),
            "the log has loss, gradient norm, rates, memory and times": (
                "wall_clock_breakdown dump_state log_dir memory_profiling* git_hash flops_profiler*"
            ),
            "files of token ids are mapped into memory": (
                "data_impl mmap_warmup use_shared_fs pack_impl"
            ),
        }
    ),
    "scaled_*_softmax_fusion": no_effect(mt.XLA),
    "checkpoint_in_cpu": mt.flagged({"offload.activations": "layer_input"}),
    "fp16.fp16": mt.flagged({"train.dtype": "float16"}),
    "fp16.auto_cast": no_effect("inputs are token ids"),
    "extra_save_iters": no_effect("checkpoints are a number of steps apart"),
    "te_fp8*": no_effect("it is of fp8"),
    "te_*": no_effect(mt.XLA),
    "gmlp_attn_dim": no_effect("it is of gMLP"),
    "autotuning*": refuse("see python -m deepseek_jax.plan advise", "Leave it out"),
    "curriculum_*": refuse("sequences have one length here", "Leave it out"),
    "train_impl": neutral({"normal": ""}, "it trains the next token", "Set it to normal"),
    "soft_prompt_tuning*": refuse("there are no soft prompts here", "Leave it out"),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    for key, unasked, why, repair in UNASKED:
        if m.value(key) is None:
            m.refuse_absent(key, unasked, why, repair)
    hidden, heads = whole(m, "hidden_size"), max(whole(m, "num_attention_heads", 1), 1)
    wide = words.gated_width(m, whole(m, "intermediate_size", 4 * hidden))
    m.default("model.intermediate_size", wide)
    m.default("model.num_key_value_heads", heads)
    m.default("model.head_dim", hidden // heads)
    m.default("model.rope_interleave", False)
    m.default("model.rms_norm_eps", 1e-8)
    m.default("model.initializer_range", 0.02)
    m.default("model.tie_word_embeddings", not flag(m, "no_weight_tying"))
    if whole(m, "moe_num_experts", 1) > 1 or has_experts(m):
        m.default("model.moe_intermediate_size", wide)
        m.default("model.first_k_dense_replace", 0)
        m.default("model.n_shared_experts", 0)
        m.default("model.topk_method", "greedy")
        m.default("model.routed_scaling_factor", 1.0)
        m.default("model.norm_topk_prob", False)
        if m.value("moe_router_type") is None:
            m.refuse_absent(
                "moe_router_type",
                "sinkhorn",
                "experts are chosen by the highest scores here",
                "Set topk",
            )
    else:
        m.default("model.first_k_dense_replace", whole(m, "num_layers"))
    m.default("model.aux_loss_alpha", 0.0)
    m.default("moe.bias_update_rate", 0.0)
    multiple = whole(m, "make_vocab_size_divisible_by", 128) * whole(m, "model_parallel_size", 1)
    kind = str(m.value("tokenizer_type", "GPT2BPETokenizer"))
    if kind in VOCABULARIES:
        padded_vocabulary(m, None, VOCABULARIES[kind], multiple)
    else:
        need(
            m,
            "model.vocab_size",
            f"the size of the tokenizer, rounded up to a multiple of {multiple}",
            "SIZE",
        )
    megatron_lm.defaults_of_training(m)
    for name, value in {
        "schedule": "linear",
        "warmup_fraction": 0.01,
        "optimizer.b2": 0.999,
        "optimizer.weight_decay": 0.1,
        "train.dtype": "float32",
        "accumulation": 1,
        "seed": 1234,
        "data.split": "969,30,1",
        "eval_every": 1000,
        "eval.batches": 100,
        "save_when": "steps" if m.value("checkpoint_factor") else "no",
        "log_every": 100,
    }.items():
        m.default(name, value)
    if not m.value("data_path") and not m.value("train_data_paths"):
        need(m, "data.path", "data_path is not given", "FILES")


TOOL = Tool(
    name="gpt_neox",
    title="gpt-neox",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
