"""The training step, (state, batch, frozen) -> (state, metrics): the only jitted training function.

Forward, loss, gradients (gradients.py), clip and update (optimizer.py), balance (balance.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.data.fields import check_batch
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.objectives.base import Batch, Objective, Parts
from deepseek_jax.objectives.forward import frozen_outputs, run_model, step_totals
from deepseek_jax.parallel import compression, offload
from deepseek_jax.parallel.sharding import reshard
from deepseek_jax.train import loss_scale, offloaded_update, some_experts
from deepseek_jax.train.balance import update_bias
from deepseek_jax.train.gradients import Learner
from deepseek_jax.train.optimizer import learning_rate
from deepseek_jax.train.state import Layout, TrainState

OF_TRAINING = ("next_tokens", "row")  # multi-token prediction, noise


class StepMetrics(NamedTuple):
    """What a step reports, for the global batch, the same on every device."""

    parts: Parts  # of the loss by name, `loss` itself among them
    lr: jax.Array
    grad_norm: jax.Array  # before clipping
    load: Load  # where assignments went, leaves [L, ...]; the rounds are the most of a micro-batch
    tokens: jax.Array  # float32: tokens that are not padding
    bad_steps: jax.Array  # int32: updates skipped in a row up to this one
    skipped_steps: jax.Array  # int32: in all
    loss_scale: jax.Array | None  # float32, of this step; None but in float16

    @property
    def loss(self) -> jax.Array:
        return self.parts["loss"]


def make_train_step(config: Config, layout: Layout, objective: Objective) -> Callable:
    """The step function, to be jitted with the state donated.

    A non-finite loss or gradient norm leaves parameters, optimizer state and bias as they were, and is
    counted.

    Returns:
      (state, batch by field [A, B, ...] of A micro-batches, weights of `layout.frozen` or None) -> (state,
      StepMetrics).
    """
    schedule = learning_rate(config)
    learner = Learner(config, layout, objective)

    def train_step(
        state: TrainState, batch: Batch, frozen_weights: ModelWeights | None = None
    ) -> tuple[TrainState, StepMetrics]:
        check_batch(batch, objective.fields)
        counts = learner.expert_counts(state.weights(), batch)
        totals = step_totals(objective, config, batch, state.step, counts)
        scale = loss_scale.scale_of(config, state.loss_scale)
        grads, parts, load = learner.gradients(state, frozen_weights, batch, totals, scale)
        with jax.named_scope("optimizer"):
            grads, residual = _whole_gradients(config, grads, scale, state.residual)
            grad_norm = offload.norm(grads)
            ok = jnp.isfinite(parts["loss"]) & jnp.isfinite(grad_norm)
            params, opt_state = _update(config, layout, state, grads, grad_norm, ok)
            frozen = some_experts.written(layout.multipliers, state.frozen, params, state.esft)
            bias = update_bias(state.bias, load.expert_counts, state.step, config)
            bias = layout.multipliers.hold_bias(bias, state.bias)
            residual, bias = _if(ok, (residual, bias), (state.residual, state.bias))
        bad, new_scale = _after(config, state, ok, parts["loss"], grad_norm)
        skipped = state.skipped_steps + jnp.where(ok, 0, 1)
        lr = schedule(_updates_made(state))
        done = state.step + 1, params, bias, opt_state, bad, skipped, residual, new_scale
        state = TrainState(*done, frozen, state.esft)
        tokens = totals.routing.tokens
        return state, StepMetrics(parts, lr, grad_norm, load, tokens, bad, skipped, scale)

    return train_step


def _updates_made(state: TrainState) -> jax.Array:
    """int32: the updates that the optimizer has counted, those of its stage alone (run/stages.py)."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_schedule)
    counts = (node.count for node in nodes if is_schedule(node))
    return next(counts, state.step - state.skipped_steps)


def _if(ok: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def _whole_gradients(
    config: Config, grads: nnx.State, scale: jax.Array | None, residual: nnx.State | None
) -> tuple[nnx.State, nnx.State | None]:
    """(gradients of the unscaled loss, summed over replicas, and what their compression left over)."""
    grads = loss_scale.unscaled(grads, scale)
    if residual is None:
        return grads, None
    return compression.summed(config.sharding.gradient_compression, grads, residual)


def _update(
    config: Config,
    layout: Layout,
    state: TrainState,
    grads: nnx.State,
    grad_norm: jax.Array,
    ok: jax.Array,
) -> tuple[nnx.State, Any]:
    """(parameters that learn, optimizer state) after clipping and the optimizer's update; as they were if not
    ok.
    """
    # Under ZeRO-1 and 2 this slices whole parameters (free) and gathers them again after the update.
    params = reshard(state.params, layout.opt_specs)
    grads = reshard(grads, layout.opt_specs)
    if config.offload.optimizer_state or config.offload.parameters:
        params, opt_state = offloaded_update.update(
            config, layout.multipliers, grads, state.opt_state, params, grad_norm, ok
        )
    else:
        updates, opt_state = layout.optimizer.update(grads, state.opt_state, params)
        new = optax.apply_updates(params, updates), opt_state
        params, opt_state = _if(ok, new, (params, state.opt_state))
    return reshard(params, layout.param_specs), opt_state


def _after(
    config: Config, state: TrainState, ok: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Any]:
    """(updates skipped in a row, the loss scale of the next step)."""
    bad = jnp.where(ok, 0, state.bad_steps + 1)
    if state.loss_scale is None:
        return bad, None
    # While the scale can fall, an overflow is a step of its search, not a sign of bad numbers.
    bad_loss = ~jnp.isfinite(loss)
    searching = ~ok & ~bad_loss & loss_scale.may_fall(config.fp16, state.loss_scale)
    bad = jnp.where(searching, state.bad_steps, bad)
    overflow = ~jnp.isfinite(grad_norm)
    return bad, loss_scale.adjust(config.fp16, state.loss_scale, overflow, bad_loss)


def make_eval_step(layout: Layout, objective: Objective) -> Callable:
    """(params, bias, batch [B, ...], frozen weights or None) -> the objective's sums over the batch; the main
    head only.
    """

    def eval_step(
        params: nnx.State,
        bias: nnx.State,
        batch: Batch,
        frozen_weights: ModelWeights | None = None,
    ) -> Parts:
        check_batch(batch, objective.fields)
        net = layout.model.merge_for_inference(params, bias)
        main = {name: a for name, a in batch.items() if name not in OF_TRAINING}
        out = run_model(net, main, objective.taps)
        frozen_out = frozen_outputs(layout.frozen, frozen_weights, batch)
        return objective.measure(net, out, batch, frozen_out)

    return eval_step
