"""Distillation. (Stand-in for the section of that name.)"""

from dataclasses import dataclass

from deepseek_jax.config.option import option


@dataclass(frozen=True)
class DistillConfig:
    """Distillation."""

    stages: str = option(
        "",
        "Stages of the run, one after the other, with any objective: a JSON list of {name, epochs or steps, "
        "lr_multipliers, learning_rate}, as text, in a file, or as a tuple of dicts in a config file. Each "
        "has weights that learn, a schedule and an optimizer of its own; together they are as long as the "
        "run, whatever train.steps and train.epochs say.",
        path=True,
        or_text=True,
        json=True,
    )
