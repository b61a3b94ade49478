"""From the words of other tools to ours: docs/words.md, and what a message says when such a word is typed."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from deepseek_jax.config import guide_words
from deepseek_jax.config.option import SYSTEMS, Alias, Option, Word
from deepseek_jax.config.options import OPTIONS

MAKE = "python -m deepseek_jax.config words --out=docs/words.md"


BAR = r"\|"  # in a cell of a table
GENERIC = {"device", "enabled", "params", "type", "stage"}  # say nothing without the key before
NOTHING = "nothing to set:"
# Rows of the table that are not options, in its order.
NO_OPTION = (
    Word(
        (
            "train_micro_batch_size_per_gpu",
            "per_device_train_batch_size",
            "micro_batch_size",
        ),
        "`train.batch_size` / `train.accumulation` / the devices of data, fsdp and expert: set the first two",
    ),
    Word(
        ("TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap", "SIZE_BASED_WRAP"),
        f"{NOTHING} one layer is gathered at a time",
        ("fsdp_transformer_layer_cls_to_wrap", "fsdp_auto_wrap_policy"),
    ),
    Word(
        ("fsdp_min_num_params",),
        f"{NOTHING} one layer is gathered at a time. `min_num_params` makes units; as "
        "`sharding.min_weight_size` its 1e8 "
        "would leave almost all weights whole",
        ("min_num_params",),
    ),
    Word(
        ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"),
        f"{NOTHING} every device creates or reads its own shards",
    ),
    Word(
        ("communication_data_type: bf16",),
        f"{NOTHING} a layer's gradients are reduced in `train.dtype` and kept in float32",
    ),
    Word(
        (
            "zero_optimization.offload_optimizer.device: nvme",
            "zero_optimization.offload_param.device: nvme",
            "NVMe offloading",
        ),
        "`offload.optimizer_state=True`, `offload.parameters=True`: the host's memory in place of its disks, "
        "from where one layer at a time is streamed to the device. A step reads and writes all of the "
        "state, 12 bytes a parameter and more: minutes at what a disk gives, and it wears out. If the "
        "memory of the hosts is too small, divide over more of them, or use `optimizer.name=adafactor`",
        ("nvme_path", "offload_optimizer_nvme_path", "offload_param_nvme_path", "nvme"),
    ),
    Word(
        ("move unused experts to CPU", "expert offloading"),
        "`offload.parameters=True`: all experts of all layers lie in the host's memory, and one layer at a "
        "time is on the device. In a training batch no expert is unused: with thousands of tokens each is "
        "chosen by some, and which ones are is known when the layer has begun, too late to fetch them",
        ("offload_experts", "cpu_offload_experts", "expert_offload", "offload_unused_experts"),
    ),
    Word(
        ("dist.all_reduce(expert_usage)",),
        f"{NOTHING} the layer sums by `psum`; `max_violation` and `routing_entropy` are in the metrics",
    ),
    Word(
        ("AutoModelForCausalLM.from_pretrained(DIR)", "save_pretrained"),
        "`hf.load(DIR)`, `hf.save`; `python -m deepseek_jax.hf import`, `export`",
    ),
    Word(
        ("tokenizer.apply_chat_template(messages, tools=...)",),
        "`hf.Chat(DIR).encode(messages, tools=...)`",
    ),
    Word(
        ("model.generate(...)", "TextStreamer", "speculative decoding"),
        "`python -m deepseek_jax.generate`, `LoadedModel.generate`; `--draft-tokens=N` drafts with "
        "multi-token prediction",
    ),
    Word(
        ("lm_eval --model hf --model_args pretrained=DIR",),
        "`python -m deepseek_jax.hf.lm_eval run --model deepseek_jax --model_args pretrained=DIR`",
    ),
    Word(
        ("torchrun --nproc_per_node=8 train.py",),
        "`python -m deepseek_jax.launch --nproc_per_node=8 train.py`, or one process for all GPUs of a host",
        ("nproc_per_node",),
    ),
    Word(
        ("torchrun --max_restarts=3",),
        "`python -m deepseek_jax.launch --max_restarts=3 ...`; with `--min_processes=2` it goes on with "
        "fewer processes of "
        "one host",
        ("max_restarts",),
    ),
    Word(
        ("torchrun --nnodes=MIN:MAX",),
        "no counterpart: the launchers of several hosts need them all. Start the run again on fewer: it "
        "resumes on any mesh",
    ),
    Word(
        ("torchrun --nnodes --node_rank --master_addr",),
        "the same command on every host: found under SLURM, Open MPI, Kubernetes, torchrun; or the "
        "launcher with these flags",
        ("nnodes", "node_rank", "master_addr"),
    ),
    Word(
        ("sbatch train.slurm with srun torchrun or accelerate launch",),
        "`python -m deepseek_jax.launch template slurm --from=train.slurm -- train.py ...`; also `jobset`, "
        "`rayjob`, `ssh` ([clusters.md](clusters.md))",
    ),
    Word(("output_dir", "default_root_dir"), "`--workdir=DIR`"),
    Word(
        (
            "wandb_entity",
            "wandb_logger_kwargs.entity",
            "--wandb-entity",
            "wandb.team",
            "wandb_run_id",
        ),
        "the tool's own environment: `WANDB_ENTITY`, `WANDB_RUN_ID`, `MLFLOW_TRACKING_URI`, "
        "`CLEARML_API_HOST` (docs/tracking.md)",
        ("mlflow_tracking_uri", "wandb_mode", "wandb_save_dir"),
    ),
    Word(
        ("WANDB_LOG_MODEL", "WANDB_WATCH", "HF_MLFLOW_LOG_ARTIFACTS", "CLEARML_LOG_MODEL"),
        f"{NOTHING} trackers get numbers and options, and no weights. `python -m deepseek_jax.hf export` "
        "writes a folder to upload",
        ("wandb_log_model", "wandb_watch", "hf_mlflow_log_artifacts"),
    ),
    Word(
        ("logging_dir", "csv_monitor.enabled"),
        f"{NOTHING} WORKDIR/tensorboard, and WORKDIR/metrics.jsonl with a JSON object per row",
    ),
    Word(
        ("resume_from_checkpoint",),
        f"{NOTHING} the same command resumes from the newest good checkpoint of its workdir",
    ),
    Word(
        ("YAML files",),
        "Python files in `configs/`; any key by flag: `--config.train.steps=100`; a typo is an error",
    ),
    *guide_words.RAY,
    *guide_words.NO_OPTION,
)

HEAD = f"""# From your words to ours

Words of PyTorch's FSDP and DDP, DeepSpeed, NeMo and Megatron, Hugging Face's Trainer and Accelerate, Ray
Train ([its words](ray.md)) and MoE_Factorize_Compress ([its words](guide_words.md)), and the option that
means the same here.
The options of a model are keys of a Hugging Face `config.json` as they are, so that only the words of others
are listed. `python train.py --help` has every option with its unit, limits and choices.

Made from the table of options: `{MAKE}`.
"""


def table() -> str:
    """The text of docs/words.md."""
    parts = [HEAD]
    for section in dict.fromkeys(o.name.rpartition(".")[0] for o in OPTIONS.values()):
        options = [o for o in OPTIONS.values() if o.name.rpartition(".")[0] == section]
        rows = [
            (_theirs(alias), f"`{_here(o, alias)}`", alias.note)
            for o in options
            for alias in o.aliases
        ]
        if rows:
            parts += [f"## {section or 'run'}", _markdown(("there", "here", "what differs"), rows)]
    others = [(_code(word.theirs), word.here) for word in NO_OPTION]
    parts += ["## Without an option", _markdown(("there", "here"), others)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def find(key: str) -> str:
    """What the word of another tool, typed as an option, is here, as sentences; "" where none has it.

    Args:
      key: "gradient_accumulation_steps", with or without its section.
    """
    if exact := find_path(key):
        return exact
    leaf = key.rpartition(".")[2].lower()
    found: dict[str, list[tuple[Alias, str, str]]] = {}
    for o, alias, system, word in each_alias():
        if leaf in _spellings(word):
            found.setdefault(o.full_name, []).append((alias, system, word))
    sentences = []
    for full_name, matches in found.items():
        alias, system, word = matches[0]
        if len({a.value for a, _, _ in matches}) > 1:  # one key, whose values are told apart
            sentences.append(f"{word.partition(':')[0]} ({SYSTEMS[system]}) is {full_name} here")
        else:
            value = "" if alias.value is None else f"={alias.value}"
            sentences.append(f"{word} ({SYSTEMS[system]}) is {full_name}{value} here")
    if sentences:
        return "; ".join(sentences) + "."
    for no_option in NO_OPTION:
        if leaf in no_option.keys or leaf in [w.partition(":")[0] for w in no_option.theirs]:
            here = no_option.here.replace("`", "")
            return f"Here: {here}."
    return ""


def find_path(key: str) -> str:
    """The same of a word with its path, typed in full, and what differs: "loss.alpha", "teacher.cache_dir";
    what stands before it is left out.

    Args:
      key: "distillation.loss.alpha".
    """

    def is_it(word: str) -> bool:
        path = word.partition(":")[0].strip()
        return "." in path and f".{key.lower()}".endswith(f".{path.lower()}")

    for o, alias, system, word in each_alias():
        if is_it(word):
            note = f"; {alias.note.replace('`', '')}" if alias.note else ""
            return f"{word} ({SYSTEMS[system]}) is {o.full_name} here{note}."
    for no_option in NO_OPTION:
        if any(map(is_it, (*no_option.theirs, *no_option.keys))):
            return f"Here: {no_option.here.replace('`', '')}."
    return ""


def each_alias() -> Iterator[tuple[Option, Alias, str, str]]:
    """(option, row of its table, key of SYSTEMS, word there) of every word, for those who read other tools'
    files.
    """
    for o in OPTIONS.values():
        for alias in o.aliases:
            for system, word in alias.words():
                yield o, alias, system, word


def _spellings(word: str) -> set[str]:
    """How an option that means "zero_optimization.stage: 3" may be typed, without its section."""
    key = word.partition(":")[0].lower()
    if not re.fullmatch(r"[\w.]+", key):
        return set()
    parts = key.split(".")
    if len(parts) == 1:
        return {key}
    return {"_".join(parts[-2:]), parts[-2] if parts[-1] in GENERIC else parts[-1]}


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{w}`" for w in words)


def _theirs(alias: Alias) -> str:
    """The first cell of a row: "FSDP, DDP `FULL_SHARD`; DeepSpeed `zero_optimization.stage: 3`"."""
    words = list(alias.words())
    return "; ".join(
        f"{title} {_code(w for s, w in words if s == system)}"
        for system, title in SYSTEMS.items()
        if system in dict(words)
    )


def _here(o: Option, alias: Alias) -> str:
    """The options to set."""
    settings = {o.name: alias.value, **alias.also}
    return " ".join(_flag(name, value) for name, value in settings.items())


def _flag(name: str, value: Any) -> str:
    return f"--config.{name}" + ("" if value is None else f"={value}")


def _markdown(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in lines)
