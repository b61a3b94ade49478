"""From a model and a batch to the loss of an objective: on a mesh without stages a micro-batch, with stages
all of them as a pipeline.
"""

from typing import Any, NamedTuple

import jax
from jax import lax

from deepseek_jax.config.options import Config
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.model.moe_statistics import MoEStats
from deepseek_jax.model.stages import through_stages
from deepseek_jax.model.taps import Asked
from deepseek_jax.model.transformer import Output, Transformer
from deepseek_jax.objectives.base import Batch, Frozen, FrozenOutput, Objective, Parts
from deepseek_jax.objectives.routing import RoutingTotals, routing_loss, routing_totals
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.parallel.sharding import without_stage


class StepTotals(NamedTuple):
    """What every micro-batch needs of the whole step."""

    objective: Any  # Objective.totals
    routing: RoutingTotals


def step_totals(
    objective: Objective,
    config: Config,
    batch: Batch,
    step: jax.Array,
    expert_counts: jax.Array | None = None,
) -> StepTotals:
    """Of all of a step's batch; `expert_counts`: as RoutingTotals has them."""
    return StepTotals(
        objective.totals(batch, step), routing_totals(batch, config.model, expert_counts)
    )


def run_model(model: Transformer, batch: Batch, taps: Asked = ()) -> Output:
    """The model's output for a batch [B, S]. Its `next_tokens` and `row`, if there, are of training."""
    return model(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        batch.get("next_tokens"),
        taps,
        batch.get("row"),
    )


def run_frozen(frozen: Frozen, weights: ModelWeights, batch: Batch) -> FrozenOutput:
    """What a frozen model makes of a batch [B, S]. Nothing of it is differentiated."""
    model = frozen.model.merge_for_inference(*lax.stop_gradient(weights))
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    out = run_model(model, inputs, frozen.taps)._replace(stats=None)
    return FrozenOutput(out, model.head)


def frozen_outputs(
    frozen: Frozen | None, weights: ModelWeights | None, batch: Batch
) -> FrozenOutput | None:
    """`run_frozen`, or of a step's batch [A, B, S] one micro-batch after the other: hidden states [A, B, S,
    D] and taps [A, L, ...].
    """
    if frozen is None:
        return None
    assert weights is not None  # the step's argument, where the objective has a frozen model
    if batch["tokens"].ndim == 2:
        return run_frozen(frozen, weights, batch)
    out = lax.map(lambda micro: run_frozen(frozen, weights, micro).out, batch)
    return FrozenOutput(out, frozen.model.merge_for_inference(*weights).head)


def loss_of_batch(
    objective: Objective,
    config: Config,
    model: Transformer,
    batch: Batch,
    totals: StepTotals,
    frozen_out: FrozenOutput | None = None,
) -> tuple[jax.Array, tuple[Parts, MoEStats | None]]:
    """The loss with all its parts, and the routing statistics.

    Args:
      batch: one micro-batch [B, ...], or with stages all of a step's [A, B, ...], which go through them as a
        pipeline.
      frozen_out: of that batch.

    Returns:
      (loss, (parts, statistics)); among the parts are `loss`, `balance_loss` and `z_loss`.
    """
    if batch["tokens"].ndim == 3:
        (loss, parts), stats = _through_stages(
            objective, config, model, batch, totals.objective, frozen_out
        )
    else:
        out = run_model(model, batch, objective.taps)
        loss, parts = objective.loss(model, out, batch, totals.objective, frozen_out)
        stats = out.stats
    extra, routing_parts = routing_loss(stats, totals.routing, config)
    loss = loss + extra
    return loss, ({**parts, **routing_parts, "loss": loss}, stats)


def _through_stages(objective, config, model, batch, totals, frozen_out):
    frozen, head, projection = None, None, None
    if frozen_out is not None:
        frozen, head = frozen_out.out, frozen_out.head.without_stage()
        projection = jax.tree.map(_without_stage, frozen_out.projection)

    def exit_loss(model, micro, out, frozen, given):
        totals, head, projection = given
        frozen_out = None if head is None else FrozenOutput(frozen, head, projection)
        return objective.loss(model, out, micro, totals, frozen_out)

    stages = jax.sharding.get_abstract_mesh().shape["stage"]
    return through_stages(
        model,
        make_schedule(config, stages, batch["tokens"].shape[0]),
        {name: (batch[name], field.padding) for name, field in objective.fields.items()},
        frozen,
        (totals, head, projection),
        exit_loss,
        objective.taps,
    )


def _without_stage(w: jax.Array) -> jax.Array:
    """A weight whole on every stage: what enters a `shard_map` over `stage`."""
    return jax.sharding.reshard(w, without_stage(w))
