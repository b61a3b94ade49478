"""Forward, loss and gradients of a step's whole batch: at once, micro-batch after micro-batch, or through
pipeline stages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.model.moe_statistics import Load, merge_loads
from deepseek_jax.objectives.base import Batch, Objective, Parts
from deepseek_jax.objectives.forward import StepTotals, frozen_outputs, loss_of_batch, run_model
from deepseek_jax.parallel import offload
from deepseek_jax.parallel.sharding import reshard
from deepseek_jax.parallel.weights import (
    REPLICAS,
    copy_per_replica,
    per_replica_weights,
    replicated_weights,
)
from deepseek_jax.train import cast_weights, projection, some_experts
from deepseek_jax.train.state import Layout, TrainState

# Of a model without experts.
NO_LOAD = Load(
    *(np.zeros(shape, np.int32) for shape in ((0, 0), (0,), (0, 0), (0, 0), (0, 0), (0,)))
)


class Learner(NamedTuple):
    """What the gradients of a run are made with."""

    config: Config
    layout: Layout
    objective: Objective

    def gradients(
        self,
        state: TrainState,
        frozen: ModelWeights | None,
        batch: Batch,
        totals: StepTotals,
        scale: jax.Array | None,
    ) -> tuple[nnx.State, Parts, Load]:
        """Of the whole batch [A, B, ...].

        Args:
          state: its parameters, those that learn and the others, and the selection bias.
          frozen: weights of the frozen model.
          totals: of the whole batch.
          scale: float32, of float16's loss; None without one.

        Returns:
          (gradients of the parameters that learn, parts, load). Gradients are of the scaled loss, summed over
          micro-batches, in the layout that the strategy gives them; float32, or the
          `train.accumulation_dtype` in which several micro-batches are added up. Parts are not scaled. With
          gradient_compression gradients are each replica's own, [R, ...] for R replicas along `data`, still
          to be summed.
        """

        # Here, and not in `_gradients`: the scan below would cast them again for every micro-batch.
        state = state._replace(params=cast_weights.in_compute_dtype(self.config, state.params))

        def one(batch: Batch):
            return self._gradients(state, frozen, batch, totals, scale)

        if jax.sharding.get_abstract_mesh().shape["stage"] > 1:
            return one(batch)
        if batch["tokens"].shape[0] == 1:
            grads, parts, load = one(jax.tree.map(lambda a: a[0], batch))
            return cast_weights.widened(grads), parts, load

        def more(carry, micro):
            new = one(micro)
            load = merge_loads(jax.tree.map(lambda *a: jnp.stack(a), carry[2], new[2]))
            grads = offload.tree_map(_add_to, carry[0], new[0])
            return (grads, jax.tree.map(jnp.add, carry[1], new[1]), load), None

        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda a: a[0], batch)))
        dtype = self.config.train.accumulation_dtype
        buffers = jax.tree.map(lambda s: s.update(dtype=dtype), shapes[0])
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes[1:]
        )
        start = (offload.zeros(buffers, self.layout.shardings.params), *zeros)
        return jax.lax.scan(more, start, batch)[0]

    def _gradients(self, state, frozen, batch, totals, scale):
        """Of one micro-batch [B, ...], or of all of them with stages."""
        params, multipliers = state.params, self.layout.multipliers
        compressed = self.config.sharding.gradient_compression != "none"
        frozen_out = frozen_outputs(self.layout.frozen, frozen, batch)

        def loss(given):
            used = per_replica_weights(given) if compressed else replicated_weights(params, given)
            # Those that are frozen are no argument: nothing of their gradients is computed.
            used = some_experts.in_use(multipliers, used, state.frozen, state.esft)
            used, own = projection.split(used)
            model = self.layout.model.merge(used, state.bias)
            value, aux = loss_of_batch(
                self.objective,
                self.config,
                model,
                batch,
                totals,
                projection.with_output(frozen_out, own),
            )
            return value if scale is None else value * scale, aux

        # Differentiated in the layout of the gradients: slicing parameters that are whole is free.
        given = reshard(params, self.layout.grad_specs)
        if compressed:
            given = copy_per_replica(given, jax.sharding.get_abstract_mesh().shape[REPLICAS])
        grads, (parts, stats) = jax.grad(loss, has_aux=True)(given)
        return grads, parts, stats.load if stats else NO_LOAD

    def expert_counts(self, weights: ModelWeights, batch: Batch) -> jax.Array | None:
        """int32 [L, E] of all micro-batches, by a forward pass of its own: the balance loss over the whole
        batch needs them first.

        None where the balance loss is per sequence, or there is none.
        """
        m = self.config.model
        if m.seq_aux or not m.aux_loss_alpha or not m.has_experts:
            return None

        def one(_, micro):
            model = self.layout.model.merge(*weights)
            stats = run_model(model, micro).stats
            assert stats is not None  # has_experts
            return None, stats.load.expert_counts

        return jax.lax.stop_gradient(jnp.sum(jax.lax.scan(one, None, batch)[1], axis=0))


def _add_to(buffer: jax.Array, g: jax.Array) -> jax.Array:
    """A micro-batch's gradient, in float32 or the compute dtype, added in the wider dtype of the two."""
    return jnp.add(buffer, g).astype(buffer.dtype)
