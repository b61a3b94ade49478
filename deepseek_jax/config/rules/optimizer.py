"""Rules between the options of the optimizer."""

import math

from deepseek_jax.config import multipliers
from deepseek_jax.config.options import Config, of
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.errors import UserError

# option -> the optimizers that read it
READ_BY = {
    "b1": ("adamw", "muon", "lion"),
    "b2": ("adamw", "muon", "lion"),
    "eps": ("adamw", "muon"),
    "moment_dtype": ("adamw", "muon", "lion", "sgd"),
    "momentum": ("muon", "sgd"),
    "nesterov": ("sgd",),
    "scale_parameter": ("adafactor",),
    "relative_step": ("adafactor",),
    "warmup_init": ("adafactor",),
    "clip_threshold": ("adafactor",),
    "first_moment": ("adafactor",),
    "min_dim_size_to_factor": ("adafactor",),
}
# option -> the schedule that reads it
OF_SCHEDULE = {
    "power": "polynomial",
    "cycles": "cosine_with_restarts",
    "timescale": "inverse_sqrt",
    "decay_shape": "wsd",
}
OF_WARMUP = ("optimizer.warmup_shape", "optimizer.warmup_init_fraction")
# What relative_step decides.
OF_RATE = (
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.schedule_steps",
    "optimizer.warmup_steps",
    "optimizer.warmup_fraction",
    *OF_WARMUP,
    "optimizer.hold_steps",
)
# Of each optimizer the options that are the decay of a moment.
DECAYS = {
    "adamw": ("b1", "b2"),
    "muon": ("b1", "b2", "momentum"),
    "lion": ("b2",),
    "sgd": ("momentum",),
}


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    _check_readers(config)
    _check_schedule(config)
    if not config.distill.stages and config.train.steps:
        check_length(config)
    _check_multipliers(config)
    _check_bfloat16(config)


def check_length(config: Config) -> None:
    """Checks a schedule whose steps are known.

    Raises:
      UserError: warmup and hold leave nothing of them, or they are too many to count restarts.
    """
    o = config.optimizer
    steps, option = o.schedule_steps, "optimizer.schedule_steps"
    if not steps:
        steps, option = config.train.steps, "train.steps"
    warm = math.ceil(steps * o.warmup_fraction) if o.warmup_fraction else o.warmup_steps
    if o.hold_steps and warm + o.hold_steps >= steps:
        raise UserError(
            f"config.optimizer.hold_steps={o.hold_steps} and a warmup of {warm} steps leave nothing of "
            f"config.{option}={steps} for the learning rate to fall in. Lower hold_steps, or set it to 0."
        )
    if o.cycles * steps >= 2**31:  # they are counted in int32
        raise UserError(
            f"config.optimizer.cycles={o.cycles} x config.{option}={steps} is 2^31 or more. Lower "
            "config.optimizer.cycles."
        )


def _check_readers(config: Config) -> None:
    o = config.optimizer
    for name, readers in READ_BY.items():
        if o.name not in readers:
            without_effect(
                config,
                [f"optimizer.{name}"],
                f"with config.optimizer.name={o.name}",
                f"config.optimizer.name={readers[0]}",
            )
    if o.name == "sgd" and not o.momentum:
        without_effect(
            config,
            ["optimizer.nesterov", "optimizer.moment_dtype"],
            "with config.optimizer.name=sgd and config.optimizer.momentum=0.0",
            "config.optimizer.momentum above 0",
        )
    if o.relative_step:
        without_effect(
            config, OF_RATE, "with config.optimizer.relative_step=True", "relative_step=False"
        )
    else:
        without_effect(
            config,
            ["optimizer.warmup_init"],
            "with config.optimizer.relative_step=False",
            "config.optimizer.relative_step=True",
        )


def _check_schedule(config: Config) -> None:
    o = config.optimizer
    if o.schedule == "constant":
        names = ["optimizer.hold_steps"]
        if not o.warmup_fraction:  # a share of them
            names.append("optimizer.schedule_steps")
        without_effect(
            config,
            names,
            "with config.optimizer.schedule=constant",
            "config.optimizer.schedule=cosine",
        )
    for name, schedule in OF_SCHEDULE.items():
        if o.schedule != schedule:
            without_effect(
                config,
                [f"optimizer.{name}"],
                f"with config.optimizer.schedule={o.schedule}",
                f"config.optimizer.schedule={schedule}",
            )
    if o.warmup_fraction and o.warmup_steps not in (0, of("optimizer.warmup_steps").default):
        raise UserError(
            f"config.optimizer.warmup_fraction={o.warmup_fraction} and config.optimizer.warmup_steps="
            f"{o.warmup_steps} are two warmups. Set config.optimizer.warmup_steps=0, or warmup_fraction=0."
        )
    if not o.warmup_fraction and not o.warmup_steps:
        without_effect(
            config,
            OF_WARMUP,
            "without a warmup: config.optimizer.warmup_steps=0",
            "config.optimizer.warmup_steps above 0",
        )


def _check_multipliers(config: Config) -> None:
    o = config.optimizer
    rules = multipliers.parse(o.lr_multipliers)
    if (
        not config.distill.stages
        and not o.default_lr_multiplier
        and not any(factor for _, factor in rules)
    ):
        raise UserError(
            f"config.optimizer.default_lr_multiplier={o.default_lr_multiplier:g} and "
            f"{multipliers.OPTION}={o.lr_multipliers!r} freeze every weight. Give a weight a factor above 0."
        )


def _check_bfloat16(config: Config) -> None:
    o = config.optimizer
    # A moment changes by (1 - b) of itself per step; numbers of bfloat16 are up to 2^-7 of themselves apart,
    # and half of that rounds to nothing.
    for name in DECAYS.get(o.name, ()):
        if o.moment_dtype == "bfloat16" and 1 - getattr(o, name) <= 2**-8:
            raise UserError(
                f"config.optimizer.{name}={getattr(o, name)} and config.optimizer.moment_dtype=bfloat16: "
                "a moment would "
                f"change too little in a step to be stored in 8 bits, and never fall. Set {name} below "
                f"{1 - 2**-8:.4f}, or "
                f"moment_dtype to float32."
            )
