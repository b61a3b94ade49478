"""NeMo 1's fine-tuning: model.data.train_ds and its kin, and model.peft."""

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    as_text,
    fact,
    is_off,
    neutral,
    no_effect,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler

CONVERT = "Convert it to the form of Hugging Face, and name it with --config.init_from"
WORKERS = "batches are read ahead, in an order that follows from the seed"
MODULES = {
    "attention_qkv": "q_proj,k_proj,v_proj",
    "attention_dense": "o_proj",
    "attention": "q_proj,k_proj,v_proj,o_proj",
    "mlp_fc1": "gate_proj,up_proj",
    "mlp_fc2": "down_proj",
    "mlp": "gate_proj,up_proj,down_proj",
    "all": "all-linear",
}


def is_on(m: Migration) -> bool:
    """Whether the files fine-tune."""
    return m.entry("data.train_ds.file_names") is not None


def begins_with(m: Migration, entry: Entry) -> None:
    """restore_from_path: a .nemo file, or a folder of Hugging Face's."""
    if is_off(entry.value):
        m.no_effect(entry, "weights are random")
    else:
        m.refuse(entry, "a checkpoint of NeMo's is not read", CONVERT)


def files(m: Migration, entry: Entry) -> None:
    """train_ds.file_names, and how they are mixed."""
    m.tell(entry, "data.path", as_text(entry))


def shares(m: Migration, entry: Entry) -> None:
    """train_ds.concat_sampling_probabilities: of several files."""
    if isinstance(entry.value, list) and len(entry.value) > 1:
        m.tell(entry, "data.weights", as_text(entry))
    else:
        m.no_effect(entry, "there is one file")


def template(m: Migration, entry: Entry) -> None:
    """train_ds.prompt_template: the columns of an example, and what joins them."""
    m.refuse(
        entry,
        "examples are chats, or prompts with completions, here",
        "Write them with the columns prompt and completion, joined as this template does (docs/data.md)",
    )


def scored(m: Migration, entry: Entry) -> None:
    """answer_only_loss."""
    m.tell(entry, "sft.completion_only_loss", str(as_bool(entry)).lower())


def scheme(m: Migration, entry: Entry) -> None:
    """peft.peft_scheme."""
    name = as_text(entry).lower()
    if name in ("", "none", "null"):
        m.no_effect(entry, "all weights are trained")
    elif name == "lora":
        m.no_effect(entry, "peft.lora_tuning.adapter_dim turns LoRA on")
    else:
        m.refuse(entry, "adapters are LoRA's here", "Set it to lora, or to null")


def of_lora(handler: Handler) -> Handler:
    """A key of lora_tuning."""

    def handle(m: Migration, entry: Entry) -> None:
        if m.value("peft.peft_scheme") == "lora":
            handler(m, entry)
        else:
            m.no_effect(entry, "it is of LoRA, which peft_scheme does not ask for")

    return handle


def modules(m: Migration, entry: Entry) -> None:
    """lora_tuning.target_modules."""
    names = entry.value if isinstance(entry.value, list) else [as_text(entry)]
    unknown = [str(n) for n in names if n not in MODULES]
    if unknown:
        m.refuse(
            entry, f"{', '.join(unknown)} is no part of a layer", f"Choose of {', '.join(MODULES)}"
        )
        return
    told = ",".join(MODULES[n] for n in names)
    m.tell(entry, "lora.target_modules", "all-linear" if "all-linear" in told else told)


TABLE: dict[str, Handler] = {
    "answer_only_loss": scored,
    "data.chat": refuse(
        "chats are messages with roles here", "Write them as messages (docs/data.md)"
    ),
    "data.chat_prompt_tokens.*": no_effect("the model's chat template has its own"),
    "data.train_ds.file_names": files,
    "data.train_ds.concat_sampling_probabilities": shares,
    "data.train_ds.max_seq_length": fact("sequence_length", as_int),
    "data.train_ds.global_batch_size": fact("global_batch", as_int),
    "data.train_ds.micro_batch_size": fact("per_device_batch", as_int),
    "data.train_ds.prompt_template": template,
    "data.train_ds.add_eos": neutral({True: ""}, "an answer ends with the tokenizer's eos here"),
    "data.train_ds.add_bos": neutral(
        {False: ""}, "bos is what the chat template says", "Set it to false"
    ),
    "data.train_ds.add_sep": neutral({False: ""}, "there is no token between prompt and answer"),
    "data.train_ds.shuffle": neutral({True: ""}, "every pass has an order of its own here"),
    "data.train_ds.truncation_*": no_effect(
        "what is longer than a row is cut at its end, or left out"
    ),
    "data.train_ds.*": no_effect(WORKERS),
    "data.validation_ds.*": no_effect(
        "a share of the training data is held out (config.data.eval_fraction)"
    ),
    "data.test_ds.*": no_effect("a run does not test: see python -m deepseek_jax.evaluate"),
    "peft.peft_scheme": scheme,
    "peft.restore_from_path": refuse("an adapter of NeMo's is not read", "", (None, "")),
    "peft.lora_tuning.adapter_dim": of_lora(option("lora.r")),
    "peft.lora_tuning.alpha": of_lora(option("lora.alpha", as_float)),
    "peft.lora_tuning.adapter_dropout": of_lora(option("lora.dropout")),
    "peft.lora_tuning.target_modules": of_lora(modules),
    "peft.lora_tuning.layer_selection": of_lora(
        refuse("LoRA is in all layers here", "Set it to null")
    ),
    "peft.lora_tuning.*": no_effect("A begins random and B at zero, as in PEFT"),
    "peft.*": no_effect("it is of a scheme that is not chosen"),
}


def finish(m: Migration) -> None:
    """Defaults of fine-tuning."""
    m.default("objective", "sft")
    m.default("data.eval_fraction", 0.01)
    m.default("unpacked", True)
    m.default("sft.packing", "none")
    m.default("moe.bias_update_rate", 0.0)
