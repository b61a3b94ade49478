"""open-instruct's finetune.py: TrainingArguments' words, and its own for data, checkpoints and balance.

Source: open_instruct/finetune.py, snapshot of 2026-08.
"""

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    as_text,
    fact,
    is_off,
    no_effect,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import hf, trl_arguments
from deepseek_jax.migrate.tools.shared import because, hub_data, need, tell_defaults

OWN = (
    "dataset_mixer",
    "dataset_mixer_list",
    "with_tracking",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "load_balancing_loss",
    "exp_name",
    "try_launch_beaker_eval_jobs",
)


def recognise(source: Source) -> int:
    """Its words for data, checkpoints and tracking."""
    return min(40 * source.has(*OWN), 100)


def _mixture(m: Migration) -> dict[str, float]:
    """Data set -> its share, of dataset_mixer: a key for each, whose name may have dots."""
    found = {}
    for reading in m.readings:
        for entry in reading.source.entries:
            name = reading.key(entry.key).removeprefix("dataset_mixer.")
            if name != reading.key(entry.key):
                found[name] = as_float(entry)
    return found


def mixer(m: Migration, entry: Entry) -> None:
    """One of dataset_mixer: a share up to 1, or a number of rows above it."""
    shares = _mixture(m)
    own = as_float(entry)
    if own != 1.0:
        m.refuse(
            entry,
            "it takes a share of the rows, or a number of them",
            "Cut the file to so many rows",
        )
    else:
        hub_data(m, entry, list(shares))


def mixer_list(m: Migration, entry: Entry) -> None:
    """dataset_mixer_list: names and shares in turn."""
    words = (
        [str(w) for w in entry.value] if isinstance(entry.value, list) else as_text(entry).split()
    )
    names, shares = words[::2], words[1::2]
    if any(float(s) != 1.0 for s in shares):
        m.refuse(
            entry,
            "it takes a share of the rows, or a number of them",
            "Cut the files to so many rows",
        )
    else:
        hub_data(m, entry, names)


def save(m: Migration, entry: Entry) -> None:
    """checkpointing_steps: a number, or epoch."""
    if as_text(entry) == "epoch":
        m.tell(entry, "save_when", "epoch")
    elif is_off(entry.value):
        m.tell(entry, "save_when", "no")
    else:
        m.tell(entry, "save_every", as_int(entry))


def clip(m: Migration, entry: Entry) -> None:
    """clip_grad_norm: -1 is off."""
    m.tell(entry, "optimizer.grad_clip", max(as_float(entry), 0.0))


def balance(m: Migration, entry: Entry) -> None:
    """load_balancing_loss: transformers' aux_loss, with load_balancing_weight."""
    if as_bool(entry):
        weight = m.entry("load_balancing_weight")
        m.tell(entry, "hf_aux_coef", as_float(weight) if weight else 0.5)
    else:
        m.no_effect(entry, "it is off")


def tracking(m: Migration, entry: Entry) -> None:
    """report_to counts with with_tracking alone."""
    if is_off(m.value("with_tracking")):
        m.no_effect(entry, "with_tracking is off")
    else:
        hf.COMMON["report_to"](m, entry)


def adapter(m: Migration, entry: Entry) -> None:
    """use_lora, use_qlora."""
    if not as_bool(entry):
        m.no_effect(entry, "it is off")
        return
    m.tell(entry, "lora.r", as_int(m.entry("lora_rank") or Entry("lora_rank", 64, "")))
    if entry.key.endswith("use_qlora"):
        m.tell(entry, "lora.base_dtype", "nf4")


def of_adapter(handler: Handler) -> Handler:
    """A key of LoRA."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(m.value("use_lora")) and is_off(m.value("use_qlora")):
            m.no_effect(entry, "no adapter is asked for")
        else:
            handler(m, entry)

    return handle


TABLE: dict[str, Handler] = {
    **hf.TABLE4,
    "dataset_mixer.*": mixer,
    "dataset_mixer_list": mixer_list,
    "dataset_mixer_list_splits": no_effect("what is downloaded decides"),
    "dataset_mix_dir": no_effect("data are read where they lie"),
    "dataset_*": no_effect("data are read where they lie, and tokenised once"),
    "max_train_samples": refuse("all rows are read", "Cut the file to so many rows"),
    "max_train_steps": fact("steps", as_int),
    "checkpointing_steps": save,
    "keep_last_n_checkpoints": option("checkpoint.keep", lambda e: max(as_int(e), 0)),
    "clip_grad_norm": clip,
    "load_balancing_loss": balance,
    "load_balancing_weight": no_effect("load_balancing_loss has it"),
    "final_lr_ratio": fact("min_lr_fraction"),
    "use_lora": adapter,
    "use_qlora": adapter,
    "lora_rank": of_adapter(option("lora.r")),
    "lora_alpha": of_adapter(option("lora.alpha")),
    "lora_dropout": of_adapter(option("lora.dropout")),
    "use_8bit_optimizer": hf.switch("optimizer.moment_dtype", "bfloat16"),
    "fused_optimizer": no_effect("XLA fuses the update"),
    "sequence_parallel_size": fact("context", as_int),
    "packing": trl_arguments.packing,
    "report_to": tracking,
    "with_tracking": no_effect("report_to says where"),
    "add_bos": refuse("a chat has the special tokens of its template", "Set it to false"),
    "reduce_loss": no_effect("the loss is a mean over the scored tokens of a step"),
    "chat_template_name": no_effect("a model brings its template: see what is to be given"),
    "wandb_project_name": trl_arguments.DATA["wandb_project"],
    **because(
        {
            "it is of Ai2's cluster and of the hub": (
                "try_* push_to_hub hf_* gs_bucket_path oe_eval_* save_to_hub exp_name wandb_entity "
                "do_not_randomize_output_dir clean_checkpoints_at_end cache_dataset_only "
                "sync_each_batch"
            )
        }
    ),
    "timeout": no_effect("train.py waits --cluster_timeout seconds"),
    "config_name": no_effect("the model's folder has its config.json"),
    "additional_model_arguments*": refuse(
        "a model is what its config.json says", "Write it there", (None, "{}")
    ),
    "low_cpu_mem_usage": no_effect("every device reads its own shards"),
}


def finish(m: Migration) -> None:
    """Its defaults."""
    if not any(r.kin in ("accelerate", "deepspeed") for r in m.readings):
        m.default("strategy", "no_shard")
    tell_defaults(
        m,
        objective="sft",
        learning_rate=2e-5,
        schedule="linear",
        warmup_fraction=0.03,
        optimizer__grad_clip=0.0,
        per_device_batch=8,
        epochs=2.0,
        train__dtype="float32",
        train__remat="none",
        unpacked=True,
        sft__packing="none",
        checkpoint__keep=3,
        save_when="steps" if m.told_of("save_every") else m.told_of("save_when") or "no",
        log_every=1,
    )
    if m.told_of("lora.r"):
        m.default("lora.alpha", 16.0)
        m.default("lora.dropout", 0.1)
        m.default("lora.target_modules", "q_proj,o_proj,v_proj,k_proj,gate_proj,up_proj,down_proj")
    if not m.told_of("sequence_length"):
        need(m, "train.sequence_length", "max_seq_length is not given")
    need(
        m,
        "sft.chat_template",
        "open-instruct's template of chats (tulu), where the model has another one",
    )


TOOL = Tool(
    name="open_instruct",
    title="open-instruct",
    recognise=recognise,
    table=TABLE,
    finish=finish,
)
