"""The training step: (state, batch) -> (state, metrics), the only jitted training function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config
from deepseek_jax.model.moe import Load, merge_loads
from deepseek_jax.objectives import pretrain
from deepseek_jax.parallel import compression, offload
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.sharding import reshard
from deepseek_jax.parallel.weights import REPLICAS, copies, each_its_own, keep_whole
from deepseek_jax.train import loss_scale, offloaded_update
from deepseek_jax.train.optimizer import learning_rate, sequences_at
from deepseek_jax.train.state import Layout, TrainState

NO_LOAD = Load(
    *(np.zeros(shape, np.int32) for shape in ((0, 0), (0,), (0, 0), (0, 0), (0, 0), (0,)))
)  # of a model without experts


class StepMetrics(NamedTuple):
    """What a step reports, for the global batch, the same on every device."""

    losses: pretrain.Losses
    lr: jax.Array
    grad_norm: jax.Array  # before clipping
    load: Load  # where assignments went, leaves [L, ...]; the rounds are the most of a micro-batch
    tokens: jax.Array  # float32: tokens that are not padding
    bad_steps: jax.Array  # int32: updates skipped in a row up to this one
    skipped_steps: jax.Array  # int32: in all
    loss_scale: jax.Array | None  # float32, of this step; None but in float16


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a step's batch [A, b, S]: rows over the batch axes."""
    return NamedSharding(mesh, P(None, BATCH_AXES, None))


def put_batch(
    rows: dict[str, np.ndarray], micro_batch: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Rows [n, S] of the global batch to int32 arrays [A, b, S] over the mesh; each process hands over its own shards."""
    sharding = batch_sharding(mesh)

    def put(a: np.ndarray) -> jax.Array:
        a = a.reshape(-1, micro_batch, a.shape[-1])
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    return {k: put(v) for k, v in rows.items()}


def abstract_batch(
    config: Config, mesh: jax.sharding.Mesh, step: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `put_batch` makes of the rows of the step after `step` finished ones: int32 [A, b, S]."""
    shape = (
        sequences_at(config, step) // config.micro_batch,
        config.micro_batch,
        config.train.sequence_length,
    )
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), array)


def make_gradients(
    config: Config, layout: Layout, token_loss: Callable = pretrain.next_token_loss
) -> Callable:
    """(params, bias, batch [A, b, S], totals, MTP weight, loss scale or None) -> (gradients, Losses, Load) of the whole batch.

    Gradients are of the scaled loss, summed over micro-batches, in the layout that the strategy gives them; float32, or the
    `train.accumulation_dtype` in which several micro-batches are added up. Losses are not scaled. With gradient_compression gradients
    are each replica's own, [R, ...] for R replicas along `data`, still to be summed.
    """
    compressed = config.sharding.gradient_compression != "none"

    def gradients(params, bias, batch, total, mtp_weight, scale):
        def loss(parts):
            model = layout.merge(
                each_its_own(parts) if compressed else keep_whole(params, parts), bias
            )
            value, aux = pretrain.pretraining_loss(
                model, batch, total, config, mtp_weight, token_loss
            )
            return value if scale is None else value * scale, aux

        # Differentiated in the layout of the gradients: slicing parameters that are whole is free.
        given = reshard(params, layout.grad_specs)
        given = (
            copies(given, jax.sharding.get_abstract_mesh().shape[REPLICAS]) if compressed else given
        )
        grads, (parts, stats) = jax.grad(loss, has_aux=True)(given)
        return grads, parts, stats.load if stats else NO_LOAD

    def whole_batch_gradients(params, bias, batch, total, mtp_weight, scale=None):
        one = lambda batch: gradients(params, bias, batch, total, mtp_weight, scale)
        if jax.sharding.get_abstract_mesh().shape["stage"] > 1:
            return one(batch)
        if batch["tokens"].shape[0] == 1:
            return one(jax.tree.map(lambda a: a[0], batch))

        def more(carry, micro):
            new = one(micro)
            load = merge_loads(jax.tree.map(lambda *a: jnp.stack(a), carry[2], new[2]))
            add = lambda buffer, g: jnp.add(buffer, g).astype(buffer.dtype)
            return (
                offload.tree_map(add, carry[0], new[0]),
                jax.tree.map(jnp.add, carry[1], new[1]),
                load,
            ), None

        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda a: a[0], batch)))
        buffers = jax.tree.map(lambda s: s.update(dtype=config.train.accumulation_dtype), shapes[0])
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes[1:]
        )
        return jax.lax.scan(more, (offload.zeros(buffers, layout.shardings.params), *zeros), batch)[
            0
        ]

    return whole_batch_gradients


def make_train_step(
    config: Config, layout: Layout, token_loss: Callable = pretrain.next_token_loss
) -> Callable:
    """The step function, to be jitted with the state donated.

    Its batch has int32 arrays [A, b, S]: A micro-batches, b divided over the batch axes. Gradients are summed over them in
    float32. A non-finite loss or gradient norm leaves parameters, optimizer state and bias as they were, and is counted.
    """
    depths = config.model.num_nextn_predict_layers
    schedule = learning_rate(config)
    whole_batch_gradients = make_gradients(config, layout, token_loss)

    def counts_of(params, bias, batch):
        """Expert counts of all micro-batches, by a forward pass of its own: the batch-level balance loss needs them first."""

        def one(_, micro):
            model = layout.merge(params, bias)
            return None, model(
                micro["tokens"], micro["segment_ids"], micro["positions"], micro["targets"]
            ).stats.load.expert_counts

        return jnp.sum(jax.lax.scan(one, None, batch)[1], axis=0)

    def train_step(state: TrainState, batch: pretrain.Batch) -> tuple[TrainState, StepMetrics]:
        t, m = config.train, config.model
        batch_level = not m.seq_aux and m.aux_loss_alpha and m.has_experts
        counts = (
            jax.lax.stop_gradient(counts_of(state.params, state.bias, batch))
            if batch_level
            else None
        )
        total = pretrain.totals(batch, depths, counts)
        mtp_weight = jnp.where(
            state.step < round(t.mtp_switch_fraction * t.steps),
            t.mtp_loss_weight,
            t.mtp_loss_weight_final,
        )
        scale = loss_scale.scale_of(config, state.loss_scale)
        grads, parts, load = whole_batch_gradients(
            state.params, state.bias, batch, total, mtp_weight, scale
        )

        with jax.named_scope("optimizer"):
            grads, residual = loss_scale.unscaled(grads, scale), state.residual
            if residual is not None:
                grads, residual = compression.summed(
                    config.sharding.gradient_compression, grads, residual
                )
            grad_norm = offload.norm(grads)
            ok = jnp.isfinite(parts.loss) & jnp.isfinite(grad_norm)
            # Under ZeRO-1 and 2 this slices whole parameters (free) and gathers them again after the update.
            params = reshard(state.params, layout.opt_specs)
            grads = reshard(grads, layout.opt_specs)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
            if config.offload.optimizer_state or config.offload.parameters:
                params, opt_state = offloaded_update.update(
                    config, grads, state.opt_state, params, grad_norm, ok
                )
            else:
                updates, opt_state = layout.optimizer.update(grads, state.opt_state, params)
                params, opt_state = keep(
                    (optax.apply_updates(params, updates), opt_state), (params, state.opt_state)
                )
            params, residual = reshard(params, layout.param_specs), keep(residual, state.residual)
            bias = keep(update_bias(state.bias, load.expert_counts, state.step, config), state.bias)
        bad, new_scale = jnp.where(ok, 0, state.bad_steps + 1), state.loss_scale
        if new_scale is not None:
            # While the scale can fall, an overflow is a step of its search, not a sign of bad numbers.
            bad_loss = ~jnp.isfinite(parts.loss)
            searching = ~ok & ~bad_loss & loss_scale.may_fall(config.fp16, state.loss_scale)
            bad = jnp.where(searching, state.bad_steps, bad)
            new_scale = loss_scale.adjust(
                config.fp16, state.loss_scale, ~jnp.isfinite(grad_norm), bad_loss
            )
        skipped = state.skipped_steps + jnp.where(ok, 0, 1)
        lr = schedule(state.step - state.skipped_steps)  # the optimizer counts the updates it made
        new_state = TrainState(
            state.step + 1, params, bias, opt_state, bad, skipped, residual, new_scale
        )
        return new_state, StepMetrics(parts, lr, grad_norm, load, total.tokens, bad, skipped, scale)

    return train_step


def update_bias(bias, counts_LE: jax.Array, step: jax.Array, config: Config):
    """Auxiliary-loss-free balancing (arXiv:2408.15664): up where an expert had less than the mean load, down where more.

    Args:
      bias: the state of `e_score_correction_bias`: [L, E] for the stacked layers, [E] for each MTP layer.
      counts_LE: int32 counts of the whole step's global batch, MTP layers last.
    """
    moving = step < round(config.moe.bias_update_fraction * config.train.steps)

    def move(b, counts):
        # In integers: a mean rounded in float32 would move experts that have exactly the mean load.
        mean, rest = jnp.divmod(jnp.sum(counts, axis=-1, keepdims=True), counts.shape[-1])
        up = (counts < mean) | ((counts == mean) & (rest > 0))
        new = b + config.moe.bias_update_rate * (up.astype(jnp.float32) - (counts > mean))
        new = new - jnp.mean(new, axis=-1, keepdims=True) if config.moe.bias_centre else new
        return jnp.where(moving, new, b)

    leaves, tree = jax.tree.flatten(bias)
    # A state's leaves are ordered by name: "layers" before "mtp", as in the counts.
    out, row = [], 0
    for leaf in leaves:
        n = leaf.shape[0] if leaf.ndim == 2 else 1
        out.append(move(leaf, counts_LE[row : row + n].reshape(leaf.shape)))
        row += n
    return jax.tree.unflatten(tree, out)


def make_eval_step(layout: Layout) -> Callable:
    """(params, bias, batch [b, S]) -> float32 sum of -log p over the batch's targets, main head only."""

    def eval_step(params, bias, batch: pretrain.Batch) -> jax.Array:
        model = layout.merge_for_inference(params, bias)
        out = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        return pretrain.cross_entropy_sum(out.hidden_BSD, model, batch["targets"])

    return eval_step
