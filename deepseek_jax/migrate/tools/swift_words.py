"""What ms-swift's keys say that hang together: method, data, template, DeepSpeed by name."""

from deepseek_jax.migrate.handlers import as_bool, as_float, as_int, as_text, is_off
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools import hf, trl_arguments
from deepseek_jax.migrate.tools.shared import BY_NAME, hub_data, need

# Its own files of DeepSpeed's options, by name.
ZERO: dict[str, dict[str, object]] = {
    "zero0": {"strategy": "no_shard"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "shard_grad_op"},
    "zero3": {"strategy": "full_shard"},
    "zero2_offload": {"strategy": "shard_grad_op", "offload.optimizer_state": True},
    "zero3_offload": {
        "strategy": "full_shard",
        "offload.optimizer_state": True,
        "offload.parameters": True,
    },
}


def kind(m: Migration) -> str:
    """full or lora, by the name of this version or of one before."""
    return str(
        m.value("tuner_type") or m.value("train_type") or m.value("sft_type") or "lora"
    ).lower()


def method(m: Migration, entry: Entry) -> None:
    """tuner_type; silent, it is LoRA."""
    name = as_text(entry).lower()
    if name == "full":
        m.no_effect(entry, "all weights are trained")
    elif name in ("lora", "lora_llm"):
        m.tell(entry, "lora.r", as_int(m.entry("lora_rank") or Entry("lora_rank", 8, "")))
    else:
        m.refuse(
            entry, "weights are all trained here, or adapted by LoRA", "Set it to full or lora"
        )


def of_lora(handler: Handler) -> Handler:
    """A key that counts with LoRA alone."""

    def handle(m: Migration, entry: Entry) -> None:
        if kind(m).startswith("lora"):
            handler(m, entry)
        else:
            m.no_effect(entry, "tuner_type is not lora")

    return handle


def model(m: Migration, entry: Entry) -> None:
    """model: a folder, or a name on ModelScope unless use_hf is on."""
    trl_arguments.model(m, entry)
    _from_modelscope(m, "--model", [as_text(entry)])


def _from_modelscope(m: Migration, kind: str, names: list[str]) -> None:
    if not is_off(m.value("use_hf")):
        return
    for folder, command in m.downloads.items():
        for name in names:
            if command[-3:] == [name, "--local-dir", folder]:
                m.downloads[folder] = ["modelscope", "download", kind, name, "--local_dir", folder]


def dataset(m: Migration, entry: Entry) -> None:
    """dataset: names with :subset and #rows behind them."""
    words = entry.value if isinstance(entry.value, list) else as_text(entry).split(",")
    names = list(dict.fromkeys(str(w).partition("#")[0].partition(":")[0] for w in words))
    hub_data(m, entry, names)
    _from_modelscope(m, "--dataset", names)
    cut = [str(w).partition("#") for w in words if "#" in str(w)]
    most = "".join(f", {count} rows of {name}" for name, _, count in cut)
    need(
        m,
        "data.path",
        f"write their rows as chats, a column messages{most} {BY_NAME}",
    )


def held_out(m: Migration, entry: Entry) -> None:
    """split_dataset_ratio."""
    share = as_float(entry)
    m.tell(entry, "data.eval_fraction", share)
    if not share and not m.value("val_dataset"):
        m.tell(entry, "eval_when", "no")


def scored(m: Migration, entry: Entry) -> None:
    """loss_scale: which tokens are scored, and how much."""
    name = as_text(entry)
    if name == "default":
        m.no_effect(entry, "answers alone are scored")
    elif name == "all":
        m.tell(entry, "sft.assistant_only_loss", "false")
    else:
        m.refuse(entry, "tokens of an answer all count the same here", "Set it to default")


def too_long(m: Migration, entry: Entry) -> None:
    """truncation_strategy."""
    told = {"delete": "drop", "right": "keep_start"}.get(as_text(entry))
    if as_text(entry) == "split":
        m.tell(entry, "sft.packing", "bfd_split")
    elif told is None:
        m.refuse(
            entry, "what is too long is cut at its end, or left out", "Set it to right or delete"
        )
    else:
        m.tell(entry, "sft.truncation", told)


def deepspeed(m: Migration, entry: Entry) -> None:
    """deepspeed: the name of one of its files, or a file."""
    told = ZERO.get(as_text(entry))
    if told is None:
        hf.ARGUMENTS["deepspeed"](m, entry)
    for name, value in (told or {}).items():
        m.tell(entry, name, value)


def fsdp(m: Migration, entry: Entry) -> None:
    """fsdp: the name of its file, or transformers' words."""
    if as_text(entry) == "fsdp2":
        m.tell(entry, "strategy", "full_shard")
        m.tell(entry, "train.remat", "full")
    else:
        hf.TABLE5["fsdp"](m, entry)


def thinking(m: Migration, entry: Entry) -> None:
    """enable_thinking: a variable of the template."""
    if entry.value is None or as_bool(entry):
        m.no_effect(entry, "templates think unless told otherwise")
    else:
        m.tell(entry, "sft.chat_template_kwargs", '{"enable_thinking": false}')


def trained(m: Migration, entry: Entry) -> None:
    """freeze_parameters, trainable_parameters and their kin."""
    m.refuse(
        entry,
        "which weights learn is --config.optimizer.lr_multipliers",
        "Set that, and leave this out",
    )


def environment(m: Migration, entry: Entry) -> None:
    """Variables under ENV."""
    name = entry.key.rpartition(".")[2]
    reads = name.startswith("NCCL_")
    m.no_effect(
        entry,
        "NCCL reads it here as well: export it" if reads else "nothing here reads this variable",
    )
