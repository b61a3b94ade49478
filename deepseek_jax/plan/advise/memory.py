"""Bytes that a plan takes of a device, by arithmetic: exact for what is stored, train/kept.py's estimate for
the rest. What is compiled afterwards has the compiler's own number in its place.
"""

import math
from collections.abc import Mapping

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.parallel.xla_options import ITEM_BYTES
from deepseek_jax.plan.advise.candidates import Choice, kept_names
from deepseek_jax.plan.advise.weights import Divided
from deepseek_jax.train import kept

# Rows of hidden_size that a layer leaves for backward beside what has a name, with remat=none.
UNNAMED_ROWS = 12


class Memory:
    """Of a mesh, strategy, number of micro-batches and dispatch.

    Args:
      config: with these.
      shape: of the mesh.
      divided: what mesh and strategy make of the weights.
    """

    def __init__(self, config: Config, shape: Mapping[str, int], divided: Divided) -> None:
        self._config, self._shape, self._divided = config, shape, divided
        one = {**shape, "stage": 1}
        self._sizes = kept.sizes(config, one, divided.stored, divided.layer)
        tokens = config.micro_batch * config.train.sequence_length
        self._tokens = tokens // math.prod(shape[a] for a in TOKEN_AXES)
        self._staged = self._of_stages() if shape["stage"] > 1 else 0

    def state(self, offload: tuple[str, ...]) -> int:
        """Of what lies there between steps, and nothing else."""
        stored, of_layer = self._divided.stored, self._divided.layer
        state = self._sizes.state
        if "optimizer_state" in offload:
            state -= stored["optimizer"] - min(stored["optimizer"], 2 * of_layer)
        if "parameters" in offload:
            state -= stored["parameters"] - min(stored["parameters"], 4 * of_layer)
        return state

    def total(self, choice: Choice) -> int:
        """Of the step."""
        sizes, state = self._sizes, self.state(choice.offload)
        weights = 0 if "parameters" in choice.offload else sizes.weights
        if self._staged:
            return state + round(kept.SLACK * (weights + sizes.passing + self._staged))
        names = kept_names(choice.remat)
        unnamed = self._unnamed() if choice.remat == "none" else 0
        rest = weights + sizes.passing + sizes.inputs + unnamed + sum(sizes.kept[n] for n in names)
        return state + round(kept.SLACK * rest)

    def _unnamed(self) -> int:
        m, item = self._config.model, ITEM_BYTES[self._config.train.dtype]
        heads = m.num_attention_heads // self._shape["tensor"]
        rows = UNNAMED_ROWS * m.hidden_size + heads * (2 * m.qk_head_dim + m.value_head_dim)
        return (m.num_hidden_layers + m.num_nextn_predict_layers) * self._tokens * rows * item

    def _of_stages(self) -> int:
        """A copy of the stages' weights and gradients in float32, and the inputs of their layers in every
        tick."""
        schedule = make_schedule(self._config, self._shape["stage"])
        rows = schedule.ticks * schedule.blocks * self._tokens * self._config.model.hidden_size
        inputs = rows * ITEM_BYTES[self._config.train.dtype]
        stored = self._divided.stored
        return stored.get("parameters", 0) + stored.get("gradients", 0) + inputs
