"""Options that others leave without effect, or need: so that validation takes what was told by many keys."""

from deepseek_jax.config.options import OPTIONS
from deepseek_jax.config.rules.optimizer import OF_SCHEDULE, OF_WARMUP, READ_BY
from deepseek_jax.migrate.migration import Migration

DYNAMIC = (
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
)


def settle(m: Migration) -> None:
    """Takes out what nothing reads; adds what something needs."""
    _optimizer(m)
    _loss_scale(m)
    _checkpoints(m)
    _of_sections(m)
    if _value(m, "train.accumulation") == 1:
        m.drop("train.accumulation_dtype", "a step has one micro-batch")
    if _value(m, "offload.parameters") and _value(m, "train.remat") == "none":
        m.set("train.remat", "full", "offload.parameters", how="weights on the host need it")
    if _value(m, "offload.activations") and _value(m, "train.remat") not in ("full", "auto"):
        m.set("train.remat", "full", "offload.activations", how="what is offloaded needs it")
    if m.fact("workdir"):
        m.set_flag("--workdir", m.fact("workdir"), "workdir")


def _value(m: Migration, option: str) -> object:
    return m.settings[option].value if option in m.settings else OPTIONS[option].default


def _optimizer(m: Migration) -> None:
    name = _value(m, "optimizer.name")
    for option, readers in READ_BY.items():
        if name not in readers:
            m.drop(f"optimizer.{option}", f"{name} does not read it")
    share = _value(m, "optimizer.warmup_fraction")
    if _value(m, "optimizer.schedule") == "constant":
        if not share:
            m.drop("optimizer.schedule_steps", "a constant rate has no end")
        m.drop("optimizer.hold_steps", "a constant rate has no end")
        m.drop("optimizer.final_fraction", "a constant rate has no end")
    if not share and not _value(m, "optimizer.warmup_steps"):
        for option in OF_WARMUP:
            m.drop(option, "there is no warmup")
    for option, schedule in OF_SCHEDULE.items():
        if _value(m, "optimizer.schedule") != schedule:
            m.drop(
                f"optimizer.{option}",
                f"schedule {_value(m, 'optimizer.schedule')} does not read it",
            )


def _loss_scale(m: Migration) -> None:
    if _value(m, "train.dtype") != "float16":
        for option in ("fp16.loss_scale", *DYNAMIC):
            m.drop(option, "float16 alone needs a loss scale")
    elif _value(m, "fp16.loss_scale"):
        for option in DYNAMIC:
            m.drop(option, "the loss scale is fixed")


def _checkpoints(m: Migration) -> None:
    if not _value(m, "checkpoint.keep"):
        m.drop("checkpoint.keep_best", "all checkpoints are kept, the best among them")
    elif not _value(m, "data.eval_fraction"):
        m.drop("checkpoint.keep_best", "nothing is held out, so that none is the best")
    if _value(m, "checkpoint.kind") == "local" and not _value(m, "checkpoint.local_dir"):
        m.set(
            "checkpoint.local_dir",
            "/tmp/checkpoints",
            "checkpoint.kind",
            how="set it to a local disk",
        )


def _of_sections(m: Migration) -> None:
    """Options of what is not done."""
    objective = _value(m, "objective")
    for option in list(m.settings):
        if option.startswith("sft.") and objective == "pretrain":
            m.drop(option, "documents are trained, and not examples")
        elif option.startswith("distill.") and objective != "distill":
            m.drop(option, "there is no teacher")
        elif option.startswith("lora.") and not _value(m, "lora.r"):
            m.drop(option, "all weights are trained")
