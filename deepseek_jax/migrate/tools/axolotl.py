"""axolotl: one YAML, with words of its own over those of transformers and Accelerate.

Sources: src/axolotl/utils/schemas, core/builders/base.py and utils/distributed.py, snapshot of 2026-07.
"""

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
from deepseek_jax.migrate.tools import axolotl_words as words
from deepseek_jax.migrate.tools import hf_arguments as hf
from deepseek_jax.migrate.tools import hf_schedule, trl_arguments
from deepseek_jax.migrate.tools.shared import NO_FP8, because, lora_modules, need, tell_defaults
from deepseek_jax.migrate.tracking import if_there

LEFT_OUT = "it says what becomes of the model after training"
SPLIT = "take this part when the data are downloaded"
OTHER_AIM = "preferences and rewards are not what is learnt here"
SIZES = {
    "tensor_parallel_size": "tensor",
    "context_parallel_size": "context",
    "sequence_parallel_degree": "context",
}


def canonical(key: str) -> str:
    """Without the prefix of fsdp_config's keys."""
    section, dot, rest = key.partition(".")
    return f"fsdp_config.{rest.removeprefix('fsdp_')}" if dot and section == "fsdp_config" else key


def recognise(source: Source) -> int:
    """Its names for model, length and batch."""
    own = (
        "base_model",
        "sequence_len",
        "sample_packing",
        "micro_batch_size",
        "val_set_size",
        "dataset_prepared_path",
    )
    return min(25 * source.has(*own), 100)


TABLE: dict[str, Handler] = {
    # words of transformers, as they are there
    **{
        key: hf.ARGUMENTS[key]
        for key in (
            "learning_rate",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "max_steps",
            "gradient_accumulation_steps",
            "warmup_steps",
            "output_dir",
            "save_strategy",
            "save_steps",
            "eval_steps",
            "eval_strategy",
            "save_total_limit",
            "save_only_model",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "seed",
            "tf32",
            "logging_steps",
            "resume_from_checkpoint",
            "dataloader_*",
            "ddp_*",
            "torch_compile*",
            "remove_unused_columns",
            "gradient_checkpointing_kwargs",
            "gradient_checkpointing_kwargs.*",
            "deepspeed",
            "hub_*",
            "torch_empty_cache_steps",
            "auto_find_batch_size",
            "optim_args",
            "debug",
        )
    },
    "optimizer": hf.ARGUMENTS["optim"],
    "lr_scheduler": hf_schedule.SCHEDULE["lr_scheduler_type"],
    **{k: v for k, v in hf_schedule.SCHEDULE.items() if k.startswith("lr_scheduler_kwargs")},
    "cosine_min_lr_ratio": fact("min_lr_fraction"),
    "cosine_constant_lr_ratio": refuse(
        "a schedule holds at its end for hold_steps here", "Set optimizer.hold_steps"
    ),
    "lr_quadratic_warmup": refuse("a warmup is linear or logarithmic here", "Set it to false"),
    "lr_groups*": refuse(
        "learning rates of parts are --config.optimizer.lr_multipliers", "Set that"
    ),
    "embedding_lr*": refuse(
        "learning rates of parts are --config.optimizer.lr_multipliers", "Set that", (None,)
    ),
    "loraplus_*": refuse("A and B have one learning rate here", "Leave it out", (None,)),
    "warmup_ratio": fact("warmup_fraction"),
    "num_epochs": fact("epochs"),
    "micro_batch_size": fact("per_device_batch", as_int),
    "batch_size": refuse("axolotl no longer reads it", "Set gradient_accumulation_steps"),
    "evaluation_strategy": hf.ARGUMENTS["eval_strategy"],
    "eval_batch_size": no_effect("held-out batches are micro-batches of training"),
    "sequence_len": fact("sequence_length", as_int),
    "saves_per_epoch": words.times_a_pass("save_when", "save_every", "epoch"),
    "evals_per_epoch": words.times_a_pass("eval_when", "eval_every", "no"),
    "bf16": one_of(
        {
            "auto": {"train.dtype": "bfloat16"},
            "true": {"train.dtype": "bfloat16"},
            "full": {"train.dtype": "bfloat16"},
            "false": "it is off",
            "none": "it is off",
        },
        "it is neither true, false nor auto",
    ),
    "bfloat16": hf.switch("train.dtype", "bfloat16"),
    "fp16": hf.switch("train.dtype", "float16"),
    "float32": hf.switch("train.dtype", "float32"),
    "fp8*": refuse(NO_FP8, "Leave fp8 out"),
    # model
    "base_model": trl_arguments.model,
    "reinit_weights": refuse(
        "init_from brings weights", "Leave init_from out, and give config.model its sizes"
    ),
    "tokenizer_config": option("data.tokenizer"),
    "special_tokens.eos_token": option("sft.eos_token"),
    "special_tokens*": no_effect("padding is no token here, and the rest is the tokenizer's"),
    "tokens": refuse("a tokenizer is taken as it is", "Add them to the tokenizer first", (None,)),
    # data
    "datasets.*.path": words.data_path,
    "datasets.*.type": words.data_type,
    "datasets.*.type.*": refuse("there is no such prompt here", "Write the rows as messages"),
    "datasets.*.split": no_effect(SPLIT),
    "datasets.*.name": no_effect(SPLIT),
    "datasets.*.data_files": no_effect(SPLIT),
    "datasets.*.ds_type": no_effect("by the ending of the file"),
    "datasets.*.field_messages": no_effect("sft.format says which columns are read"),
    "datasets.*.message_property_mappings*": no_effect("sft.format says which columns are read"),
    "datasets.*.roles_to_train": neutral(
        {"['assistant']": "", "assistant": ""}, "the assistant is scored here"
    ),
    "datasets.*.train_on_eos": neutral(
        {"turn": "", "all": ""}, "the token that ends an answer is scored here"
    ),
    "pretraining_dataset": words.one_pretraining_set,
    "pretraining_dataset.*.path": words.data_path,
    "pretraining_dataset.*.type": neutral({"pretrain": ""}, "documents are read as text"),
    "pretraining_dataset.*": no_effect(SPLIT),
    "test_datasets*": no_effect("a share of the data is held out (config.data.eval_fraction)"),
    "datasets.*.field": neutral({"text": ""}, "texts are a column text here", "Rename it"),
    "datasets.*.message_field_*": no_effect("sft.format says which columns are read"),
    "datasets.*.field_thinking": no_effect("a template reads the keys of a message"),
    "datasets.*.template_thinking_key": no_effect("a template reads the keys of a message"),
    "eot_tokens": no_effect("what ends an answer in the template is scored"),
    "chat_template": words.template,
    "chat_template_jinja": option("sft.chat_template"),
    "default_system_message": option("sft.system_prompt"),
    "train_on_inputs": words.inputs,
    "val_set_size": words.held_out,
    "sample_packing": words.packing,
    "excess_length_strategy": words.too_long,
    "neftune_noise_alpha": option("sft.neftune_noise_alpha"),
    "plugins": words.plugin,
    # devices
    "expert_parallel_size": fact("expert", as_int),
    "dp_shard_size": words.shards,
    "dp_replicate_size": fact("replicas", as_int),
    **{key: fact(name, as_int) for key, name in SIZES.items()},
    "ray_num_workers": words.workers,
    "use_ray": no_effect("python -m deepseek_jax.launch ray starts it"),
    "resources_per_worker*": no_effect("python -m deepseek_jax.launch ray asks for its GPUs"),
    "fsdp": no_effect("fsdp_config says what is divided"),
    "fsdp_config": no_effect("it is empty"),
    "fsdp_version": no_effect("there is one implementation"),
    "fsdp_config.fsdp_version": no_effect("there is one implementation"),
    "fsdp_config.reshard_after_forward": words.reshard,
    "fsdp_config.sharding_strategy": no_effect("axolotl does not read it: full_shard"),
    "fsdp_config.offload_params": words.offload,
    "fsdp_config.state_dict_type": words.state_dict,
    "fsdp_config.activation_checkpointing": hf.switch("train.remat", "full"),
    "fsdp_config.backward_prefetch": no_effect("axolotl does not read it"),
    "fsdp_config.limit_all_gathers": no_effect("axolotl does not read it"),
    "fsdp_config.mixed_precision_policy": no_effect(
        "computation has train.dtype, weights are float32"
    ),
    "fsdp_config.*": no_effect(
        "a layer is gathered at a time, and every device reads its own shards"
    ),
    "gradient_checkpointing": words.checkpointing,
    "activation_offloading": hf.switch("offload.activations", "layer_input"),
    # adapters
    "adapter": words.adapter,
    "load_in_4bit": words.of_adapter(hf.switch("lora.base_dtype", "nf4")),
    "load_in_8bit": words.of_adapter(hf.switch("lora.base_dtype", "int8")),
    "lora_r": words.of_adapter(option("lora.r")),
    "lora_alpha": words.of_adapter(option("lora.alpha")),
    "lora_dropout": words.of_adapter(option("lora.dropout")),
    "lora_target_modules": words.of_adapter(lora_modules),
    "lora_target_linear": words.of_adapter(words.all_linear),
    "lora_modules_to_save": words.of_adapter(option("lora.modules_to_save")),
    "lora_model_dir": words.of_adapter(option("lora.adapter")),
    "peft_use_rslora": words.of_adapter(option("lora.use_rslora")),
    "peft_use_dora": refuse("there is no DoRA here", "Set it to false"),
    "peft_*": no_effect("A begins random and B at zero, as in PEFT"),
    "lora_*_kernel": no_effect(words.KERNELS),
    "unfrozen_parameters": refuse(
        "which weights learn is --config.optimizer.lr_multipliers", "Set that", (None, "[]")
    ),
    # trackers
    "wandb_project": words.tracker("wandb"),
    "wandb_name": if_there("log.run_name", "W&B reads WANDB_NAME"),
    "wandb_*": no_effect("W&B reads its own environment variables"),
    "mlflow_experiment_name": words.tracker("mlflow"),
    "mlflow_*": no_effect("MLflow reads its own environment variables"),
    "trackio_project_name": words.tracker("trackio"),
    "trackio_*": no_effect("Trackio keeps its database here"),
    "torchdistx_path": no_effect("it is of an optimizer that is not chosen"),
    "bnb_config_kwargs*": no_effect("4 bits are nf4 here, with scales of 8 bits"),
    "lora_fan_in_fan_out": no_effect("weights are read as the model has them"),
    "experimental_*": no_effect("every device reads its own shards"),
    "use_*": no_effect("a tracker's project turns it on"),
    "ebft.*": refuse(OTHER_AIM, "See configs/post for what there is"),
    "trl.*": refuse(OTHER_AIM, "See configs/post for what there is"),
    "early_stopping_patience": refuse("a run ends after its steps", "Leave it out"),
    "max_packed_sequence_len": refuse("axolotl no longer reads it", "Set sample_packing"),
    "lora_target_parameters": words.of_adapter(
        refuse("experts are adapted by their names", "Name them in lora_target_modules: experts")
    ),
    "model_quantization_config*": refuse(
        "a base in few bits is lora.base_dtype", "Set load_in_4bit"
    ),
    "gptq*": refuse("4 bits are nf4 here", "Set load_in_4bit"),
    "quantize_moe_experts": no_effect("experts have the base's dtype"),
    "rl": refuse(OTHER_AIM, "See configs/post for what there is", (None,)),
    "reward_model": refuse(OTHER_AIM, "See configs/post for what there is"),
    **because(
        {
            words.KERNELS: (
                "liger_* flash_att* attn_implementation sdp_attention xformers_attention "
                "eager_attention flex_attention s2_attention experts_implementation unsloth_* "
                "chunked_cross_entropy* flex_attn_* gemma4_* llama4_* cut_cross_entropy tiled_mlp* "
                "deepcompile sage_attention fused_attn_kernel"
            ),
            "batches are made in an order that follows from the seed": (
                "dataset_* shuffle_merged_datasets group_by_length eval_sample_packing "
                "pad_to_sequence_len sample_packing_* pretrain_multipack_* streaming* "
                "curriculum_sampling skip_prepare_dataset"
            ),
            "no code of a checkpoint's is run": (
                "trust_remote_code model_type tokenizer_type base_model_*"
            ),
            "the tokenizer is read as it is": ("tokenizer_* processor_type is_*_derived_model"),
            "spikes of the loss are logged, and bad updates skipped": ("loss_watchdog_*"),
            LEFT_OUT: ("save_safetensors push_dataset_to_hub hf_use_auth_token save_first_step"),
            "it changes no number": (
                "strict gc_steps profiler_* include_t* low_cpu_mem_usage device*"
            ),
        }
    ),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    pretraining = any(k.startswith("pretraining_dataset") for k in words.keys_of(m))
    tell_defaults(
        m,
        schedule="cosine",
        per_device_batch=1,
        epochs=1.0,
        sequence_length=512,
        train__dtype="bfloat16",
        train__remat="none",
        save_when="epoch",
        eval_when="steps" if m.told_of("eval_every") else "no",
        checkpoint__keep=4,
        log_every=10,
    )
    m.default("objective", "pretrain" if pretraining else "sft")
    sharded = m.entry("fsdp") or any(k.startswith("fsdp_config") for k in words.keys_of(m))
    m.default("strategy", "full_shard" if sharded else "no_shard")
    steps = m.told_of("steps")
    if steps:
        m.default("warmup_steps", min(int(0.03 * steps), 100))
    else:
        m.default("warmup_fraction", 0.03)
        if m.told_of("warmup_fraction") == 0.03:
            m.note("axolotl's warmup of 3% has 100 steps at most.")
    if not pretraining:
        m.default("unpacked", True)
        m.default("sft.packing", "none")
        m.default("sft.truncation", "drop")
    if not is_off(m.value("adapter")) and m.told_of("lora.r") is None:
        need(m, "lora.r", "lora_r is not given")
    size = 1
    for name in ("shards", "replicas", "tensor", "context", "expert"):
        size *= int(m.told_of(name) or 1)
    if m.told_of("shards") and size > 1:
        m.default("world", size)


TOOL = Tool(
    name="axolotl",
    title="axolotl",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
