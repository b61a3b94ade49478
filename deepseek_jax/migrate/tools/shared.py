"""What several tools share: keys of one reason, data of a hub, names of LoRA, TrainingArguments' defaults."""

import re
from collections.abc import Mapping

from deepseek_jax.config.options import OPTIONS
from deepseek_jax.migrate.handlers import as_text, is_off, no_effect
from deepseek_jax.migrate.migration import Migration, Setting
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.trl_arguments import data_folder

BY_NAME = "(docs/migrate.md, Data sets by name)"
# Of TrainingArguments, whoever builds them; what a front end has otherwise, it tells before.
DEFAULTS = {
    "warmup_steps": 0,
    "min_lr_fraction": 0.0,
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.grad_clip": 1.0,
    "accumulation": 1,
    "seed": 42,
    "save_when": "steps",
    "save_every": 500,
    "checkpoint.keep": 0,
    "eval_when": "no",
    "moe.bias_update_rate": 0.0,
    "hf_aux_coef": 0.0,
    "train.mtp_loss_weight": 0.0,
    "train.mtp_loss_weight_final": 0.0,
    "eval.sample_prompt": "",
    "log.trackers": "",
}

NO_FP8 = "FP8 is of routed experts alone here, and an option of its own, config.train.fp8=row"


def because(reasons: Mapping[str, str]) -> dict[str, Handler]:
    """Rows of a table for keys without an effect: why -> keys and patterns, separated by spaces."""
    return {key: no_effect(why) for why, keys in reasons.items() for key in keys.split()}


def need(m: Migration, option: str, why: str, like: str = "") -> None:
    """An option that the files do not hold: it must be given before the run.

    Args:
      like: what stands in its place until it is given: a text in the config, a number on the command line,
        where it starts no run. "": the config has a value.
    """
    m.note(f"To be given: config.{option}: {why}.")
    if like and OPTIONS[option].type is str:
        m.default(option, like)
    elif like:
        m.flags[f"--config.{option}"] = Setting(like, ())


def gathered(m: Migration, pattern: str) -> list[str]:
    """The values of all canonical keys that a regular expression matches, in order, once each."""
    found = [
        as_text(e)
        for r in m.readings
        for e in r.source.entries
        if re.fullmatch(pattern, r.key(e.key)) and not is_off(e.value)
    ]
    return list(dict.fromkeys(found))


def hub_data(m: Migration, entry: Entry, names: list[str]) -> None:
    """Data sets by their names: files, or folders that a download fills. All are data.path."""
    if names:
        m.tell(entry, "data.path", ",".join(data_folder(m, name) for name in names))
    else:
        m.no_effect(entry, "it is empty")


def lora_modules(m: Migration, entry: Entry) -> None:
    """Names of weights with an adapter: a list, a text with commas, all."""
    names = as_text(entry).replace(" ", "")
    m.tell(entry, "lora.target_modules", "all-linear" if names in ("all", "all-linear") else names)


def tell_defaults(m: Migration, **own: object) -> None:
    """DEFAULTS, with what this front end has otherwise: `__` stands for a dot."""
    others = {name.replace("__", "."): value for name, value in own.items()}
    defaults = {**DEFAULTS, **others}
    if m.told_of("model.aux_loss_alpha") is not None:  # as Megatron has it, of each layer
        del defaults["hf_aux_coef"]
        m.default("model.seq_aux", False)
    for name, value in defaults.items():
        m.default(name, value)
