"""Everything that can be checked without looking at devices, data or the workdir."""

from deepseek_jax.config import held_out
from deepseek_jax.config.options import OPTIONS, Config, value_of
from deepseek_jax.config.rules import (
    checkpoint,
    distill,
    lora,
    memory,
    model,
    optimizer,
    sft,
    stages,
    training,
)


def validate(config: Config) -> None:
    """Checks the value of every option by what the table says of it, and then the rules between options.

    Raises:
      UserError: names the first wrong option, its value and the repair.
    """
    for name, option in OPTIONS.items():
        option.check(value_of(config, name))
    for rules in (
        model,
        training,
        held_out,
        sft,
        distill,
        memory,
        optimizer,
        lora,
        stages,
        checkpoint,
    ):
        rules.check(config)
