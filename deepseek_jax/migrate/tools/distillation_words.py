"""Words of MoE_Factorize_Compress's conf/distillation (docs/guide_words.md), of TRL's GKDTrainer, and of the
finetune.py of DeepSeek-MoE and DeepSeek-Coder.
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
    option,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools import trl_arguments

OTHER_COMMAND = "python -m deepseek_jax.distill cache makes it, and distill.cache names it"


def multiplier(m: Migration, entry: Entry) -> None:
    """One of parameter_lr_multipliers: all of them are one option, PATTERN=FACTOR,..."""
    section = "parameter_lr_multipliers."
    found = [
        (key.removeprefix(section), e.value)
        for r in m.readings
        for e in r.source.entries
        if (key := r.key(e.key)).startswith(section)
    ]
    m.tell(entry, "optimizer.lr_multipliers", ",".join(f"{p}={f}" for p, f in found))


def cached(m: Migration, entry: Entry) -> None:
    """teacher.use_cached_logits, with cache_dir beside it."""
    if is_off(entry.value):
        m.no_effect(entry, "the teacher runs beside the student")
    else:
        m.refuse(
            entry, f"a cache of another program is not read: {OTHER_COMMAND}", "Set it to false"
        )


def teacher_path(m: Migration, entry: Entry) -> None:
    """null is the model that was compressed."""
    if is_off(entry.value):
        m.no_effect(entry, "set distill.teacher to the model that was compressed")
    else:
        trl_arguments.teacher(m, entry)


def stages(m: Migration, entry: Entry) -> None:
    """stages.enabled."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
    else:
        m.refuse(
            entry,
            "stages are one option here, distill.stages",
            "Write them there: docs/guide_words.md",
        )


WORDS: Mapping[str, Handler] = {
    "teacher.model_path": teacher_path,
    "student.model_path": trl_arguments.model,
    "teacher.use_cached_logits": cached,
    "teacher.cache_dir": no_effect(OTHER_COMMAND),
    "teacher.generation.*": no_effect(OTHER_COMMAND),
    "loss.alpha": option("distill.alpha"),
    "loss.temperature": option("distill.temperature"),
    "loss.kl_reduction": no_effect("a mean over the scored tokens of the whole batch of a step"),
    "default_lr_multiplier": option("optimizer.default_lr_multiplier"),
    "parameter_lr_multipliers": no_effect("it is empty"),
    "parameter_lr_multipliers.*": multiplier,
    "stages.enabled": stages,
    "stages.configs*": no_effect("stages.enabled says whether"),
    "dataset.name": trl_arguments.dataset,
    "dataset.max_length": trl_arguments.max_length,
    "dataset.max_samples": refuse("all rows are read", "Set max_steps, or give a shorter file"),
    "dataset.*": no_effect(
        "columns are found, text is tokenised once, and files are read by pieces"
    ),
    "evaluation.eval_steps": fact("eval_every"),
    "evaluation.*": no_effect("held out is data.eval_fraction of the training data"),
    "async_eval.*": no_effect("python -m deepseek_jax.evaluate --watch does that"),
}


def _lora(handler: Handler) -> Handler:
    def handle(m: Migration, entry: Entry) -> None:
        if as_bool(m.entry("use_lora") or Entry("use_lora", False, "")):
            handler(m, entry)
        else:
            m.no_effect(entry, "use_lora is not set: all weights are trained")

    return handle


def _bits(m: Migration, entry: Entry) -> None:
    if as_int(entry) in (4, 8):
        m.tell(entry, "lora.base_dtype", {4: "nf4", 8: "int8"}[as_int(entry)])
    else:
        m.no_effect(entry, "weights have 16 bits")


def _use_lora(m: Migration, entry: Entry) -> None:
    if as_bool(entry):
        m.tell(entry, "lora.r", as_int(m.entry("lora_rank") or Entry("lora_rank", 8, "")))
    else:
        m.no_effect(entry, "all weights are trained")


FINETUNE: Mapping[str, Handler] = {
    "data_path": trl_arguments.dataset,
    "model_max_length": fact("sequence_length", as_int),
    "use_lora": _use_lora,
    "lora_rank": _lora(option("lora.r", as_int)),
    "trainable": _lora(option("lora.target_modules", as_text)),
    "modules_to_save": _lora(option("lora.modules_to_save", as_text)),
    "bits": _lora(_bits),
    "quant_type": neutral({"nf4": "4 bits here are nf4"}, "4 bits here are nf4", "Set it to nf4"),
    "double_quant": no_effect("scales of nf4 always have 8 bits"),
}


def is_finetune_py(m: Migration) -> bool:
    """Whether flags are those of DeepSeek's finetune.py, of instruction and output."""
    return m.entry("data_path") is not None and m.entry("model_max_length") is not None


def is_distillation(m: Migration) -> bool:
    """Whether a student learns from a teacher, by sections, words or the name of the script."""
    if m.told_of("distill.teacher") or m.told_of("distill.alpha") is not None:
        return True
    return any(
        e.key.startswith("distillation.") for r in m.readings for e in r.source.entries
    ) or any(r.source.form == "flags" and "distill" in r.source.name for r in m.readings)
