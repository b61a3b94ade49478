"""NeMo 1 (megatron_gpt_config.yaml and its kin), and the launcher's files around it.

Keys lose their leading "model."; the model's words are Megatron-core's. Sources:
examples/nlp/language_modeling/conf and nemo/core/optim/lr_scheduler.py of NeMo, and launcher_scripts/conf of
NeMo-Framework-Launcher.
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_int,
    fact,
    neutral,
    no_effect,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools import nemo_finetuning as tuning
from deepseek_jax.migrate.tools import nemo_words as words
from deepseek_jax.migrate.tools.megatron_handlers import flag, whole
from deepseek_jax.migrate.tools.megatron_model import (
    MODEL,
    ask_vocabulary,
    finish_model,
    padded_vocabulary,
)
from deepseek_jax.migrate.tools.megatron_run import CONVERT
from deepseek_jax.migrate.tools.shared import NO_FP8, because, need

UNASKED = (
    ("normalization", "layernorm", "layers are normed by RMSNorm here", "Set it to rmsnorm"),
    ("activation", "gelu", "MLPs are SwiGLU here", "Set it to fast-swiglu"),
    ("bias", "True", "linear maps have no biases here", "Set it to false"),
    ("position_embedding_type", "learned_absolute", "positions are rotary here", "Set it to rope"),
    ("hidden_dropout", "0.1", "there is no dropout here", "Set it to 0"),
    ("attention_dropout", "0.1", "there is no dropout here", "Set it to 0"),
)
# Rows of the tokenizers that public NeMo files name.
VOCABULARIES = {
    "GPT2BPETokenizer": 50257,
    "meta-llama/Meta-Llama-3-8B": 128256,
    "mistralai/Mixtral-8x7B-v0.1": 32000,
    "mistralai/Mistral-7B-v0.1": 32000,
}


def canonical(key: str) -> str:
    """ "model.optim.lr" -> "optim.lr"."""
    return key.removeprefix("model.")


def recognise(source: Source) -> int:
    """A block of Lightning's trainer beside a model."""
    if not source.has("trainer") or source.has("model._target_"):
        return 0
    known = (
        "exp_manager",
        "model.optim",
        "model.micro_batch_size",
        "model.tensor_model_parallel_size",
    )
    return 40 + 20 * sum(bool(source.has(key)) for key in known)


MODEL_OF_NEMO: Mapping[str, Handler] = {
    "micro_batch_size": fact("per_device_batch", as_int),
    "global_batch_size": fact("global_batch", as_int),
    "rampup_batch_size": mt.ramp,
    "rotary_percentage": option("model.partial_rotary_factor"),
    "seq_len_interpolation_factor": MODEL["rotary_seq_len_interpolation_factor"],
    "activations_checkpoint_granularity": mt.recompute,
    "activations_checkpoint_*": no_effect("every layer is recomputed alike"),
    "num_micro_batches_with_partial_activation_checkpoints": no_effect(
        "every layer is recomputed alike"
    ),
    "native_amp_init_scale": mt.of_float16("fp16.initial_scale_power", power=True),
    "native_amp_growth_interval": mt.of_float16("fp16.loss_scale_window"),
    "hysteresis": mt.of_float16("fp16.hysteresis"),
    "fsdp": words.fsdp,
    "fsdp_*": no_effect("model.fsdp says what is divided"),
    "fp8": refuse(NO_FP8, "Set it to false"),
    "fp8_*": no_effect("they are of fp8"),
    "reduce_amax": no_effect("it is of fp8"),
    "cpu_offloading_*": no_effect("cpu_offloading says so"),
    "restore_from_path": tuning.begins_with,
    "restore_from_ckpt": refuse("a checkpoint of NeMo's is not read", CONVERT, (None, "")),
    "resume_from_checkpoint": refuse("a checkpoint of NeMo's is not read", CONVERT, (None, "")),
    "seed": option("seed"),
    "nsys_profile.*": no_effect("traces are taken with --config.profile.start"),
    "mcore_gpt": neutral({True: ""}, "the model is that of Megatron-core"),
    "skip_train": refuse("a run trains", "Set it to false"),
    "drop_layers": refuse(
        "layers are dropped by python -m deepseek_jax.compress", "", (None, [], "[]")
    ),
    "do_layer_norm_weight_decay": refuse("norms are never decayed here", "Set it to false"),
    "use_scaled_init_method": no_effect("weights begin at initializer_range: see the note"),
    "make_vocab_size_divisible_by": no_effect("config.model.vocab_size is padded by it"),
    "vocab_size": no_effect("it is padded in config.model.vocab_size"),
    "mcore_customization_config.*": refuse(
        "there is no other block", "Set it to false", (False, None)
    ),
    "scale_positional_embedding": refuse("embeddings are not scaled here", "Set it to false"),
    "gc_interval": no_effect("Python's garbage collector is no matter here"),
    **because(
        {
            "it changes no number": (
                "pre_process post_process onnx_safe apex_transformer_log_level sync_batch_comm "
                "megatron_amp_O2 fp16_lm_cross_entropy grad_allreduce_chunk_size_mb "
                "grad_div_ar_fusion transformer_engine get_attention_mask_from_fusion use_emha "
                "enable_megatron_timers megatron_timer_kwargs.* validation_param_sync_overlap "
                "reset_lr reset_lr_steps seconds_to_sleep save_nemo_on_validation_end mcore_bert"
            ),
            "checkpoints are sharded, whole, and restore on any mesh": (
                "dist_ckpt_* s3_checkpointing.*"
            ),
            "names in the launcher's files": ("name run.* defaults defaults.* hydra.*"),
        }
    ),
}

TABLE: dict[str, Handler] = {
    **MODEL,
    **mt.TRAINING,
    **words.TRAINER,
    **words.EXPERIMENT,
    **words.OPTIM,
    **words.DATA,
    **MODEL_OF_NEMO,
    **tuning.TABLE,
    "run.time_limit": words.clock,
}


def finish(m: Migration) -> None:
    """Its defaults."""
    if tuning.is_on(m):
        tuning.finish(m)
    else:
        finish_model(m, UNASKED)
        _vocabulary(m)
        m.default("model.tie_word_embeddings", True)
        m.default("data.document_mask", False)
        m.default("data.split", "900,50,50")
        if not m.value("data.data_prefix"):
            need(m, "data.path", "model.data.data_prefix is not given", "FILES")
    if flag(m, "use_scaled_init_method", default=True) and not tuning.is_on(m):
        m.note(
            "use_scaled_init_method begins output layers at init_method_std / sqrt(2 layers); here all "
            "weights begin at config.model.initializer_range."
        )
    warmup, peak = whole(m, "optim.sched.warmup_steps"), m.told_of("learning_rate")
    if warmup and peak and not whole(m, "optim.sched.constant_steps"):
        # its warmup is (step + 1) / (warmup_steps + 1)
        m.default("warmup_init", peak / (warmup + 1))
    m.default("learning_rate", 2e-4)
    m.default("schedule", "cosine")
    m.default("min_lr", 0.0)
    m.default("warmup_steps", 0)
    m.default("optimizer.name", "adamw")
    m.default("optimizer.b1", 0.9)
    m.default("optimizer.b2", 0.98)
    m.default("optimizer.weight_decay", 0.01)
    m.default("optimizer.grad_clip", 0.0)
    m.default("strategy", "no_shard")
    m.default("train.dtype", "float32")
    m.default("train.remat", "none")
    m.default("seed", 1234)
    m.default("save_every", m.told_of("eval_every") or 100)
    m.default("eval_every", 100)
    m.default("log_every", 10)
    m.default("checkpoint.keep_best", 3)
    m.default("checkpoint.keep", 1)
    m.default("log.trackers", "tensorboard")


def _vocabulary(m: Migration) -> None:
    multiple = whole(m, "make_vocab_size_divisible_by", 128)
    kind = str(m.value("tokenizer.type"))
    if (entry := m.entry("vocab_size")) and entry.value:
        padded_vocabulary(m, entry, as_int(entry), 1)
    elif kind in VOCABULARIES:
        padded_vocabulary(m, m.entry("tokenizer.type"), VOCABULARIES[kind], multiple)
    else:
        ask_vocabulary(m, multiple)


TOOL = Tool(
    name="nemo",
    title="NeMo 1",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
