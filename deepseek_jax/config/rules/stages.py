"""Rules between the stages of a run and its other options."""

from deepseek_jax.config import multipliers, stages
from deepseek_jax.config.options import Config
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.errors import UserError


def check(config: Config) -> None:
    """Raises UserError: a stage is wrong, or the first options that do not go together."""
    given = stages.of_config(config)
    if not given:
        return
    without_effect(
        config,
        ["optimizer.lr_multipliers", "optimizer.schedule_steps"],
        f"with {stages.OPTION}, each of which has its own",
        f"{stages.OPTION} to ''",
    )
    if config.lora.r:
        raise UserError(
            f"{stages.OPTION} and config.lora.r={config.lora.r}: a checkpoint of an adapter holds what "
            "learns and nothing that a stage froze. Set config.lora.r=0, or train the stages as runs of "
            "their own, each with config.lora.adapter of the one before."
        )
    default, weights = config.optimizer.default_lr_multiplier, config.data.weights
    for number, stage in enumerate(given, 1):
        where = stages.title(number, stage)
        if not default and not any(f for _, f in multipliers.parse(stage.lr_multipliers)):
            raise UserError(
                f"{where}: lr_multipliers={stage.lr_multipliers!r} and "
                f"config.optimizer.default_lr_multiplier={default:g} freeze every weight. Give a weight a "
                "factor above 0."
            )
        if stage.epochs and weights.strip() and config.objective != "pretrain":
            raise UserError(
                f"{where}: epochs={stage.epochs:g} counts passes over the examples, and "
                f"config.data.weights={weights!r} mixes sources that end at different times. Give the stage "
                "steps, or set config.data.weights=''."
            )
