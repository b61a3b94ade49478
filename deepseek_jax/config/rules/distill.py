"""Rules between the options of distillation."""

from deepseek_jax.config.options import OPTIONS, Config, ModelConfig, value_of
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.config.sections.distill import SCHEDULED
from deepseek_jax.errors import UserError

OF_LAYERS = ("distill.hidden_weight", "distill.router_weight")  # of a teacher that runs in the step


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    if config.objective != "distill":
        without_effect(
            config,
            [n for n in OPTIONS if n.startswith("distill.") and n != "distill.stages"],
            f"with config.objective={config.objective}",
            "config.objective=distill",
        )
        return
    if not config.init_from and config.model == ModelConfig():
        raise UserError(
            "config.objective=distill and config.init_from='': there is no student. Set config.init_from to "
            "the folder of a Hugging Face checkpoint, or config.model."
        )
    _check_teacher(config)
    _check_schedules(config)
    _check_top(config)
    _check_layers(config)
    without_effect(
        config,
        ["sft.loss_type", "sft.label_smoothing"],
        "with config.objective=distill, whose loss is that of config.distill",
        "config.objective=sft",
    )


def _check_teacher(config: Config) -> None:
    d = config.distill
    if not d.teacher and not d.cache:
        raise UserError(
            "config.objective=distill and config.distill.teacher='': there is no teacher. Set it to the "
            "folder of a Hugging Face checkpoint or of a run, or config.distill.cache to a teacher's cache."
        )
    if not d.cache:
        return
    without_effect(
        config,
        ["distill.teacher_dtype", *OF_LAYERS],
        f"with config.distill.cache={d.cache}, which holds logits alone",
        "config.distill.teacher in place of the cache",
    )
    if d.temperature_schedule != "constant":
        raise UserError(
            f"config.distill.temperature_schedule={d.temperature_schedule} and config.distill.cache="
            f"{d.cache}: a cache has the log-sum-exp of some temperatures. Set temperature_schedule="
            "constant, or config.distill.teacher in place of the cache."
        )


def _check_schedules(config: Config) -> None:
    for name in SCHEDULED:
        if value_of(config, f"distill.{name}_schedule") == "constant":
            without_effect(
                config,
                [f"distill.{name}_final"],
                f"with config.distill.{name}_schedule=constant",
                f"config.distill.{name}_schedule to linear or cosine",
            )


def _check_top(config: Config) -> None:
    d, size = config.distill, config.model.vocab_size
    if not d.top_k and not d.cache:
        without_effect(
            config,
            ["distill.tail"],
            "with config.distill.top_k=0: no word is left out",
            "config.distill.top_k to a number of words",
        )
    if d.top_k > size:
        raise UserError(
            f"config.distill.top_k={d.top_k} is above config.model.vocab_size={size}. Set it to {size} or "
            "less, or to 0 for the full vocabulary."
        )


def _check_layers(config: Config) -> None:
    d = config.distill
    if not d.hidden_weight:
        without_effect(
            config,
            ["distill.hidden_layers", "distill.hidden_loss"],
            "with config.distill.hidden_weight=0.0",
            "config.distill.hidden_weight above 0",
        )
    if not d.hidden_weight and not d.router_weight:
        without_effect(
            config,
            ["distill.map"],
            "with config.distill.hidden_weight=0.0 and router_weight=0.0",
            "one of them above 0",
        )
    for name in OF_LAYERS:
        if d.top_k and value_of(config, name):
            raise UserError(
                f"config.distill.top_k={d.top_k} and config.{name}={value_of(config, name)}: with top_k the "
                f"teacher leaves a record of its logits alone. Set config.distill.top_k=0, or {name}=0."
            )
    if d.router_weight and not config.model.has_experts:
        raise UserError(
            f"config.distill.router_weight={d.router_weight} and a student without experts, which has no "
            "router. Set config.distill.router_weight=0."
        )
