"""Rules between the options of the optimizer."""

from deepseek_jax.config import multipliers
from deepseek_jax.config.options import Config
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.errors import UserError

# option -> the optimizers that read it
READ_BY = {
    "b1": ("adamw", "muon"),
    "b2": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
    "moment_dtype": ("adamw", "muon"),
    "momentum": ("muon",),
    "scale_parameter": ("adafactor",),
}


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    o = config.optimizer
    for name, readers in READ_BY.items():
        if o.name not in readers:
            without_effect(
                config,
                [f"optimizer.{name}"],
                f"with config.optimizer.name={o.name}",
                f"config.optimizer.name={readers[0]}",
            )
    if o.schedule == "constant":
        without_effect(
            config,
            ["optimizer.schedule_steps"],
            "with config.optimizer.schedule=constant",
            "config.optimizer.schedule=cosine",
        )
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
    # A moment changes by (1 - b) of itself per step; numbers of bfloat16 are up to 2^-7 of themselves apart,
    # and half of that rounds to nothing.
    for name in ("b1", "b2", *(("momentum",) if o.name == "muon" else ())):
        if o.moment_dtype == "bfloat16" and 1 - getattr(o, name) <= 2**-8:
            raise UserError(
                f"config.optimizer.{name}={getattr(o, name)} and config.optimizer.moment_dtype=bfloat16: "
                "a moment would "
                f"change too little in a step to be stored in 8 bits, and never fall. Set {name} below "
                f"{1 - 2**-8:.4f}, or "
                f"moment_dtype to float32."
            )
