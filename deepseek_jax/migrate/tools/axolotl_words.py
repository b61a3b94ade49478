"""What axolotl's keys say that hang together: data and templates, passes, FSDP, adapters, trackers."""

from deepseek_jax.migrate.handlers import as_bool, as_float, as_int, as_text, is_off
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.shared import BY_NAME, gathered, hub_data, need
from deepseek_jax.migrate.tracking import if_there, trackers

KERNELS = "XLA chooses and fuses kernels"
PLUGINS = ("liger", "cut_cross_entropy", "expert_parallel", "spectrum", "kernels")


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
        need(
            m,
            "data.path",
            f"write its rows as prompt and completion, with the words that {kind} puts around them "
            f"{BY_NAME}",
        )
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
        need(
            m,
            "sft.chat_template",
            f"axolotl's {name}, where the model has no template or another one",
        )


def inputs(m: Migration, entry: Entry) -> None:
    """train_on_inputs: prompts are scored, too."""
    if m.value("pretraining_dataset") or any("pretraining_dataset" in e for e in keys_of(m)):
        m.no_effect(entry, "all tokens of documents are scored")
    elif as_bool(entry):
        chats = m.told_of("sft.format") in ("messages", "conversations")
        m.tell(entry, "sft.assistant_only_loss" if chats else "sft.completion_only_loss", "false")
    else:
        m.no_effect(entry, "answers alone are scored")


def keys_of(m: Migration) -> list[str]:
    return [e.key for r in m.readings for e in r.source.entries]


def held_out(m: Migration, entry: Entry) -> None:
    """val_set_size: a share, or a number of rows."""
    size = as_float(entry) if entry.value is not None else 0.0
    if size >= 1:
        m.refuse(
            entry, "a share is held out here, and not a number of rows", "Write a share, as 0.01"
        )
    elif size:
        m.tell(entry, "data.eval_fraction", size)
    else:
        m.tell(entry, "eval_when", "no")


def packing(m: Migration, entry: Entry) -> None:
    """sample_packing: whole examples, attention inside each."""
    if as_bool(entry):
        m.tell(entry, "sft.packing", "bfd")
        m.tell(entry, "unpacked", False)
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


def times_a_pass(when: str, every: str, otherwise: str) -> Handler:
    """saves_per_epoch, evals_per_epoch: a share of all steps, which axolotl sets where it is below 1.

    Args:
      otherwise: what axolotl does where it is not: "epoch", "no".
    """

    def handle(m: Migration, entry: Entry) -> None:
        if entry.value is None:
            m.no_effect(entry, "null is the default")
            return
        held_out = m.entry("val_set_size")
        if when == "eval_when" and not (held_out and held_out.value):
            m.no_effect(entry, "nothing is held out: val_set_size is 0")
            return
        passes = m.entry("num_epochs")
        times = as_float(entry) * (as_float(passes) if passes else 1.0)
        if times > 1:
            m.tell(entry, when, "steps")
            m.tell(entry, every, 1 / times)
        else:
            m.tell(entry, when, otherwise)

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
