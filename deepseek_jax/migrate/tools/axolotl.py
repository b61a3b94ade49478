"""axolotl: one YAML, with words of its own over those of transformers and Accelerate.

Sources: src/axolotl/utils/schemas, core/builders/base.py and utils/distributed.py, snapshot of 2026-07.
"""

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
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
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import hf_arguments as hf
from deepseek_jax.migrate.tools import hf_schedule, trl_arguments
from deepseek_jax.migrate.tools.models import gathered, hub_data, lora_modules, need, tell_defaults
from deepseek_jax.migrate.tracking import if_there, trackers

KERNELS = "XLA chooses and fuses kernels"
LEFT_OUT = "it says what becomes of the model after training"
SPLIT = "take this part when the data are downloaded"
OTHER_AIM = "preferences and rewards are not what is learnt here"
PLUGINS = ("liger", "cut_cross_entropy", "expert_parallel", "spectrum", "kernels")
SIZES = {"tensor_parallel_size": "tensor", "context_parallel_size": "context", "sequence_parallel_degree": "context"}


def canonical(key: str) -> str:
    """Without the prefix of fsdp_config's keys."""
    section, dot, rest = key.partition(".")
    return f"fsdp_config.{rest.removeprefix('fsdp_')}" if dot and section == "fsdp_config" else key


def recognise(source: Source) -> int:
    """Its names for model, length and batch."""
    own = ("base_model", "sequence_len", "sample_packing", "micro_batch_size", "val_set_size", "dataset_prepared_path")
    return min(25 * source.has(*own), 100)


# ---- data


def data_path(m: Migration, entry: Entry) -> None:
    """datasets.N.path, pretraining_dataset.N.path: all of them together."""
    hub_data(m, entry, gathered(m, r"(datasets|pretraining_dataset)(\.\d+)?\.path"))


def one_pretraining_set(m: Migration, entry: Entry) -> None:
    """pretraining_dataset: as one text."""
    hub_data(m, entry, [as_text(entry)])


def data_type(m: Migration, entry: Entry) -> None:
    """datasets.N.type: the columns, and the template around them."""
    kind, where = as_text(entry), entry.key.rpartition(".")[0]
    if kind.startswith("chat_template"):
        role = m.value(f"{where}.message_property_mappings.role", "role")
        columns = m.value(f"{where}.field_messages", "messages")
        if (columns, role) == ("conversations", "from"):
            m.tell(entry, "sft.format", "conversations")
        else:
            m.tell(entry, "sft.format", "messages")
    elif kind == "completion":
        m.tell(entry, "sft.format", "text")
    elif kind.split(".")[0].split(":")[0] in ("alpaca", "alpaca_chat", "alpaca_instruct"):
        m.tell(entry, "sft.format", "prompt_completion")
        need(m, "data.path", f"write its rows as prompt and completion, with the words that {kind} puts around them")
    elif kind.startswith("sharegpt"):
        m.tell(entry, "sft.format", "conversations")
    else:
        m.refuse(entry, "there is no such prompt here", "Write the rows as messages (docs/data.md)")


def template(m: Migration, entry: Entry) -> None:
    """chat_template: axolotl's own, by name."""
    name = as_text(entry)
    if name in ("", "tokenizer_default"):
        m.no_effect(entry, "the model's own template is taken")
    elif name == "jinja":
        m.no_effect(entry, "chat_template_jinja has it")
    else:
        m.no_effect(entry, "a model brings its template: see what is to be given")
        need(m, "sft.chat_template", f"axolotl's {name}, where the model has no template or another one")


def inputs(m: Migration, entry: Entry) -> None:
    """train_on_inputs: prompts are scored, too."""
    if m.value("pretraining_dataset") or any("pretraining_dataset" in e for e in _keys(m)):
        m.no_effect(entry, "all tokens of documents are scored")
    elif as_bool(entry):
        chats = m.told_of("sft.format") in ("messages", "conversations")
        m.tell(entry, "sft.assistant_only_loss" if chats else "sft.completion_only_loss", "false")
    else:
        m.no_effect(entry, "answers alone are scored")


def _keys(m: Migration) -> list[str]:
    return [e.key for r in m.readings for e in r.source.entries]


def held_out(m: Migration, entry: Entry) -> None:
    """val_set_size: a share, or a number of rows."""
    size = as_float(entry) if entry.value is not None else 0.0
    if size >= 1:
        m.refuse(entry, "a share is held out here, and not a number of rows", "Write a share, as 0.01")
    elif size:
        m.tell(entry, "data.eval_fraction", size)
    else:
        m.tell(entry, "eval_when", "no")


def packing(m: Migration, entry: Entry) -> None:
    """sample_packing: whole examples, attention inside each."""
    if as_bool(entry):
        m.tell(entry, "sft.packing", "bfd")
    else:
        m.tell(entry, "sft.packing", "none")
        m.tell(entry, "unpacked", True)


def too_long(m: Migration, entry: Entry) -> None:
    """excess_length_strategy."""
    m.tell(entry, "sft.truncation", "keep_start" if as_text(entry) == "truncate" else "drop")


def plugin(m: Migration, entry: Entry) -> None:
    """plugins: kernels, or something else."""
    names = entry.value if isinstance(entry.value, list) else [as_text(entry)]
    other = [str(n) for n in names if not any(p in str(n) for p in PLUGINS)]
    if other:
        m.refuse(entry, f"{', '.join(other)} is not here", "Leave it out")
    else:
        m.no_effect(entry, KERNELS)


# ---- length, devices


def times_a_pass(fact_name: str, switch: str) -> Handler:
    """saves_per_epoch, evals_per_epoch: as a share of all steps, which is what axolotl makes of them."""

    def handle(m: Migration, entry: Entry) -> None:
        if entry.value is None:
            m.no_effect(entry, "null is the default")
        elif not as_float(entry):
            m.tell(entry, switch, "no")
        else:
            passes = m.entry("num_epochs")
            share = 1 / (as_float(entry) * (as_float(passes) if passes else 1.0))
            m.tell(entry, fact_name, share if share < 1 else 0.999999)

    return handle


def shards(m: Migration, entry: Entry) -> None:
    """dp_shard_size: beside expert parallelism it is what the experts' axis leaves."""
    if as_int(m.entry("expert_parallel_size") or Entry("", 1, "")) > 1:
        m.no_effect(entry, "weights are divided over mesh.fsdp and mesh.expert")
    else:
        m.tell(entry, "shards", as_int(entry))


def workers(m: Migration, entry: Entry) -> None:
    """ray_num_workers: one a GPU."""
    if is_off(m.value("use_ray")):
        m.no_effect(entry, "use_ray is off")
    else:
        m.tell(entry, "world", as_int(entry))


def reshard(m: Migration, entry: Entry) -> None:
    """fsdp_config.reshard_after_forward."""
    text = str(entry.value).lower()
    if text == "false":
        m.tell(entry, "strategy", "shard_grad_op")
    else:
        m.tell(entry, "strategy", "full_shard")


def offload(m: Migration, entry: Entry) -> None:
    """fsdp_config.offload_params: torch takes gradients and optimizer along."""
    if as_bool(entry):
        m.tell(entry, "offload.parameters", True)
        m.tell(entry, "offload.optimizer_state", True)
    else:
        m.no_effect(entry, "it is off")


def state_dict(m: Migration, entry: Entry) -> None:
    """fsdp_config.state_dict_type."""
    name = as_text(entry).upper()
    m.tell(entry, "checkpoint.kind", "full" if name == "FULL_STATE_DICT" else "sharded")


def checkpointing(m: Migration, entry: Entry) -> None:
    """gradient_checkpointing: true, or where its inputs go."""
    text = str(entry.value).lower()
    if text in ("offload", "offload_disk", "unsloth"):
        m.tell(entry, "train.remat", "full")
        m.tell(entry, "offload.activations", "layer_input")
    else:
        m.tell(entry, "train.remat", "full" if as_bool(entry) else "none")


# ---- adapters


def adapter(m: Migration, entry: Entry) -> None:
    """adapter: lora, qlora, or none."""
    name = as_text(entry).lower()
    if name in ("", "none"):
        m.no_effect(entry, "all weights are trained")
    elif name == "qlora":
        m.tell(entry, "lora.base_dtype", "nf4")
    elif name == "lora":
        m.no_effect(entry, "lora_r turns it on")
    else:
        m.refuse(entry, "adapters are LoRA's here", "Set it to lora")


def of_adapter(handler: Handler) -> Handler:
    """A key of LoRA, which counts with `adapter` alone."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(m.value("adapter")) or entry.value is None:
            m.no_effect(entry, "no adapter is asked for")
        else:
            handler(m, entry)

    return handle


def all_linear(m: Migration, entry: Entry) -> None:
    """lora_target_linear."""
    if as_bool(entry):
        m.tell(entry, "lora.target_modules", "all-linear")
    else:
        m.no_effect(entry, "lora_target_modules has the names")


def tracker(name: str) -> Handler:
    """A project of a tracker turns it on; null does not."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(entry.value):
            m.no_effect(entry, "it is off")
            return
        trackers(m, entry, [name])
        if_there("log.project", "its environment variable says so")(m, entry)

    return handle


TABLE: dict[str, Handler] = {
    # words of transformers, as they are there
    **{
        key: hf.ARGUMENTS[key]
        for key in (
            "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps",
            "gradient_accumulation_steps", "warmup_steps", "output_dir", "save_strategy", "save_steps", "eval_steps",
            "eval_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end", "metric_for_best_model",
            "greater_is_better", "seed", "tf32", "logging_steps", "resume_from_checkpoint", "dataloader_*", "ddp_*",
            "torch_compile*", "remove_unused_columns", "gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs.*",
            "deepspeed", "hub_*", "torch_empty_cache_steps", "auto_find_batch_size", "optim_args", "debug",
        )
    },
    "optimizer": hf.ARGUMENTS["optim"],
    "lr_scheduler": hf_schedule.schedule,
    "lr_scheduler_kwargs": hf_schedule.kwargs,
    "lr_scheduler_kwargs.*": hf_schedule.kwargs,
    "cosine_min_lr_ratio": fact("min_lr_fraction"),
    "cosine_constant_lr_ratio": refuse("a schedule holds at its end for hold_steps here", "Set optimizer.hold_steps"),
    "lr_quadratic_warmup": refuse("a warmup is linear or logarithmic here", "Set it to false"),
    "lr_groups*": refuse("learning rates of parts are --config.optimizer.lr_multipliers", "Set that"),
    "embedding_lr*": refuse("learning rates of parts are --config.optimizer.lr_multipliers", "Set that", (None,)),
    "loraplus_*": refuse("A and B have one learning rate here", "Leave it out", (None,)),
    "warmup_ratio": fact("warmup_fraction"),
    "num_epochs": fact("epochs"),
    "micro_batch_size": fact("per_device_batch", as_int),
    "batch_size": refuse("axolotl no longer reads it", "Set gradient_accumulation_steps"),
    "eval_batch_size": no_effect("held-out batches are micro-batches of training"),
    "sequence_len": fact("sequence_length", as_int),
    "saves_per_epoch": times_a_pass("save_every", "save_when"),
    "evals_per_epoch": times_a_pass("eval_every", "eval_when"),
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
    "fp8*": refuse("train.dtype is float32, bfloat16 or float16 here", "Leave fp8 out"),
    # model
    "base_model": trl_arguments.model,
    "reinit_weights": refuse("init_from brings weights", "Leave init_from out, and give config.model its sizes"),
    "tokenizer_config": option("data.tokenizer"),
    "special_tokens.eos_token": option("sft.eos_token"),
    "special_tokens*": no_effect("padding is no token here, and the rest is the tokenizer's"),
    "tokens": refuse("a tokenizer is taken as it is", "Add them to the tokenizer first", (None,)),
    # data
    "datasets.*.path": data_path,
    "datasets.*.type": data_type,
    "datasets.*.split": no_effect(SPLIT),
    "datasets.*.name": no_effect(SPLIT),
    "datasets.*.data_files": no_effect(SPLIT),
    "datasets.*.ds_type": no_effect("by the ending of the file"),
    "datasets.*.field_messages": no_effect("sft.format says which columns are read"),
    "datasets.*.message_property_mappings*": no_effect("sft.format says which columns are read"),
    "datasets.*.roles_to_train": neutral({"['assistant']": "", "assistant": ""}, "the assistant is scored here"),
    "datasets.*.train_on_eos": neutral({"turn": "", "all": ""}, "the token that ends an answer is scored here"),
    "pretraining_dataset": one_pretraining_set,
    "pretraining_dataset.*.path": data_path,
    "pretraining_dataset.*.type": neutral({"pretrain": ""}, "documents are read as text"),
    "pretraining_dataset.*": no_effect(SPLIT),
    "test_datasets*": no_effect("a share of the data is held out (config.data.eval_fraction)"),
    "chat_template": template,
    "chat_template_jinja": option("sft.chat_template"),
    "default_system_message": option("sft.system_prompt"),
    "train_on_inputs": inputs,
    "val_set_size": held_out,
    "sample_packing": packing,
    "excess_length_strategy": too_long,
    "neftune_noise_alpha": option("sft.neftune_noise_alpha"),
    "plugins": plugin,
    # devices
    "expert_parallel_size": fact("expert", as_int),
    "dp_shard_size": shards,
    "dp_replicate_size": fact("replicas", as_int),
    **{key: fact(name, as_int) for key, name in SIZES.items()},
    "ray_num_workers": workers,
    "use_ray": no_effect("python -m deepseek_jax.launch ray starts it"),
    "resources_per_worker*": no_effect("python -m deepseek_jax.launch ray asks for its GPUs"),
    "fsdp": no_effect("fsdp_config says what is divided"),
    "fsdp_version": no_effect("there is one implementation"),
    "fsdp_config.fsdp_version": no_effect("there is one implementation"),
    "fsdp_config.reshard_after_forward": reshard,
    "fsdp_config.sharding_strategy": no_effect("axolotl does not read it: full_shard"),
    "fsdp_config.offload_params": offload,
    "fsdp_config.state_dict_type": state_dict,
    "fsdp_config.activation_checkpointing": hf.switch("train.remat", "full"),
    "fsdp_config.backward_prefetch": no_effect("axolotl does not read it"),
    "fsdp_config.limit_all_gathers": no_effect("axolotl does not read it"),
    "fsdp_config.mixed_precision_policy": no_effect("computation has train.dtype, weights are float32"),
    "fsdp_config.*": no_effect("a layer is gathered at a time, and every device reads its own shards"),
    "gradient_checkpointing": checkpointing,
    "activation_offloading": hf.switch("offload.activations", "layer_input"),
    # adapters
    "adapter": adapter,
    "load_in_4bit": of_adapter(hf.switch("lora.base_dtype", "nf4")),
    "load_in_8bit": of_adapter(hf.switch("lora.base_dtype", "int8")),
    "lora_r": of_adapter(option("lora.r")),
    "lora_alpha": of_adapter(option("lora.alpha")),
    "lora_dropout": of_adapter(option("lora.dropout")),
    "lora_target_modules": of_adapter(lora_modules),
    "lora_target_linear": of_adapter(all_linear),
    "lora_modules_to_save": of_adapter(option("lora.modules_to_save")),
    "lora_model_dir": of_adapter(option("lora.adapter")),
    "peft_use_rslora": of_adapter(option("lora.use_rslora")),
    "peft_use_dora": refuse("there is no DoRA here", "Set it to false"),
    "peft_*": no_effect("A begins random and B at zero, as in PEFT"),
    "lora_*_kernel": no_effect(KERNELS),
    "unfrozen_parameters": refuse("which weights learn is --config.optimizer.lr_multipliers", "Set that", (None, "[]")),
    # trackers
    "wandb_project": tracker("wandb"),
    "wandb_name": if_there("log.run_name", "W&B reads WANDB_NAME"),
    "wandb_*": no_effect("W&B reads its own environment variables"),
    "mlflow_experiment_name": tracker("mlflow"),
    "mlflow_*": no_effect("MLflow reads its own environment variables"),
    "trackio_project_name": tracker("trackio"),
    "use_*": no_effect("a tracker's project turns it on"),
    "rl": refuse(OTHER_AIM, "See configs/post for what there is", (None,)),
    "reward_model": refuse(OTHER_AIM, "See configs/post for what there is"),
    **{
        key: no_effect(why)
        for why, keys in {
            KERNELS: (
                "liger_*", "flash_att*", "attn_implementation", "sdp_attention", "xformers_attention", "eager_attention",
                "flex_attention", "s2_attention", "experts_implementation", "unsloth_*", "chunked_cross_entropy*",
                "cut_cross_entropy", "tiled_mlp*", "deepcompile", "sage_attention",
            ),
            "batches are made in an order that follows from the seed": (
                "dataset_*", "shuffle_merged_datasets", "group_by_length", "eval_sample_packing", "pad_to_sequence_len",
                "sample_packing_*", "pretrain_multipack_*", "streaming*", "curriculum_sampling", "skip_prepare_dataset",
            ),
            "no code of a checkpoint's is run": ("trust_remote_code", "model_type", "tokenizer_type", "base_model_*"),
            "the tokenizer is read as it is": ("tokenizer_*", "processor_type", "is_*_derived_model"),
            "spikes of the loss are logged, and bad updates skipped": ("loss_watchdog_*",),
            LEFT_OUT: ("save_safetensors", "push_dataset_to_hub", "hf_use_auth_token", "save_first_step"),
            "it changes no number": ("strict", "gc_steps", "profiler_*", "include_t*", "low_cpu_mem_usage", "device*"),
        }.items()
        for key in keys
    },
}  # fmt: skip


def finish(m: Migration) -> None:
    """Its defaults."""
    pretraining = any(k.startswith("pretraining_dataset") for k in _keys(m))
    m.default("objective", "pretrain" if pretraining else "sft")
    sharded = m.entry("fsdp") or any(k.startswith("fsdp_config") for k in _keys(m))
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
    tell_defaults(
        m,
        schedule="cosine",
        per_device_batch=1,
        epochs=1.0,
        sequence_length=512,
        train__dtype="bfloat16",
        train__remat="none",
        save_when="epoch",
        eval_when="steps" if m.told_of("data.eval_fraction") else "no",
        checkpoint__keep=4,
        log_every=10,
    )


TOOL = Tool(
    name="axolotl",
    title="axolotl",
    recognise=recognise,
    table=TABLE,
    key=canonical,
    finish=finish,
)
