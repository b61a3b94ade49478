"""ms-swift: `swift sft` and `swift pt`, with transformers' Trainer; megatron_swift.py has Megatron's.

Sources: swift/arguments and swift/trainers/arguments.py, snapshot of 2026-08.
"""

import math

from deepseek_jax.migrate.handlers import (
    as_int,
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
from deepseek_jax.migrate.tools import hf, trl_arguments
from deepseek_jax.migrate.tools import swift_words as words
from deepseek_jax.migrate.tools.shared import because, lora_modules, need, tell_defaults

KERNELS = "XLA chooses and fuses kernels"
OF_METHOD = "it is of a method that is not chosen"
OTHER_OPTIMIZER = "there is no such optimizer"
OWN = (
    "tuner_type",
    "train_type",
    "split_dataset_ratio",
    "model_author",
    "load_from_cache_file",
    "dataset_num_proc",
    "truncation_strategy",
    "torch_dtype",
    "attn_impl",
    "loss_scale",
)
OF_MEGATRON = (
    "micro_batch_size",
    "global_batch_size",
    "lr",
    "train_iters",
    "recompute_granularity",
    "mcore_model",
)


def recognise(source: Source) -> int:
    """A model, data and its words."""
    if not source.has("model") or not source.has("dataset"):
        return 0
    megatron = 50 if source.has(*OF_MEGATRON) else 0
    return max(min(30 * source.has(*OWN), 100) - megatron, 0)


# Model, data, template and LoRA, which both ways share.
COMMON: dict[str, Handler] = {
    "model": words.model,
    "tuner_type": words.method,
    "train_type": words.method,
    "sft_type": words.method,
    "dataset": words.dataset,
    "split_dataset_ratio": words.held_out,
    "max_length": fact("sequence_length", as_int),
    "system": option("sft.system_prompt"),
    "packing": trl_arguments.packing,
    "packing_length": fact("sequence_length", as_int),
    "packing_strategy": no_effect("whole examples are packed, the longest first"),
    "loss_scale": words.scored,
    "truncation_strategy": words.too_long,
    "template": no_effect("a model brings its template: see what is to be given"),
    "enable_thinking": words.thinking,
    "interleave_prob": option("data.weights"),
    "lora_rank": words.of_lora(option("lora.r")),
    "lora_alpha": words.of_lora(option("lora.alpha")),
    "lora_dropout": words.of_lora(option("lora.dropout")),
    "lora_bias": words.of_lora(
        neutral({"none": ""}, "biases are not trained here", "Set it to none")
    ),
    "lora_dtype": words.of_lora(no_effect("A and B are float32")),
    "target_modules": words.of_lora(lora_modules),
    "target_regex": words.of_lora(
        refuse("names are the ends of paths here", "Write target_modules")
    ),
    "modules_to_save": words.of_lora(option("lora.modules_to_save")),
    "use_rslora": words.of_lora(hf.switch("lora.use_rslora", True)),
    "use_dora": refuse("there is no DoRA here", "Set it to false"),
    "lorap_lr_ratio": refuse("A and B have one learning rate here", "Leave it out"),
    "init_weights": neutral({"true": "", "gaussian": ""}, "A begins random and B at zero here"),
    "merge_lora": no_effect("python -m deepseek_jax.hf export merges it"),
    "adapters": refuse(
        "one adapter is gone on with: --config.lora.adapter", "Set that", (None, "[]")
    ),
    "quant_bits": one_of(
        {
            "4": {"lora.base_dtype": "nf4"},
            "8": {"lora.base_dtype": "int8"},
            "none": "the base has 16 bits",
        },
        "a base has 4, 8 or 16 bits here",
    ),
    "quant_method": no_effect("4 bits are nf4 here, 8 are int8"),
    "bnb_4bit_*": no_effect("4 bits are nf4 here, with scales of 8 bits"),
    "enable_dft_loss": hf.switch("sft.loss_type", "dft"),
    "freeze_llm": refuse("the language model is what is trained", "Set it to false"),
    "freeze_parameters": words.trained,
    "freeze_parameters_regex": words.trained,
    "trainable_parameters": words.trained,
    "trainable_parameters_regex": words.trained,
    "rope_scaling": refuse("a model is what its config.json says", "Write it there"),
    "rlhf_type": refuse("preferences and rewards are not what is learnt here", "Leave it out"),
    "new_special_tokens": refuse(
        "a tokenizer is taken as it is", "Add them to the tokenizer first"
    ),
    "ENV.*": words.environment,
    **because(
        {
            "of a model that sees, and this is a language model": (
                "freeze_vit freeze_aligner vit_* aligner_* max_pixels norm_bbox"
            ),
            "it is of the data swift/self-cognition: write the names into them": (
                "model_name model_author"
            ),
            "data are read where they lie, and tokenised once": (
                "load_from_cache_file dataset_* val_dataset* cached_* lazy_tokenize streaming "
                "columns strict custom_* download_mode shuffle_buffer_size "
                "disable_auto_column_mapping stopping_strategy packing_num_proc "
                "add_non_thinking_prefix agent_template"
            ),
            "padding is no token here, and packed examples are kept apart": (
                "padding_* use_chat_template"
            ),
            KERNELS: (
                "attn_impl experts_impl use_liger_kernel device_map max_memory use_logits_to_keep"
            ),
            "python -m deepseek_jax.hf export writes the model": (
                "safe_serialization save_safetensors max_shard_size create_checkpoint_symlink "
                "add_version"
            ),
            "the model's folder says so": (
                "model_type model_revision task_type use_hf hub_token check_model local_repo_path "
                "tuner_backend model_kwargs external_plugins ignore_args_error"
            ),
            "the log has losses and times": ("enable_channel_loss swanlab_* callbacks logging_dir"),
        }
    ),
}

TABLE: dict[str, Handler] = {
    **hf.TABLE4,
    **COMMON,
    "warmup_ratio": fact("warmup_fraction"),
    "deepspeed": words.deepspeed,
    "fsdp": words.fsdp,
    "deepspeed_autotp_size": fact("tensor", as_int),
    "zero_hpz_partition_size": fact("shards", as_int),
    "sequence_parallel_size": fact("context", as_int),
    "acc_strategy": no_effect("the loss is a mean over the scored tokens of a step"),
    "nproc_per_node": fact("gpus_per_node", as_int),
    "use_ray": no_effect("python -m deepseek_jax.launch ray starts it"),
    "device_groups*": no_effect("python -m deepseek_jax.launch ray starts it"),
    "optimizer": refuse(OTHER_OPTIMIZER, "Set optim"),
    **{
        key: refuse(OTHER_OPTIMIZER, "Leave it out", (None, False, 0))
        for key in ("use_galore", "lisa_activated_layers")
    },
    "galore_*": no_effect(OF_METHOD),
    "lisa_*": no_effect(OF_METHOD),
    "resume_only_model": no_effect("the same command goes on from --workdir"),
    "max_new_tokens": no_effect("python -m deepseek_jax.generate samples"),
    "temperature": no_effect("python -m deepseek_jax.generate samples"),
    "early_stop_interval": refuse("a run ends after its steps", "Leave it out"),
}


def tell_method(m: Migration) -> None:
    """Defaults of LoRA, and what is to be given."""
    if words.kind(m).startswith("lora"):
        m.default("lora.r", m.told_of("lora.r") or 8)
        m.default("lora.alpha", 32.0)
        m.default("lora.dropout", 0.05)
        m.default("lora.target_modules", "all-linear")
    need(
        m,
        "sft.chat_template",
        "the template that swift has for this model, where its folder has none",
    )


def finish(m: Migration) -> None:
    """Its defaults."""
    lora = words.kind(m).startswith("lora")
    if lora and not (m.entry("tuner_type") or m.entry("train_type") or m.entry("sft_type")):
        m.note("tuner_type is not given, and swift trains LoRA then.")
    tell_method(m)
    if not any(r.kin in ("accelerate", "deepspeed") for r in m.readings):
        m.default("strategy", "no_shard")
    each = int(m.told_of("per_device_batch") or 1)
    world = m.told_of("world") or (m.told_of("gpus_per_node") or 0) * (m.told_of("nodes") or 1)
    world = int(world or m.devices or 1)
    tell_defaults(
        m,
        objective="sft",
        learning_rate=1e-4 if lora else 1e-5,
        schedule="cosine",
        optimizer__b2=0.95,
        optimizer__weight_decay=0.1,
        per_device_batch=1,
        accumulation=max(1, math.ceil(16 / each / world)),
        epochs=3.0,
        train__dtype="bfloat16",
        train__remat="full",
        unpacked=True,
        sft__packing="none",
        sft__truncation="drop",
        eval_when="steps" if m.told_of("data.eval_fraction") else "no",
        eval_every=m.told_of("save_every") or 500,
        log_every=5,
        log__trackers="tensorboard",
    )
    if not m.told_of("sequence_length"):
        need(m, "train.sequence_length", "max_length is not given: the model's longest there")
    if is_off(m.value("bf16")) and str(m.value("torch_dtype")) in ("float16", "float32"):
        m.default("train.dtype", str(m.value("torch_dtype")))


TOOL = Tool(
    name="swift",
    title="ms-swift",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
