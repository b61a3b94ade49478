"""TrainingArguments of transformers 4 and 5: one table, and what only one of the two has.

Read: transformers 4.57 and 5.24. Keys stand at any depth: `training:`, `distillation.training:`.
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_bool,
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
from deepseek_jax.migrate.source import Entry, Rank
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tracking import if_there, report_to

# Sections that hold TrainingArguments in other people's files.
SECTIONS = {
    "training",
    "trainer",
    "train",
    "training_args",
    "training_arguments",
    "trainer_args",
    "args",
    "distillation",
    "sft",
}
SPEED = "it changes speed alone, and XLA decides that here"
LOADER = "batches are read ahead by a thread"
HUB = "nothing is uploaded: python -m deepseek_jax.hf export, and then hf upload"
LINES = "it is about lines on the screen"
ALWAYS = "that is always so here"
SAMPLES = "the same order follows from the seed alone"
FLOAT32 = "moments are float32 here; optimizer.moment_dtype=bfloat16 halves them"
OTHER_OPTIMIZER = "there is no such optimizer here"
NO_RESUME = "checkpoints of transformers cannot be gone on from; the same command resumes ours"
OF_FILE = "the file is not here"


def canonical(key: str) -> str:
    """Without sections, dashes and the prefix of fsdp_config's keys."""
    parts = key.replace("-", "_").split(".")
    while len(parts) > 1 and parts[0] in SECTIONS:
        parts.pop(0)
    if parts[0] == "fsdp_config" and len(parts) > 1:
        parts[1] = parts[1].removeprefix("fsdp_")
    return ".".join(parts)


def switch(name: str, on: object, off: object = None) -> Handler:
    """A bool that says an option where it is true; false says `off`, or nothing, with the lowest rank."""

    def handle(m: Migration, entry: Entry) -> None:
        if str(entry.value).lower() == "auto" or entry.value is None:
            m.no_effect(entry, "by other keys")
        elif as_bool(entry):
            m.tell(entry, name, on)
        elif off is None:
            m.no_effect(entry, "it is off")
        else:
            m.tell(entry, name, off, Rank.DEFAULT)

    return handle


def file_of(kin: str, what: str) -> Handler:
    """A key that names another file of the run, or switches it on."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(entry.value):
            m.no_effect(entry, "it is off")
        elif any(r.kin == kin for r in m.readings):
            m.no_effect(entry, f"{what} is read beside it")
        else:
            m.refuse(entry, f"{what} says how, and {OF_FILE}", "Give it as well")

    return handle


def when(name: str) -> Handler:
    """no, steps, epoch of saving and evaluating; YAML reads `no` as False."""
    return one_of(
        {
            "no": {name: "no"},
            "False": {name: "no"},
            "steps": {name: "steps"},
            "epoch": {name: "epoch"},
            "best": {name: "steps"},
        },
        "it is neither no, steps nor epoch",
    )


def metric(m: Migration, entry: Entry) -> None:
    """What the best checkpoint is the best by."""
    if str(entry.value).lower() in ("loss", "eval_loss", "none"):
        m.no_effect(entry, "the best are those of lowest held-out loss")
    else:
        m.refuse(entry, "the best are those of lowest held-out loss here", "Set it to loss")


def resume(m: Migration, entry: Entry) -> None:
    """True, false, or a folder."""
    if is_off(entry.value) or str(entry.value).lower() == "true":
        m.no_effect(entry, "the same command goes on with its workdir")
    else:
        m.refuse(entry, NO_RESUME, "Begin with its weights: config.init_from")


def logging_strategy(m: Migration, entry: Entry) -> None:
    """Rows are by steps."""
    if str(entry.value).lower() == "epoch":
        m.tell(entry, "log.every_steps", 10)
        m.note("Rows of the log are by steps here: logging_strategy=epoch became every 10.")
    elif is_off(entry.value):
        m.no_effect(entry, "rows are always written; log.every_steps says how often")
    else:
        m.no_effect(entry, "rows are by steps")


def model_dtype(m: Migration, entry: Entry) -> None:
    """What weights are loaded in. Under FSDP and DeepSpeed they are trained in float32 all the same."""
    text = as_text(entry).lower().removeprefix("torch.")
    if text in ("float16", "fp16", "half"):
        m.refuse(entry, "parameters are float32 here, and float16 is computed in by fp16: true")
    elif text in ("bfloat16", "bf16"):
        m.tell(entry, "train.dtype", "bfloat16", Rank.LAUNCHER)
        m.note(
            "Weights that are loaded in bfloat16 are float32 here while they are trained, as under FSDP and "
            "DeepSpeed; products are in train.dtype."
        )
    else:
        m.no_effect(entry, "parameters are float32; train.dtype is what products are computed in")


OPTIMIZERS: Mapping[str, Mapping[str, object] | str] = {
    **{
        name: {"optimizer.name": "adamw"}
        for name in (
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_torch_xla",
            "adamw_torch_npu_fused",
            "adamw_apex_fused",
            "adamw_hf",
            "adamw",
            "adamw_anyprecision",
            "adamw_torch_8bit",
            "adamw_torch_4bit",
            "adamw_bnb_8bit",
            "adamw_8bit",
            "paged_adamw",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
        )
    },
    "adafactor": {
        "optimizer.name": "adafactor",
        "optimizer.scale_parameter": False,
        "optimizer.min_dim_size_to_factor": 1,
    },
    **{
        name: {"optimizer.name": "lion"}
        for name in ("lion", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit")
    },
    "sgd": {"optimizer.name": "sgd", "optimizer.momentum": 0.0},
    "muon": {"optimizer.name": "muon"},
}


def optimizer(m: Migration, entry: Entry) -> None:
    """`optim`: moments in few bits are said."""
    name = str(entry.value).lower()
    if name in OPTIMIZERS and ("bit" in name or "paged" in name) and "32" not in name:
        m.note(f"{entry.label}: {FLOAT32}.")
    one_of(OPTIMIZERS, OTHER_OPTIMIZER, "Set optim to adamw_torch, adafactor, lion_32bit or sgd")(
        m, entry
    )


ARGUMENTS: Mapping[str, Handler] = {
    # ---- the update
    "learning_rate": fact("learning_rate"),
    "weight_decay": option("optimizer.weight_decay"),
    "adam_beta1": option("optimizer.b1"),
    "adam_beta2": option("optimizer.b2"),
    "adam_epsilon": option("optimizer.eps"),
    "max_grad_norm": option("optimizer.grad_clip"),
    "optim": optimizer,
    "optim_args": refuse("options of an optimizer as one text are not read", "Take it out"),
    "optim_target_modules": refuse("there is no optimizer of some modules only", unless=(None, "")),
    "warmup_steps": fact("warmup_steps"),
    # ---- the batch
    "per_device_train_batch_size": fact("per_device_batch", as_int),
    "gradient_accumulation_steps": fact("accumulation", as_int),
    "auto_find_batch_size": refuse("the batch is what it is set to", "Set it to false"),
    "average_tokens_across_devices": no_effect("the loss is a mean over the tokens of all devices"),
    # ---- length
    "max_steps": fact("steps", as_int),
    "num_train_epochs": fact("epochs"),
    # ---- numbers
    "bf16": switch("train.dtype", "bfloat16"),
    "fp16": switch("train.dtype", "float16"),
    "tf32": no_effect("JAX_DEFAULT_MATMUL_PRECISION says how float32 is multiplied"),
    "seed": option("seed", as_int),
    "data_seed": no_effect(SAMPLES),
    "full_determinism": no_effect(ALWAYS),
    # ---- memory
    "gradient_checkpointing": switch("train.remat", "full", "none"),
    "gradient_checkpointing_kwargs": no_effect("there is one kind of recomputation"),
    "gradient_checkpointing_kwargs.*": no_effect("there is one kind of recomputation"),
    "torch_empty_cache_steps": no_effect("buffers are fixed when a step is compiled"),
    # ---- data
    "dataloader_*": no_effect(LOADER),
    "remove_unused_columns": no_effect(
        "columns that nothing reads are named before the first step"
    ),
    "label_names": no_effect("labels are made here"),
    "length_column_name": no_effect("lengths are counted here"),
    "ignore_data_skip": neutral(
        {False: "a resumed run goes on within its epoch"}, "data are never read again"
    ),
    # ---- checkpoints
    "output_dir": fact("workdir", as_text),
    "save_strategy": when("save_when"),
    "save_steps": fact("save_every"),
    "save_total_limit": option("checkpoint.keep", as_int),
    "save_only_model": no_effect(
        "a checkpoint holds the optimizer too; hf export writes the weights alone"
    ),
    "save_on_each_node": no_effect("all hosts write into one folder"),
    "load_best_model_at_end": switch("checkpoint.keep_best", 1),
    "metric_for_best_model": metric,
    "greater_is_better": no_effect("of a loss the lowest is the best"),
    "resume_from_checkpoint": resume,
    "restore_callback_states_from_checkpoint": no_effect("there are no callbacks"),
    "enable_jit_checkpoint": no_effect("SIGTERM always saves"),
    # ---- evaluation
    "eval_strategy": when("eval_when"),
    "eval_steps": fact("eval_every"),
    "do_eval": no_effect("eval_strategy decides"),
    "do_train": no_effect("that is what is done"),
    "do_predict": no_effect("python -m deepseek_jax.evaluate does that"),
    "eval_delay": no_effect("evaluation begins at the first interval"),
    "eval_on_start": no_effect("evaluation begins at the first interval"),
    "per_device_eval_batch_size": no_effect("held-out batches are micro-batches of training"),
    "eval_accumulation_steps": no_effect("logits are never kept"),
    "eval_do_concat_batches": no_effect("logits are never kept"),
    "eval_use_gather_object": no_effect("logits are never kept"),
    "batch_eval_metrics": no_effect("logits are never kept"),
    "bf16_full_eval": no_effect("evaluation computes in train.dtype"),
    "fp16_full_eval": no_effect("evaluation computes in train.dtype"),
    "prediction_loss_only": no_effect(ALWAYS),
    "include_for_metrics": no_effect("loss and accuracy are measured"),
    # ---- log
    "logging_steps": fact("log_every"),
    "logging_strategy": logging_strategy,
    "logging_first_step": no_effect("the first step has a row"),
    "logging_nan_inf_filter": no_effect("bad updates are skipped and counted"),
    "log_*": no_effect(LINES),
    "disable_tqdm": no_effect(LINES),
    "report_to": report_to,
    "run_name": if_there("log.run_name", "the run is its workdir"),
    "project": if_there("log.project", "no tracker asks for a project"),
    "trackio_*": no_effect("Trackio keeps its database here"),
    "include_num_input_tokens_seen": no_effect("rows always have tokens_seen"),
    # ---- parallel
    "deepspeed": file_of("deepspeed", "DeepSpeed's file"),
    "ddp_timeout": no_effect("config.watchdog ends a step that hangs"),
    "ddp_*": no_effect(SPEED),
    "local_rank": no_effect("processes find each other"),
    "use_cpu": no_effect("JAX_PLATFORMS=cpu trains on the CPU"),
    "accelerator_config": no_effect(LOADER),
    "accelerator_config.*": no_effect(LOADER),
    "parallelism_config": refuse(
        "its sizes are a file of Accelerate's", "Give them in Accelerate's file"
    ),
    "torch_compile*": no_effect("every step is compiled"),
    "use_liger_kernel": no_effect("the loss is never a whole tensor of logits"),
    "liger_kernel_config*": no_effect("the loss is never a whole tensor of logits"),
    "use_cache": no_effect("training keeps no cache"),
    # ---- others
    "hub_*": no_effect(HUB),
    "push_to_hub*": no_effect(HUB),
    "skip_memory_metrics": no_effect(LINES),
    "debug": no_effect("bad numbers are found in every step"),
    "_*": no_effect("it is a comment"),
}
