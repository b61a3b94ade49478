"""A compiled train step with a state and a batch, to be run for its time."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import objectives
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.plan import topology
from deepseek_jax.plan.tune import rows
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import Layout, TrainState, state_around
from deepseek_jax.xla import program


class Step:
    """The step of a config on devices of this process, compiled. Nothing lies on them before the first run.

    Args:
      config: without a frozen model.
      devices: of the mesh.
      room: bytes of a device that train.remat=auto may plan with; None: what JAX says, on CPUs nothing.

    Attributes:
      config: with what train.remat=auto stands for.
      memory: bytes of a device, as the compiler planned them.

    Raises:
      UserError: the mesh does not fit, XLA refuses the program, or steps of its objective need a teacher.
    """

    def __init__(self, config: Config, devices: list[jax.Device], room: int | None = None) -> None:
        if config.objective == "distill":
            raise UserError(
                "objective=distill: its steps need a teacher, which is not loaded here. Time the "
                "student alone: --config.objective=pretrain."
            )
        placed = topology.lay_out(config, devices)
        room = room or room_of(devices)
        self.config, self.mesh, self.layout, self.remat = topology.settle(config, *placed, room)
        planned = topology.compile_step(self.config, self.mesh, self.layout)
        self.compiled = planned.compiled
        self.compile_seconds = planned.lower_seconds + planned.compile_seconds
        self.memory = program.memory(self.compiled)
        self._state: TrainState | None = None
        self._batch: Any = None
        self._metrics: Any = None

    def begin(self) -> None:
        """Makes state and batch: random weights, and tokens that fall by Zipf's law."""
        fields = objectives.make(self.config).fields
        with jax.set_mesh(self.mesh):
            self._state = drawn_state(self.config, self.layout)
            of_step = rows.of_a_step(self.config, fields)
            self._batch = put_batch(of_step, self.config.micro_batch, self.mesh)

    def run(self) -> float:
        """Seconds of one more step.

        Raises:
          FloatingPointError: its loss is no number.
        """
        if self._state is None:
            self.begin()
        started = time.perf_counter()
        self._state, self._metrics = jax.block_until_ready(self.compiled(self._state, self._batch))
        seconds = time.perf_counter() - started
        if not math.isfinite(float(self._metrics.loss)):
            raise FloatingPointError(f"the loss is {self._metrics.loss}")
        return seconds

    def rounds(self) -> list[int]:
        """Rounds of the dispatch that each MoE layer took in the last step; none without experts."""
        load = self._metrics.load
        return [] if load is None else [int(n) for n in np.ravel(load.rounds)]

    def free(self) -> None:
        """Gives back what lies on the devices."""
        for leaf in jax.tree.leaves((self._state, self._batch)):
            leaf.delete()
        self._state = self._batch = self._metrics = None


def drawn_state(config: Config, layout: Layout) -> TrainState:
    """A state of step 0 with weights that NumPy draws: as `init_state` for the time of a step, and without
    its program, which takes long to compile.
    """
    rng = np.random.default_rng(config.seed)
    numbers = rng.normal(scale=config.model.initializer_range, size=2**16).astype(np.float32)

    def draw(path: Any, like: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(like.dtype, jnp.floating) or "bias" in name:
            values = np.zeros(1, like.dtype)
        elif "norm" in name:
            values = np.ones(1, like.dtype)
        else:
            values = numbers

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            shape = [len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True)]
            return np.resize(values, shape).astype(like.dtype)

        return jax.make_array_from_callback(like.shape, like.sharding, shard)

    weights: ModelWeights = jax.tree_util.tree_map_with_path(draw, layout.model.abstract_sharded())
    return state_around(config, layout, weights.params, weights.bias)


def room_of(devices: list[jax.Device]) -> int | None:
    """Bytes that a run may plan with on one of these devices; None: they do not say."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return int(limit) if limit else None
