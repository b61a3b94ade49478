"""LoRA in the words of TRL's ModelConfig, which are PEFT's."""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    neutral,
    no_effect,
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.hf_arguments import switch


def with_lora(handler: Handler) -> Handler:
    """A key of LoRA, which use_peft switches on."""

    def handle(m: Migration, entry: Entry) -> None:
        if uses_lora(m):
            handler(m, entry)
        else:
            m.no_effect(entry, "use_peft is not set: all weights are trained")

    return handle


def uses_lora(m: Migration) -> bool:
    """Whether an adapter is trained."""
    found = m.entry("use_peft")
    return found is not None and as_bool(found)


def use_peft(m: Migration, entry: Entry) -> None:
    """An adapter of rank lora_r."""
    if as_bool(entry):
        m.tell(entry, "lora.r", as_int(m.entry("lora_r") or Entry("lora_r", 16, "")))
    else:
        m.no_effect(entry, "all weights are trained")


def bits(dtype: str) -> Handler:
    """load_in_4bit, load_in_8bit: of the base of an adapter."""

    def handle(m: Migration, entry: Entry) -> None:
        if not as_bool(entry):
            m.no_effect(entry, "it is off")
        elif uses_lora(m):
            m.tell(entry, "lora.base_dtype", dtype)
        else:
            m.refuse(entry, "weights in few bits are the base of an adapter only", "Set use_peft")

    return handle


TABLE: Mapping[str, Handler] = {
    "use_peft": use_peft,
    "lora_r": with_lora(option("lora.r", as_int)),
    "lora_alpha": with_lora(option("lora.alpha", as_float)),
    "lora_dropout": with_lora(option("lora.dropout", as_float)),
    "lora_target_modules": with_lora(option("lora.target_modules")),
    "lora_modules_to_save": with_lora(option("lora.modules_to_save")),
    "lora_target_parameters": with_lora(
        refuse(
            "experts are adapted by their names here", "Name them in lora_target_modules: experts"
        )
    ),
    "lora_task_type": no_effect("next words are predicted"),
    "use_rslora": with_lora(switch("lora.use_rslora", True)),
    "use_dora": with_lora(refuse("there is no DoRA", "Set use_rslora, or leave it out")),
    "load_in_8bit": bits("int8"),
    "load_in_4bit": bits("nf4"),
    "bnb_4bit_quant_type": neutral(
        {"nf4": "4 bits here are nf4"}, "4 bits here are nf4", "Set it to nf4"
    ),
    "bnb_4bit_*": no_effect("numbers are in train.dtype while they are used"),
    "use_bnb_nested_quant": no_effect("scales of nf4 always have 8 bits"),
}
