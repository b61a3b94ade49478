"""LLaMA-Factory's second edition (v1): plugins with a name, FSDP2, a constant learning rate unless scheduled.

Sources: src/llamafactory/v1/config and v1/core/base_trainer.py, snapshot of 2026-08.
"""

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    as_text,
    fact,
    is_off,
    no_effect,
    one_of,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import hf, trl_arguments
from deepseek_jax.migrate.tools.nemo_words import betas
from deepseek_jax.migrate.tools.shared import lora_modules, need, tell_defaults

OWN = (
    "model_class",
    "dist_config",
    "optim_config",
    "train_dataset",
    "kernel_config",
    "sample_backend",
    "peft_config",
)


def recognise(source: Source) -> int:
    """Its plugins."""
    return min(40 * source.has(*OWN), 100)


def rate(m: Migration, entry: Entry) -> None:
    """learning_rate: an optimizer that is a plugin has its own."""
    if m.entry("optim_config.name"):
        m.no_effect(entry, "the optimizer's plugin takes optim_config.lr, or its default")
        m.note(
            f"{entry.text}: LLaMA-Factory's optimizer plugin does not read it, but optim_config.lr, which is "
            f"1e-3 where nobody sets it."
        )
    else:
        m.tell(entry, "learning_rate", as_float(entry))


def sharding(m: Migration, entry: Entry) -> None:
    """dist_config.name."""
    name = as_text(entry).lower()
    if name in ("fsdp2", "fsdpturbo"):
        m.tell(entry, "strategy", "full_shard")
    elif name == "deepspeed":
        m.no_effect(entry, "DeepSpeed's file says what is divided")
    else:
        m.refuse(entry, "there is no such way to divide", "Set it to fsdp2")


def data(m: Migration, entry: Entry) -> None:
    """train_dataset: a file that lists data sets."""
    m.tell(entry, "data.path", "data/chats.jsonl")
    need(
        m,
        "data.path",
        f"write what {as_text(entry)} lists as JSONL of chats, a column messages (docs/data.md)",
    )


def batches(m: Migration, entry: Entry) -> None:
    """batching_strategy."""
    name = as_text(entry).lower()
    if name in ("normal", "padding_free"):
        m.tell(entry, "unpacked", True)
    else:
        m.refuse(
            entry, "rows have one length here, and steps one number of them", "Set it to normal"
        )


def epochs_between(m: Migration, entry: Entry) -> None:
    """save_epochs."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
    else:
        m.tell(entry, "checkpoint.every_epochs", as_float(entry))


def adapter(m: Migration, entry: Entry) -> None:
    """peft_config.name."""
    if as_text(entry) == "lora":
        m.tell(entry, "lora.r", as_int(m.entry("peft_config.r") or Entry("peft_config.r", 8, "")))
    else:
        m.refuse(entry, "weights are all trained here, or adapted by LoRA", "Set it to lora")


TABLE: dict[str, Handler] = {
    "model": trl_arguments.model,
    "model_class": one_of({"llm": "it is a language model"}, "models are language models here"),
    "custom_chat_template": option("sft.chat_template"),
    "trust_remote_code": no_effect("no code of a checkpoint is run"),
    "flash_attn": no_effect(trl_arguments.ONE_KERNEL),
    "init_config*": no_effect("every device reads its own shards"),
    "kernel_config*": no_effect("XLA chooses and fuses kernels"),
    "quant_config*": refuse("a base in few bits is --config.lora.base_dtype here", "Leave it out"),
    "peft_config": no_effect("it is empty"),
    "peft_config.name": adapter,
    "peft_config.r": option("lora.r"),
    "peft_config.lora_alpha": option("lora.alpha"),
    "peft_config.lora_dropout": option("lora.dropout"),
    "peft_config.target_modules": lora_modules,
    "peft_config.adapter_name_or_path": option("lora.adapter"),
    "peft_config.*": no_effect("python -m deepseek_jax.hf export writes it"),
    "dist_config": no_effect("it is empty"),
    "dist_config.name": sharding,
    "dist_config.ep_size": fact("expert", as_int),
    "dist_config.config_file": hf.ARGUMENTS["deepspeed"],
    "dist_config.*": no_effect("every device reads its own shards"),
    "dp_size": no_effect("it is what the other sizes leave"),
    "cp_size": fact("context", as_int),
    "cp_mode": no_effect("cp_size says how many"),
    "mp_replicate_size": fact("replicas", as_int),
    "mp_shard_size": fact("shards", as_int),
    "dist_timeout": no_effect("train.py waits --cluster_timeout seconds"),
    "optim_config.name": one_of(
        {"muon": {"optimizer.name": "muon"}}, "there is no such optimizer", "Set it to muon"
    ),
    "optim_config.lr": fact("learning_rate"),
    "optim_config.wd": option("optimizer.weight_decay"),
    "optim_config.momentum": option("optimizer.momentum"),
    "optim_config.nesterov": one_of(
        {"true": "it is Nesterov's"}, "muon's momentum is Nesterov's here"
    ),
    "optim_config.ns_steps": no_effect("muon is orthogonalised in 5 steps"),
    "optim_config.adamw_betas": betas,
    "optim_config.adamw_eps": option("optimizer.eps"),
    "lr_scheduler_config*": refuse(
        "v1 brings no schedules of its own", "Set --config.optimizer.schedule"
    ),
    "train_dataset": data,
    "eval_dataset": no_effect("a share of the data is held out (config.data.eval_fraction)"),
    "output_dir": fact("workdir", as_text),
    "micro_batch_size": fact("per_device_batch", as_int),
    "global_batch_size": fact("global_batch", as_int),
    "cutoff_len": fact("sequence_length", as_int),
    "learning_rate": rate,
    "num_train_epochs": fact("epochs"),
    "max_steps": fact("steps", as_int),
    "max_grad_norm": option("optimizer.grad_clip"),
    "bf16": hf.switch("train.dtype", "bfloat16", "float32"),
    "batching_strategy": batches,
    "batching_workers": no_effect("batches are read ahead by a thread"),
    "enable_activation_checkpointing": lambda m, e: m.tell(
        e, "train.remat", "full" if as_bool(e) else "none"
    ),
    "seed": option("seed"),
    "full_determinism": no_effect("that is always so here"),
    "resume_from_checkpoint": hf.ARGUMENTS["resume_from_checkpoint"],
    "save_steps": fact("save_every", as_int),
    "save_epochs": epochs_between,
    "save_total_limit": option("checkpoint.keep", as_int),
    "save_ckpt_as_hf": no_effect("python -m deepseek_jax.hf export writes it"),
    "logging_steps": fact("log_every", as_int),
    "sample_backend": no_effect("python -m deepseek_jax.generate samples"),
    "max_new_tokens": no_effect("python -m deepseek_jax.generate samples"),
    **{
        key: refuse("preferences are not what is learnt here", "Leave it out")
        for key in ("pref_*", "simpo_gamma", "dpo_label_smoothing", "ld_alpha")
    },
}


def finish(m: Migration) -> None:
    """Its defaults."""
    plugin = m.entry("optim_config.name") is not None
    deepspeed = any(r.kin == "deepspeed" for r in m.readings)
    if not deepspeed:
        m.default("strategy", "no_shard")
    tell_defaults(
        m,
        objective="sft",
        learning_rate=1e-3 if plugin else 1e-4,
        schedule="constant",
        optimizer__weight_decay=0.1 if plugin else 0.01,
        optimizer__b2=0.95 if plugin else 0.999,
        per_device_batch=1,
        epochs=3.0,
        sequence_length=2048,
        train__dtype="bfloat16",
        train__remat="full",
        unpacked=True,
        sft__packing="none",
        save_when="steps" if m.told_of("save_every") else "no",
        log_every=1,
    )
    if m.told_of("lora.r"):
        m.default("lora.alpha", 16.0)
        m.default("lora.dropout", 0.05)
        m.default("lora.target_modules", "all-linear")


TOOL = Tool(
    name="llama_factory_v1",
    title="LLaMA-Factory v1",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
