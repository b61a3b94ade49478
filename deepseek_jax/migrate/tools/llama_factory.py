"""LLaMA-Factory: TrainingArguments' words, its own for model, data and method, Megatron's for its mcore way.

Sources: src/llamafactory/hparams, snapshot of 2026-08.
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
from deepseek_jax.migrate.tools import hf, megatron_model, shared
from deepseek_jax.migrate.tools import megatron_training as mt
from deepseek_jax.migrate.tools.shared import BY_NAME, because, lora_modules, need, tell_defaults

KERNELS = "XLA chooses and fuses kernels"
OF_METHOD = "it is of a method that is not chosen"
OTHER_OPTIMIZER = "there is no such optimizer"
MCORE = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def recognise(source: Source) -> int:
    """Its words for method, stage, template and length."""
    own = (
        "finetuning_type",
        "stage",
        "template",
        "cutoff_len",
        "dataset_dir",
        "plot_loss",
        "overwrite_cache",
    )
    return min(30 * source.has(*own), 100)


def kind(m: Migration) -> str:
    """full, lora, freeze, oft."""
    return str(m.value("finetuning_type", "lora")).lower()


def method(m: Migration, entry: Entry) -> None:
    """finetuning_type; silent, it is LoRA."""
    name = as_text(entry).lower()
    if name == "full":
        m.no_effect(entry, "all weights are trained")
    elif name == "lora":
        m.tell(entry, "lora.r", as_int(m.entry("lora_rank") or Entry("lora_rank", 8, "")))
    else:
        m.refuse(
            entry, "weights are all trained here, or adapted by LoRA", "Set it to full or lora"
        )


def of_lora(handler: Handler) -> Handler:
    """A key that counts with LoRA alone."""

    def handle(m: Migration, entry: Entry) -> None:
        if kind(m) == "lora":
            handler(m, entry)
        else:
            m.no_effect(entry, "finetuning_type is not lora")

    return handle


def stage(m: Migration, entry: Entry) -> None:
    """stage: pt trains on texts, sft on chats."""
    aim = {"pt": "pretrain", "sft": "sft"}.get(as_text(entry))
    if aim is None:
        m.refuse(entry, "preferences and rewards are not what is learnt here", "Set it to sft")
    else:
        m.tell(entry, "objective", aim)


def dataset(m: Migration, entry: Entry) -> None:
    """dataset: names in dataset_info.json, which says what their rows are."""
    names = [n.strip() for n in as_text(entry).split(",") if n.strip()]
    folder = str(m.value("dataset_dir", "data"))
    folder = "data" if ":" in folder else folder
    m.tell(entry, "data.path", ",".join(f"{folder}/{name}.jsonl" for name in names))
    rows = (
        "texts, a column text"
        if str(m.value("stage", "sft")) == "pt"
        else "chats, a column messages"
    )
    most = f", {m.value('max_samples')} rows of each at most" if m.value("max_samples") else ""
    need(m, "data.path", f"write {', '.join(names)} as JSONL of {rows}{most} {BY_NAME}")


def template(m: Migration, entry: Entry) -> None:
    """template: LLaMA-Factory's own, by name."""
    if str(m.value("stage", "sft")) == "pt":
        m.no_effect(entry, "texts have no template")
        return
    m.no_effect(entry, "a model brings its template: see what is to be given")
    need(
        m,
        "sft.chat_template",
        f"LLaMA-Factory's {as_text(entry)}, where the model has no template or another one",
    )


def thinking(m: Migration, entry: Entry) -> None:
    """enable_thinking: a variable of the template."""
    if as_bool(entry):
        m.no_effect(entry, "templates think unless told otherwise")
    else:
        m.tell(entry, "sft.chat_template_kwargs", '{"enable_thinking": false}')


def prompts(m: Migration, entry: Entry) -> None:
    """train_on_prompt."""
    if as_bool(entry):
        m.tell(entry, "sft.assistant_only_loss", "false")
    else:
        m.no_effect(entry, "answers alone are scored")


def packing(m: Migration, entry: Entry) -> None:
    """packing, neat_packing: whole examples in a row; attention crosses them there without `neat`."""
    if str(m.value("stage", "sft")) == "pt":
        m.no_effect(entry, "documents are packed")
        return
    on = as_bool(entry)
    m.tell(entry, "sft.packing", "bfd" if on or flag_of(m, "neat_packing") else "none")
    m.tell(entry, "unpacked", not (on or flag_of(m, "neat_packing")))
    if on and not flag_of(m, "neat_packing"):
        m.note(
            "Without neat_packing attention crosses the examples of a row there; here it never does."
        )


def flag_of(m: Migration, key: str) -> bool:
    """Whether a key is on."""
    return not is_off(m.value(key))


def held_out(m: Migration, entry: Entry) -> None:
    """val_size: a share, or a number of rows."""
    size = as_float(entry)
    if size >= 1:
        m.refuse(
            entry, "a share is held out here, and not a number of rows", "Write a share, as 0.01"
        )
    elif size:
        m.tell(entry, "data.eval_fraction", size)
    else:
        m.tell(entry, "eval_when", "no")


def no_checkpointing(m: Migration, entry: Entry) -> None:
    """disable_gradient_checkpointing."""
    m.tell(entry, "train.remat", "none" if as_bool(entry) else "full")


def bits(m: Migration, entry: Entry) -> None:
    """quantization_bit: of the base of an adapter."""
    dtype = {4: "nf4", 8: "int8"}.get(as_int(entry) if entry.value else 0)
    if entry.value is None:
        m.no_effect(entry, "the base has 16 bits")
    elif dtype is None:
        m.refuse(entry, "a base has 4, 8 or 16 bits here", "Set it to 4 or 8")
    else:
        m.tell(entry, "lora.base_dtype", dtype)


def alpha(m: Migration, entry: Entry) -> None:
    """lora_alpha; null is twice the rank."""
    if entry.value is None:
        m.no_effect(entry, "twice the rank")
    else:
        m.tell(entry, "lora.alpha", as_float(entry))


def workers(m: Migration, entry: Entry) -> None:
    """ray_num_workers: one a GPU; 1 is no Ray."""
    if as_int(entry) > 1:
        m.tell(entry, "world", as_int(entry))
    else:
        m.no_effect(entry, "one process")


TABLE: dict[str, Handler] = {
    **mt.PARALLEL,
    **mt.KERNELS,
    **{k: v for k, v in megatron_model.ROUTING.items() if k.startswith("moe_")},
    **hf.TABLE4,
    "warmup_ratio": fact("warmup_fraction"),
    # model
    "flash_attn": no_effect(KERNELS),
    "rope_scaling": refuse("a model is what its config.json says", "Write it there"),
    "shift_attn": refuse("attention is over the whole sequence here", "Set it to false"),
    "mixture_of_depths": refuse("every layer works on every token here", "Leave it out"),
    "train_from_scratch": refuse(
        "init_from brings weights", "Give config.model its sizes, and no init_from"
    ),
    "resize_vocab": refuse("a tokenizer is taken as it is", "Set it to false"),
    "add_tokens": refuse("a tokenizer is taken as it is", "Add them to the tokenizer first"),
    "add_special_tokens": refuse(
        "a tokenizer is taken as it is", "Add them to the tokenizer first"
    ),
    "quantization_bit": of_lora(bits),
    "quantization_*": of_lora(no_effect("4 bits are nf4 here, 8 are int8")),
    "double_quantization": no_effect("scales of nf4 always have 8 bits"),
    "moe_aux_loss_coef": fact("hf_aux_coef"),
    "disable_gradient_checkpointing": no_checkpointing,
    "adapter_name_or_path": option("lora.adapter"),
    "pure_bf16": hf.switch("train.dtype", "bfloat16"),
    "compute_dtype": no_effect("bf16 and fp16 say so"),
    # method
    "stage": stage,
    "finetuning_type": method,
    "lora_rank": of_lora(option("lora.r")),
    "lora_alpha": of_lora(alpha),
    "lora_dropout": of_lora(option("lora.dropout")),
    "lora_target": of_lora(lora_modules),
    "additional_target": of_lora(option("lora.modules_to_save")),
    "use_rslora": of_lora(hf.switch("lora.use_rslora", True)),
    "use_dora": refuse("there is no DoRA here", "Set it to false"),
    "pissa_*": refuse("A begins random and B at zero here", "Leave it out"),
    "loraplus_*": refuse("A and B have one learning rate here", "Leave it out"),
    "create_new_adapter": refuse("one adapter is trained here", "Set it to false"),
    "use_muon": hf.switch("optimizer.name", "muon"),
    "use_galore": refuse(OTHER_OPTIMIZER, "Set it to false"),
    "use_apollo": refuse(OTHER_OPTIMIZER, "Set it to false"),
    "use_badam": refuse(OTHER_OPTIMIZER, "Set it to false"),
    "use_adam_mini": refuse(OTHER_OPTIMIZER, "Set it to false"),
    "use_llama_pro": refuse("blocks are not added here", "Set it to false"),
    "use_dft_loss": hf.switch("sft.loss_type", "dft"),
    "use_asft_loss": refuse("there is no such loss", "Set it to false"),
    "use_eaft_loss": refuse("there is no such loss", "Set it to false"),
    "early_stopping_steps": refuse("a run ends after its steps", "Leave it out"),
    # data
    "dataset": dataset,
    "template": template,
    "cutoff_len": fact("sequence_length", as_int),
    "max_samples": no_effect("take so many rows of each file: see what is to be given"),
    "mix_strategy": neutral(
        {"concat": ""}, "files are mixed by data.weights here", "Set it to concat"
    ),
    "interleave_probs": option("data.weights"),
    "train_on_prompt": prompts,
    "mask_history": refuse(
        'a message is left out of the loss by "mask": 1', "Write that into the data"
    ),
    "packing": packing,
    "neat_packing": packing,
    "val_size": held_out,
    "default_system": option("sft.system_prompt"),
    "enable_thinking": thinking,
    "disable_shuffling": refuse("every pass has an order of its own here", "Set it to false"),
    "ray_num_workers": workers,
    "fp8*": refuse(shared.NO_FP8, "Leave fp8 out"),
    **because(
        {
            KERNELS: (
                "use_v1_kernels enable_liger_kernel use_unsloth* use_reentrant_gc upcast_* "
                "use_kv_cache device_map low_cpu_mem_usage infer_* vllm_* sglang_* use_kt "
                "offload_folder"
            ),
            OF_METHOD: (
                "freeze_* oft_* galore_* apollo_* badam_* pref_* dpo_* kto_* simpo_* ppo_* "
                "reward_model* asft_alpha eaft_alpha ref_model* lora_ga_*"
            ),
            "data are read where they lie, and tokenised once": (
                "dataset_dir media_dir overwrite_cache preprocessing_* tokenized_path streaming "
                "buffer_size data_shared_file_system cache_dir tool_format "
                "ignore_pad_token_for_loss split_special_tokens use_fast_tokenizer "
                "preserve_thinking eval_on_each_dataset"
            ),
            "a share of the data is held out (config.data.eval_fraction)": ("eval_dataset"),
            "the log has losses and times": (
                "plot_loss include_effective_* compute_accuracy print_param_status "
                "enable_torch_profiler profiler_* predict_with_generate swanlab_*"
            ),
            "python -m deepseek_jax.launch ray starts it": (
                "ray_* master_addr master_port resources_per_worker*"
            ),
            "python -m deepseek_jax.hf export writes the model": (
                "export_* hf_hub_token ms_hub_token"
            ),
            "the mesh says so": ("use_mca use_megatron_bridge nproc_per_node"),
        }
    ),
    "use_swanlab": one_of(
        {"false": "it is off"}, "there is no tracker for SwanLab", "Set report_to"
    ),
    **because(
        {
            "it is of a model that sees or hears": "image_* video_* audio_* use_audio_* crop_to_patches"
        }
    ),
    "kt_*": refuse("experts lie on the devices here", "Leave it out; see config.offload"),
    "bias_activation_fusion": no_effect(KERNELS),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    mcore = any(m.entry(key) for key in MCORE)
    pretraining = m.told_of("objective") == "pretrain"
    if mcore:
        m.default("strategy", "zero1")
    elif not any(r.kin in ("accelerate", "deepspeed") for r in m.readings):
        m.default("strategy", "no_shard")
    if kind(m) == "lora":
        rank = m.told_of("lora.r") or 8
        if m.entry("finetuning_type") is None:
            m.note("finetuning_type is not given, and LLaMA-Factory trains LoRA then.")
        m.default("lora.r", rank)
        m.default("lora.alpha", 2.0 * rank)
        m.default("lora.dropout", 0.0)
        m.default("lora.target_modules", "all-linear")
    if not pretraining:
        m.default("unpacked", True)
        m.default("sft.packing", "none")
    tell_defaults(
        m,
        objective="sft",
        learning_rate=5e-5,
        schedule="linear",
        per_device_batch=8,
        epochs=3.0,
        sequence_length=2048,
        train__dtype="float32",
        train__remat="none" if mcore else "full",
        eval_when="steps" if m.told_of("data.eval_fraction") and m.told_of("eval_every") else "no",
        log_every=500,
    )


TOOL = Tool(
    name="llama_factory",
    title="LLaMA-Factory",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
