"""Hugging Face: Trainer of transformers 4 and 5, TRL's SFTTrainer and the recipes of open-r1.

What these do unasked: TrainingArguments of transformers 4.57 and 5.24, SFTConfig of TRL 0.18 and 1.16.
"""

from collections.abc import Callable, Mapping

from deepseek_jax.migrate.handlers import as_int, fact, is_off, no_effect, option, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool
from deepseek_jax.migrate.tools import (
    distillation_words,
    hf_schedule,
    lora_arguments,
    trl_arguments,
)
from deepseek_jax.migrate.tools.hf_arguments import ARGUMENTS, HUB, LINES, canonical, switch, when
from deepseek_jax.migrate.tools.hf_fsdp import FSDP4, FSDP5, fsdp_is_on

ROWS = "rows are packed, so that lengths waste nothing"
GONE = refuse(
    "transformers 5 has no such key, and would not start",
    "Say --from=hf4, if it is of transformers 4",
    (),
)
NEW = refuse("transformers 4 has no such key, and would not start", "Say --from=hf5", ())


def _whole_warmup(m: Migration, entry: Entry) -> None:
    m.tell(entry, "warmup_steps", as_int(entry))


# of transformers 4 alone, and of 5 alone
OF_4: Mapping[str, Handler] = {
    "warmup_ratio": fact("warmup_fraction"),
    "overwrite_output_dir": no_effect("a run is gone on with: name a new --workdir for a new one"),
    "evaluation_strategy": when("eval_when"),
    "per_gpu_train_batch_size": fact("per_device_batch", as_int),
    "per_gpu_eval_batch_size": no_effect("held-out batches are micro-batches of training"),
    "logging_dir": no_effect("TensorBoard's files are in WORKDIR/tensorboard"),
    "no_cuda": no_effect("JAX_PLATFORMS=cpu trains on the CPU"),
    "use_mps_device": no_effect("JAX takes the devices that it finds"),
    "half_precision_backend": no_effect("products are in train.dtype"),
    "fp16_backend": no_effect("products are in train.dtype"),
    "fp16_opt_level": no_effect("products are in train.dtype"),
    "group_by_length": no_effect(ROWS),
    "save_safetensors": no_effect("hf export writes safetensors"),
    "include_inputs_for_metrics": no_effect("loss and accuracy are measured"),
    "include_tokens_per_second": no_effect("rows always have tokens_per_sec"),
    "jit_mode_eval": no_effect("everything is compiled"),
    "use_ipex": no_effect("everything is compiled"),
    "torchdynamo": no_effect("everything is compiled"),
    "ray_scope": no_effect("there is no search for hyperparameters"),
    "past_index": no_effect("training keeps no cache"),
    "tpu_*": no_effect("JAX takes the devices that it finds"),
    "xpu_backend": no_effect("JAX takes the devices that it finds"),
    "use_legacy_prediction_loop": no_effect("logits are never kept"),
    "sharded_ddp": refuse(
        "fairscale's sharding is gone", "Say fsdp: full_shard", (None, "", "False")
    ),
    "mp_parameters": no_effect("it is of SageMaker"),
    "dispatch_batches": no_effect("every process makes the same batch"),
    "split_batches": no_effect("train.batch_size is of all devices"),
}
OF_5: Mapping[str, Handler] = {
    "activation_checkpointing": switch("train.remat", "full", "none"),
    "activation_checkpointing_kwargs*": no_effect("there is one kind of recomputation"),
    "train_sampling_strategy": no_effect(ROWS),
    "project": ARGUMENTS["project"],
    "trackio_*": ARGUMENTS["trackio_*"],
    "enable_jit_checkpoint": ARGUMENTS["enable_jit_checkpoint"],
    "hub_revision": no_effect(HUB),
    "dataloader_multiprocessing_context": ARGUMENTS["dataloader_*"],
}
COMMON: Mapping[str, Handler] = {
    **ARGUMENTS,
    **hf_schedule.SCHEDULE,
    **trl_arguments.OTHER,
    **trl_arguments.DISTILLATION,
    **trl_arguments.MODEL,
    **trl_arguments.DATA,
    **distillation_words.WORDS,
    **distillation_words.FINETUNE,
    "use_slow_tokenizer": no_effect("tokenizer.json is read"),
    "tokenizer_name": option("data.tokenizer"),
    "tokenizer_name_or_path": option("data.tokenizer"),
    "config": no_effect("it is read beside the flags"),
    "verbose": no_effect(LINES),
}
TABLE4 = {
    **COMMON,
    **{
        key: NEW
        for key in OF_5
        if key not in ("project", "trackio_*", "dataloader_multiprocessing_context")
    },
    **FSDP4,
    **OF_4,
    "warmup_steps": _whole_warmup,
}
TABLE5 = {**COMMON, **{key: GONE for key in OF_4}, **FSDP5, **OF_5}

SIGNS_OF_4 = (
    "warmup_ratio",
    "overwrite_output_dir",
    "evaluation_strategy",
    "torch_dtype",
    "max_seq_length",
)
SIGNS_OF_5 = (
    "activation_checkpointing",
    "dtype",
    "train_sampling_strategy",
    "project",
    "trackio_space_id",
    "fsdp_config.reshard_after_forward",
    "fsdp_config.version",
    "fsdp_config.cpu_offload",
)
OF_TRAINER = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "output_dir",
    "learning_rate",
    "gradient_checkpointing",
    "lr_scheduler_type",
    "fsdp",
    "fsdp_config",
    "save_steps",
    "logging_steps",
    "save_strategy",
    "report_to",
    "bf16",
)
OF_TRAINER_ALONE = (
    "save_strategy",
    "eval_strategy",
    "evaluation_strategy",
    "logging_strategy",
    "hub_model_id",
    "push_to_hub",
    "save_steps",
)
OF_OTHERS = (
    "base_model",
    "finetuning_type",
    "stage",
    "tuner_type",
    "model_type",
    "trainer.devices",
)


def _recognise(version: int, trl: bool) -> Callable[[Source], int]:
    def score(source: Source) -> int:
        if source.form == "launcher":
            return 0
        keys = [canonical(k) for k in source.keys()]
        known = sum(any(k == s or k.startswith(f"{s}.") for k in keys) for s in OF_TRAINER)
        if source.form == "flags":
            known += sum(k in ("max_steps", "deepspeed", "seed") for k in keys)
        of_trl = sum(
            any(k == s or k.startswith(f"{s}.") for k in keys) for s in trl_arguments.KEYS_OF_TRL
        )
        if known + of_trl < 1 or source.has(*OF_OTHERS):
            return 0
        mixer = source.has("dataset_mixer")  # of alignment-handbook, and of open-instruct
        if mixer and source.has(*OF_TRAINER_ALONE) < 2:
            return 0
        of_trl += trl_arguments.is_script(source)
        four = sum(k in SIGNS_OF_4 for k in keys) + _words_of_4(source) + ("open_r1" in source.name)
        five = sum(k in SIGNS_OF_5 for k in keys) + _share(source)
        base = max(min(2 * (known + of_trl), 80), 60 * mixer)
        if trl != (of_trl > 0):
            base -= 1
        wins = four > five if version == 4 else five >= four
        return max(base + (2 if wins else 0), 1)

    return score


def _words_of_4(source: Source) -> int:
    """`fsdp` with words in it."""
    for entry in source.entries:
        if canonical(entry.key) == "fsdp" and not is_off(entry.value):
            return int(str(entry.value).lower() not in ("true", "1"))
    return 0


def _share(source: Source) -> int:
    """warmup_steps as a share."""
    return sum(
        canonical(e.key) == "warmup_steps" and isinstance(e.value, float) and 0 < e.value < 1
        for e in source.entries
    )


def _finish(version: int) -> Callable[[Migration], None]:
    def finish(m: Migration) -> None:
        trl = trl_arguments.is_fine_tuning(m)
        newest = trl and version == 5
        _tell_trainer(m, newest, trl)
        _tell_fsdp(m, version)
        if trl:
            _tell_fine_tuning(m)
        _tell_objective(m, trl)
        if not newest:
            m.default("hf_aux_coef", 0.0)

    return finish


def _tell_trainer(m: Migration, newest: bool, trl: bool) -> None:
    """Defaults of TrainingArguments, and TRL's where they differ."""
    for name, value in {
        "learning_rate": 2e-5 if trl else 5e-5,
        "optimizer.name": "adamw",
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
        "optimizer.grad_clip": 1.0,
        "per_device_batch": 8,
        "accumulation": 1,
        "epochs": 3.0,
        "train.dtype": "bfloat16" if newest else "float32",
        "seed": 42,
        "save_when": "steps",
        "save_every": 500,
        "checkpoint.keep": 0,
        "eval_when": "no",
        "log_every": 10 if newest else 500,
        "moe.bias_update_rate": 0.0,
        "train.mtp_loss_weight": 0.0,
        "train.mtp_loss_weight_final": 0.0,
        "eval.sample_prompt": "",
    }.items():
        m.default(name, value)
    hf_schedule.defaults(m)
    if not m.told_of("train.remat"):
        m.default("train.remat", "full" if newest else "none")
    if m.told_of("eval_when") != "no":
        m.default("eval_every", m.told_of("log_every"))
        if not m.told_of("data.eval_fraction"):
            m.default("data.eval_fraction", 0.01)
            m.note(
                "Their held-out data are a split of their own; here data.eval_fraction of the training data, "
                "0.01, is held out, and not trained."
            )


def _tell_fsdp(m: Migration, version: int) -> None:
    if fsdp_is_on(m):
        m.default("strategy", "full_shard")
        if version == 5:
            m.default("checkpoint.kind", "full")
    elif not any(r.kin in ("accelerate", "deepspeed") for r in m.readings):
        m.default("strategy", "no_shard")
        if 1 not in (m.devices, m.told_of("world")):
            m.note(
                "No file of Accelerate or DeepSpeed and no fsdp: every GPU holds the whole state, as theirs "
                "does then. Give the file that they launch with as well."
            )


def _tell_fine_tuning(m: Migration) -> None:
    m.default("sequence_length", 1024)
    m.default("unpacked", True)
    for name, value in {
        "sft.packing": "none",
        "sft.assistant_only_loss": "false",
        "sft.completion_only_loss": "auto",
        "sft.truncation": "keep_start",
        "sft.loss_type": "nll",
        "data.path": "chats.jsonl",
    }.items():
        m.default(name, value)
    if m.told_of("data.path") == "chats.jsonl":
        m.note("No file names the data: set data.path.")
    if lora_arguments.uses_lora(m):
        m.default("lora.alpha", 32.0)
        m.default("lora.dropout", 0.05)
        m.default("lora.base_dtype", "bfloat16")
        if not m.told_of("lora.target_modules"):
            m.default("lora.target_modules", "q_proj,v_proj")
            m.note(
                "PEFT chooses target modules by the kind of model: q_proj,v_proj was taken, as of Llama."
            )


def _tell_objective(m: Migration, trl: bool) -> None:
    if m.entry("teacher_model_name_or_path"):
        m.default("objective", "distill")
        m.default("distill.alpha", 1.0)
        m.default("distill.temperature", 0.9)
        m.default("distill.beta", 0.5)
    elif distillation_words.is_distillation(m):
        m.default("objective", "distill")
        m.default("distill.teacher", "TEACHER")
        if m.told_of("distill.teacher") == "TEACHER":
            m.note("No file names the teacher: set distill.teacher to its folder.")
    elif trl:
        m.default("objective", "sft")
    elif distillation_words.is_finetune_py(m):
        m.default("objective", "sft")
        m.default("sft.format", "instruction_output")
        m.default("sft.packing", "none")
        m.default("unpacked", True)
    else:
        m.note(
            "TrainingArguments do not say what is trained: the next tokens of documents here. For chats set "
            "objective to sft, to learn from a teacher to distill."
        )
        if not m.told_of("sequence_length"):
            m.note("No file says how long a row is: set train.sequence_length (512 here).")
    if not m.told_of("init_from"):
        m.default("init_from", "MODEL")
        m.note("No file names the model: set init_from to its folder.")


def _tool(name: str, title: str, version: int, trl: bool) -> Tool:
    return Tool(
        name=name,
        title=title,
        recognise=_recognise(version, trl),
        table=TABLE4 if version == 4 else TABLE5,
        family="hf",
        key=canonical,
        finish=_finish(version),
    )


HF4 = _tool("hf4", "transformers 4", 4, False)
HF5 = _tool("hf5", "transformers 5", 5, False)
TRL = _tool("trl", "TRL 1.x", 5, True)
OPEN_R1 = _tool("open_r1", "TRL 0.x", 4, True)
