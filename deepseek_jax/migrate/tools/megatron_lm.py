"""Megatron-LM: command lines of pretrain_gpt.py, and the YAML in which its own tests keep them.

Source: megatron/training/arguments.py and training/config/*.py, snapshot of 2026-08.
"""

from deepseek_jax.migrate.handlers import as_int, no_effect, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import megatron_run
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.megatron_handlers import flag, query_groups, whole
from deepseek_jax.migrate.tools.megatron_model import (
    MODEL,
    ask_vocabulary,
    finish_model,
    padded_vocabulary,
)
from deepseek_jax.migrate.tools.shared import because, need

SECTIONS = ("MODEL_ARGS.", "language_model.", "model_parallel.")
SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "micro_batch_size",
    "train_iters",
    "lr",
)
# What the file does not set, and what this trainer lacks (arguments.py, TransformerConfig).
UNASKED = (
    (
        "normalization",
        "LayerNorm",
        "layers are normed by RMSNorm here",
        "Set --normalization RMSNorm",
    ),
    ("swiglu", "GELU", "MLPs are SwiGLU here", "Set --swiglu"),
    (
        "disable_bias_linear",
        "False",
        "linear maps have no biases here",
        "Set --disable-bias-linear",
    ),
    ("position_embedding_type", "learned_absolute", "positions are rotary here", "Set it to rope"),
    ("attention_dropout", "0.1", "there is no dropout here", "Set --attention-dropout 0"),
    ("hidden_dropout", "0.1", "there is no dropout here", "Set --hidden-dropout 0"),
)
VOCABULARIES = {"GPT2BPETokenizer": 50257}


def canonical(key: str) -> str:
    """ "MODEL_ARGS.--num-layers" -> "num_layers"."""
    for section in SECTIONS:
        key = key.removeprefix(section)
    if key.startswith("ENV_VARS."):
        return key
    key = key.lstrip("-").replace("-", "_")
    return {"norm_epsilon": "layernorm_epsilon", "use_rotary_position_embeddings": "use_rope"}.get(
        key, key
    )


def recognise(source: Source) -> int:
    """Its tests' YAML has a block of arguments; a command line has its flags."""
    if source.has("MODEL_ARGS"):
        return 100
    keys = {canonical(k) for k in source.keys()}
    if source.form == "flags" or source.has("language_model"):
        return 12 * len(keys & set(SIZES))
    return 0


def groups(m: Migration, entry: Entry) -> None:
    """--num-query-groups counts with --group-query-attention alone."""
    if flag(m, "group_query_attention"):
        query_groups(m, entry)
    else:
        m.no_effect(entry, "without --group-query-attention nothing reads it")


def environment(m: Migration, entry: Entry) -> None:
    """Variables that NCCL reads here as well, and those of torch and Transformer Engine."""
    name = entry.key.rpartition(".")[2]
    if name.startswith("NCCL_"):
        m.no_effect(entry, "NCCL reads it here as well: export it")
    else:
        m.no_effect(entry, "no library here reads this variable")


TABLE: dict[str, Handler] = {
    **MODEL,
    **mt.TRAINING,
    **megatron_run.AROUND,
    "num_query_groups": groups,
    "group_query_attention": no_effect("--num-query-groups says how many"),
    "use_rope": no_effect("positions are rotary here"),
    "bf16": mt.flagged({"train.dtype": "bfloat16"}),
    "fp16": mt.flagged({"train.dtype": "float16"}),
    "loss_scale": mt.of_float16("fp16.loss_scale"),
    "initial_loss_scale": mt.of_float16("fp16.initial_scale_power", power=True),
    "min_loss_scale": mt.of_float16("fp16.min_loss_scale"),
    "loss_scale_window": mt.of_float16("fp16.loss_scale_window"),
    "hysteresis": mt.of_float16("fp16.hysteresis"),
    "vocab_size": no_effect("it is padded in config.model.vocab_size"),
    "padded_vocab_size": no_effect("it is config.model.vocab_size"),
    "use_mcore_models": no_effect("there is one implementation"),
    "enable_experimental": no_effect("nothing here is experimental by a flag"),
    "step_batch_size_schedule": refuse("a batch grows evenly here", "Use --rampup-batch-size"),
    "apply_layernorm_1p": refuse("norms multiply by their weight here", "Leave it out"),
    "decoupled_min_lr": refuse("embedding and head have the rate of the rest", "Leave it out"),
    "MODE": refuse("it is a test of something else than training", "Take one of training", ()),
    "sft": refuse("its fine-tuning reads a format of its own", "Use configs/post/sft.py"),
    "ENV_VARS.*": environment,
    **because(
        {
            "it watches a run, and changes no number": (
                "rerun_* error_injection_* calc_ft_timeouts enable_ft_package otel_* inprocess_* "
                "straggler_* log_straggler disable_straggler* use_nsys_profiler nvtx_ranges "
                "use_pytorch_profiler pytorch_profiler_*"
            ),
            "the mesh says so": "use_tp_pp_dp_mapping cp_comm_type hierarchical_context_parallel_sizes",
            "held-out batches are micro-batches of training": (
                "eval_global_batch_size eval_micro_batch_size full_validation"
            ),
            "it is of inference": (
                "inference_* max_tokens_to_oom num_tokens_to_generate temperature top_k top_p prompts "
                "return_log_probs"
            ),
            "it is of fp8": "first_last_layers_bf16 num_layers_at_*_in_bf16",
        }
    ),
    "AFTER_SCRIPT": no_effect("it is of Megatron's tests"),
    "BEFORE_SCRIPT": no_effect("it is of Megatron's tests"),
    "TEST_TYPE": no_effect("it is of Megatron's tests"),
    "LAUNCHER": no_effect("it is of Megatron's tests"),
    "METRICS*": no_effect("it is of Megatron's tests"),
}


def vocabulary(m: Migration, tokenizers: dict[str, int], multiple: int) -> None:
    """The vocabulary's size: as it is given, or of a tokenizer that everybody knows, or to be given."""
    if entry := m.entry("padded_vocab_size"):
        m.tell(entry, "model.vocab_size", as_int(entry))
    elif (entry := m.entry("vocab_size")) and entry.value:
        padded_vocabulary(m, entry, as_int(entry), multiple)
    elif (name := str(m.value("tokenizer_type"))) in tokenizers:
        padded_vocabulary(m, None, tokenizers[name], multiple)
    else:
        ask_vocabulary(m, multiple)


def defaults_of_training(m: Migration) -> None:
    """What Megatron does where nothing says otherwise, whoever starts it."""
    m.default("optimizer.name", "adamw")
    m.default("optimizer.b1", 0.9)
    m.default("optimizer.eps", 1e-8)
    m.default("optimizer.grad_clip", 1.0)
    m.default("decay_shape", "exponential")
    m.default("warmup_steps", 0)
    m.default("min_lr", 0.0)
    m.default("strategy", "no_shard")
    m.default("train.remat", "none")
    m.default("data.document_mask", False)
    m.default("checkpoint.keep", 0)
    m.default("log.trackers", "")


def finish(m: Migration) -> None:
    """Its defaults."""
    finish_model(m, UNASKED, gated_third=True)
    m.note(
        "Megatron begins output layers at init_method_std / sqrt(2 layers); here all weights begin at "
        "config.model.initializer_range."
    )
    vocabulary(m, VOCABULARIES, whole(m, "make_vocab_size_divisible_by", 128))
    defaults_of_training(m)
    m.default("model.tie_word_embeddings", True)
    m.default("model.max_position_embeddings", whole(m, "seq_length", 4096))
    if flag(m, "multi_latent_attention"):
        m.default("model.kv_lora_rank", 32)
        m.default("model.qk_nope_head_dim", 128)
        m.default("model.qk_rope_head_dim", 64)
        m.default("model.v_head_dim", 128)
        m.default("model.rope_scaling.mscale", 1.0)
        if not flag(m, "qk_layernorm"):
            m.refuse_absent(
                "qk_layernorm", "False", "latents are normed here", "Set --qk-layernorm"
            )
    m.default("schedule", "linear")
    m.default("optimizer.b2", 0.999)
    m.default("optimizer.weight_decay", 0.01)
    m.default("train.dtype", "float32")
    m.default("data.split", "969,30,1")
    m.default("seed", 1234)
    m.default("save_when", "steps" if m.value("save_interval") else "no")
    m.default("eval_when", "steps" if m.value("eval_interval") else "no")
    m.default("eval.batches", 100)
    m.default("log_every", 100)
    m.default("train.mtp_loss_weight", 0.1)
    m.default("train.mtp_loss_weight_final", 0.1)
    if not m.value("data_path"):
        need(m, "data.path", "files of the data", "FILES")


TOOL = Tool(
    name="megatron",
    title="Megatron-LM",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
