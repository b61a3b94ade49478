"""What a run learns, as one object: the fields of its batch, frozen models, its loss as named parts, and what
it measures.

Enter a model's output and a batch, leave a loss and its parts. Read base.py first, then pretrain.py, the
first objective, sft.py and distill.py.
"""

from deepseek_jax.config.options import Config
from deepseek_jax.objectives.base import FrozenSource, Objective
from deepseek_jax.objectives.distill import Distillation
from deepseek_jax.objectives.pretrain import Pretraining
from deepseek_jax.objectives.sft import FineTuning

_MADE_BY = {"pretrain": Pretraining, "sft": FineTuning}  # by config.objective


def make(config: Config, teacher: FrozenSource | None = None) -> Objective:
    """The objective of a run's options: the one maker, for training, plan and benchmarks.

    Args:
      teacher: of distillation (run/teacher.py); None where there is none, or only the fields are asked for.
    """
    if config.objective == "distill":
        return Distillation(config, teacher)
    return _MADE_BY[config.objective](config)
