"""What TRL, open-r1 and alignment-handbook add to TrainingArguments: model, data, fine-tuning.

Read: SFTConfig, ModelConfig and ScriptArguments of TRL 0.18 and 1.16; the recipes of open-r1.
"""

import os
import re
from collections.abc import Mapping

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
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools import lora_arguments
from deepseek_jax.migrate.tools.hf_arguments import model_dtype, switch
from deepseek_jax.migrate.tracking import if_there

OF_THE_HUB = "what is downloaded decides"
ONE_KERNEL = "train.attention=auto takes what the device has"
PREPARED = "text is tokenised by all cores at most once"
OTHER_OBJECTIVE = "learning from preferences or rewards is not in this version"
ALL_ROWS = "it takes a share of the rows"


def model(m: Migration, entry: Entry) -> None:
    """A folder, or a name on the hub, of which the folder is named that a download fills."""
    name = as_text(entry)
    if os.path.isdir(os.path.expanduser(name)) or name.startswith((".", "/", "~")):
        m.tell(entry, "init_from", name)
        return
    folder = f"models/{name.rpartition('/')[2]}"
    m.downloads[folder] = ["hf", "download", name, "--local-dir", folder]
    m.tell(entry, "init_from", folder)


def teacher(m: Migration, entry: Entry) -> None:
    """The same of GKD's teacher."""
    name = as_text(entry)
    folder = name
    if not (os.path.isdir(os.path.expanduser(name)) or name.startswith((".", "/", "~"))):
        folder = f"models/{name.rpartition('/')[2]}"
        m.downloads[folder] = ["hf", "download", name, "--local-dir", folder]
    m.tell(entry, "distill.teacher", folder)


def data_folder(m: Migration, name: str) -> str:
    """Where a data set of the hub is after its download; a file as it is."""
    if os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")):
        return name
    if name.endswith((".json", ".jsonl", ".parquet", ".txt")):
        return name
    folder = f"data/{name.rpartition('/')[2]}"
    m.downloads[folder] = ["hf", "download", "--repo-type=dataset", name, "--local-dir", folder]
    return folder


def dataset(m: Migration, entry: Entry) -> None:
    """dataset_name."""
    if is_off(entry.value):
        m.no_effect(entry, "it is empty")
    else:
        m.tell(entry, "data.path", data_folder(m, as_text(entry)))


def mixture(m: Migration, entry: Entry) -> None:
    """One of dataset_mixture.datasets: all of them together are data.path."""
    section, _, name = m.canonical(entry).rpartition(".")
    kind = section.rpartition(".")[0]
    found = [
        e
        for r in m.readings
        for e in r.source.entries
        if (key := r.key(e.key)).startswith(f"{kind}.") and key.endswith(f".{name}")
    ]
    m.tell(entry, "data.path", ",".join(data_folder(m, as_text(e)) for e in found))


def mixer(m: Migration, entry: Entry) -> None:
    """One of dataset_mixer, which has a name for each data set, and the share of its rows."""
    if not isinstance(entry.value, (int, float)) or as_float(entry) != 1.0:
        m.refuse(entry, ALL_ROWS, "Cut the file to so many rows")
        return
    found = [
        e.key.partition("dataset_mixer.")[2]
        for r in m.readings
        for e in r.source.entries
        if "dataset_mixer." in e.key
    ]
    m.tell(entry, "data.path", ",".join(data_folder(m, name) for name in found))


def weight(m: Migration, entry: Entry) -> None:
    """A share of a data set's rows."""
    if as_float(entry) == 1.0:
        m.no_effect(entry, "all rows are read")
    else:
        m.refuse(entry, ALL_ROWS, "Cut the file to so many rows")


def packing(m: Migration, entry: Entry) -> None:
    """packing, with packing_strategy beside it."""
    if entry.value is not None and as_bool(entry):
        strategy = str(m.value("packing_strategy", "bfd")).lower()
        m.tell(entry, "sft.packing", "bfd" if strategy in ("ffd", "bfd") else strategy)
        m.tell(entry, "unpacked", False)
    else:
        m.tell(entry, "sft.packing", "none")
        m.tell(entry, "unpacked", True)


def packing_strategy(m: Migration, entry: Entry) -> None:
    """Which, where packing is on."""
    known = {"bfd", "ffd", "wrapped", "bfd_split", "bfd-requeue", "bfd_requeue"}
    if not as_bool(m.entry("packing") or Entry("packing", False, "")):
        m.no_effect(entry, "packing is off")
    elif str(entry.value).lower() not in known:
        m.refuse(entry, "there is no such packing", "Set it to bfd or wrapped")
    else:
        m.tell(entry, "sft.packing", "bfd" if entry.value in ("ffd", "bfd") else entry.value)


def max_length(m: Migration, entry: Entry) -> None:
    """Longer examples are cut; null cuts none."""
    if entry.value is None:
        m.refuse(entry, "rows have a length here, and null cuts no example", "Write the longest")
    else:
        m.tell(entry, "sequence_length", as_int(entry))


def fine_tuning(name: str) -> Handler:
    """A number of the loss that only fine-tuning on examples has."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_off(entry.value) or not as_float(entry):
            m.no_effect(entry, "it is off")
        elif is_fine_tuning(m):
            m.tell(entry, name, as_float(entry))
        else:
            m.refuse(
                entry, f"config.{name} is of objective=sft", "Train with TRL's SFTTrainer's words"
            )

    return handle


KEYS_OF_TRL = (
    "dataset_name",
    "dataset_mixture",
    "dataset_splits",
    "max_seq_length",
    "max_length",
    "packing",
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_text_field",
    "dataset_train_split",
    "chat_template",
    "chat_template_path",
    "model_revision",
    "dataset_num_proc",
    "use_peft",
)


def is_script(source: Source) -> bool:
    """Whether flags are of an SFT script: open_r1/sft.py, `trl sft`."""
    name = re.split(r"[/ ]", source.name)[-1].removesuffix(".py")
    return source.form == "flags" and re.search(r"(^|_)sft($|_)", name) is not None


def is_fine_tuning(m: Migration) -> bool:
    """Whether the words are TRL's, whose SFTTrainer reads examples."""
    if any(m.entry(key) for key in KEYS_OF_TRL) or any(is_script(r.source) for r in m.readings):
        return True
    return any(e.key.startswith("dataset_mixture") for r in m.readings for e in r.source.entries)


MODEL: Mapping[str, Handler] = {
    "model_name_or_path": model,
    "model_revision": no_effect(OF_THE_HUB),
    "torch_dtype": model_dtype,
    "dtype": model_dtype,
    "attn_implementation": no_effect(ONE_KERNEL),
    "use_flash_attention_2": no_effect(ONE_KERNEL),
    "trust_remote_code": no_effect("no code of a checkpoint is run"),
    **lora_arguments.TABLE,
    "model_init_kwargs": no_effect("it is empty"),
    "model_init_kwargs.torch_dtype": model_dtype,
    "model_init_kwargs.dtype": model_dtype,
    "model_init_kwargs.attn_implementation": no_effect(ONE_KERNEL),
    "model_init_kwargs.use_cache": no_effect("training keeps no cache"),
    "model_init_kwargs.trust_remote_code": no_effect("no code of a checkpoint is run"),
    "model_init_kwargs.revision": no_effect(OF_THE_HUB),
    "router_aux_loss_coef": fact("hf_aux_coef"),
    "neftune_noise_alpha": fine_tuning("sft.neftune_noise_alpha"),
    "label_smoothing_factor": fine_tuning("sft.label_smoothing"),
}
DATA: Mapping[str, Handler] = {
    "dataset_name": dataset,
    "train_file": dataset,
    "dataset_config": no_effect(OF_THE_HUB),
    "dataset_train_split": no_effect(OF_THE_HUB),
    "dataset_test_split": no_effect("held out is data.eval_fraction of the training data"),
    "dataset_streaming": no_effect("no more than an index of a data set is held"),
    "dataset_num_proc": no_effect(PREPARED),
    "preprocessing_num_workers": no_effect(PREPARED),
    "dataset_kwargs": no_effect("it is empty"),
    "dataset_kwargs.add_special_tokens": no_effect("a chat has the special tokens of its template"),
    "dataset_kwargs.append_concat_token": no_effect(
        "a chat has the special tokens of its template"
    ),
    "shuffle_dataset": no_effect("every epoch has an order of its own"),
    "dataset_text_field": neutral(
        {
            "text": "the column is found",
            "content": "the column is found",
            "messages": "it is found",
        },
        "the column is found where it is named text or content",
        "Rename the column",
    ),
    "dataset_mixture.datasets.*.id": mixture,
    "dataset_mixture.datasets.*.path": mixture,
    "dataset_mixture.datasets.*.config": no_effect(OF_THE_HUB),
    "dataset_mixture.datasets.*.name": no_effect(OF_THE_HUB),
    "dataset_mixture.datasets.*.split": no_effect(OF_THE_HUB),
    "dataset_mixture.datasets.*.data_dir": no_effect(OF_THE_HUB),
    "dataset_mixture.datasets.*.data_files": no_effect(OF_THE_HUB),
    "dataset_mixture.datasets.*.columns": no_effect(
        "columns are found; others are named before training"
    ),
    "dataset_mixture.datasets.*.weight": weight,
    "dataset_mixture.datasets.*.fraction": weight,
    "dataset_mixer.*": mixer,
    "dataset_splits": no_effect(OF_THE_HUB),
    "dataset_configs": no_effect(OF_THE_HUB),
    "auto_insert_empty_system_msg": no_effect("a chat has the messages of its file"),
    "dataset_mixture.seed": no_effect("rows are shuffled by config.seed"),
    "dataset_mixture.streaming": no_effect("no more than an index of a data set is held"),
    "dataset_mixture.test_split_size": no_effect(
        "held out is data.eval_fraction of the training data"
    ),
    "max_length": max_length,
    "max_seq_length": max_length,
    "block_size": max_length,
    "packing": packing,
    "packing_strategy": packing_strategy,
    "padding_free": no_effect("attention never crosses examples"),
    "eval_packing": no_effect("held-out rows are made as those of training"),
    "pad_to_multiple_of": no_effect("a row has train.sequence_length tokens"),
    "pad_token": no_effect("padding is no token here"),
    "truncation_mode": one_of(
        {"keep_start": {"sft.truncation": "keep_start"}}, "what is too long is cut at its end"
    ),
    "completion_only_loss": option("sft.completion_only_loss", lambda e: str(as_bool(e)).lower()),
    "assistant_only_loss": option("sft.assistant_only_loss", lambda e: str(as_bool(e)).lower()),
    "loss_type": one_of(
        {
            "nll": {"sft.loss_type": "nll"},
            "chunked_nll": {"sft.loss_type": "nll"},
            "dft": {"sft.loss_type": "dft"},
        },
        "there is no such loss",
        "Set it to nll or dft",
    ),
    "eos_token": option("sft.eos_token"),
    "chat_template": option("sft.chat_template"),
    "chat_template_path": option("sft.chat_template"),
    "system_prompt": option("sft.system_prompt"),
    "activation_offloading": switch("offload.activations", "layer_input"),
    "use_liger": no_effect("the loss is never a whole tensor of logits"),
    "dataset_batch_size": no_effect(PREPARED),
    "num_of_sequences": no_effect(PREPARED),
    "chars_per_token": no_effect(PREPARED),
    "gradient_checkpointing_use_reentrant": no_effect("there is one kind of recomputation"),
    "overwrite_hub_revision": no_effect("nothing is uploaded"),
    "ignore_bias_buffers": no_effect("there are none"),
    # open-r1
    "benchmarks": no_effect("python -m deepseek_jax.hf.lm_eval runs them"),
    "callbacks": no_effect("there are no callbacks"),
    "wandb_entity": no_effect("WANDB_ENTITY says so"),
    "wandb_project": if_there("log.project", "no tracker asks for a project"),
    "wandb_run_group": no_effect("WANDB_RUN_GROUP says so"),
}
_OTHER = refuse(OTHER_OBJECTIVE, "Train it with SFT", unless=())
OTHER: Mapping[str, Handler] = {
    key: _OTHER
    for key in (
        "reward_funcs",
        "reward_weights",
        "num_generations",
        "max_prompt_length",
        "max_completion_length",
        "use_vllm",
        "vllm_*",
        "log_completions",
        "num_completions_to_print",
        "scale_rewards",
        "epsilon*",
        "cosine_*",
        "repetition_*",
        "dataset_prompt_column",
        "loss_weights",
        "code_language",
        "reference_free",
        "ref_model*",
    )
}


def of_gkd(name: str) -> Handler:
    """A word that GKD, DPO and GRPO share: of a teacher, or refused."""

    def handle(m: Migration, entry: Entry) -> None:
        if m.entry("teacher_model_name_or_path"):
            m.tell(entry, name, as_float(entry))
        else:
            _OTHER(m, entry)

    return handle


DISTILLATION: Mapping[str, Handler] = {  # GKDConfig
    "beta": of_gkd("distill.beta"),
    "temperature": of_gkd("distill.temperature"),
    "teacher_model_name_or_path": teacher,
    "teacher_model_init_kwargs*": no_effect("distill.teacher_dtype says what it is held in"),
    "lmbda": neutral({"0": "", "0.0": ""}, "no answers are sampled while training", "Set it to 0"),
    "seq_kd": neutral({False: ""}, "answers are sampled by another command", "Set it to false"),
    "disable_dropout": no_effect("there is no dropout"),
    "max_new_tokens": no_effect("no answers are sampled while training"),
}
