"""Rules that several topics have in common."""

from collections.abc import Iterable

from deepseek_jax.config.options import Config, of, value_of
from deepseek_jax.errors import UserError


def divides(config: Config, small: str, large: str) -> None:
    """Checks that one option is a multiple of another.

    Args:
      small: the option that must divide the other: "train.accumulation".
      large: the multiple: "train.batch_size".

    Raises:
      UserError: it is not.
    """
    a, b = value_of(config, small), value_of(config, large)
    if b % a:
        raise UserError(
            f"config.{large}={b} is not divisible by config.{small}={a}. "
            f"Set config.{small} to a divisor of {b}."
        )


def without_effect(config: Config, names: Iterable[str], why: str, repair: str) -> None:
    """Refuses options that are set, but do not act here.

    Args:
      names: options that must be at their defaults.
      why: of the message: "with config.train.dtype=bfloat16, which needs no loss scale".
      repair: what else to set, for them to act.

    Raises:
      UserError: the first one that is set.
    """
    for name in names:
        value, default = value_of(config, name), of(name).default
        if value != default:
            raise UserError(
                f"config.{name}={value} has no effect {why}. Set it to "
                f"{default if default != '' else repr('')}, its default, or {repair}."
            )
