"""The model over the stages of a pipeline: entrance, blocks, exit.

The entrance (embedding, and dense layers in front of MoE layers) and the exit (last norm,
multi-token prediction, output head and loss) are not on the first and the last stage, which would
wait for each other: every stage does both for its share of the micro-batches.

Shape letters: layers.py, parallel/pipeline.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import IGNORE
from deepseek_jax.model.moe import MoEStats, merge_stats
from deepseek_jax.model.remat import rematerialise
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.model.transformer import Output, Transformer, join_layers
from deepseek_jax.parallel.pipeline import Schedule, run, to_stages
from deepseek_jax.parallel.sharding import without_stage
from deepseek_jax.runtime.jax_private import keep_explicit_axes_through_shard_map

keep_explicit_axes_through_shard_map()


def through_stages(
    model: Transformer,
    schedule: Schedule,
    batch: dict[str, jax.Array],
    given: Any,
    head: Callable[..., Any],
) -> tuple[Any, MoEStats | None]:
    """All micro-batches of a step through the pipeline.

    Args:
      batch: int32 [A, B, S], A micro-batches: tokens, targets, segment_ids, positions.
      given: arrays that `head` needs, the same on all stages.
      head: (model, micro-batch, its Output, given) -> sums to be added up over micro-batches: the loss.

    Returns:
      (the sums, statistics as Transformer returns them, added up over micro-batches).
    """
    name = model.blocks_name
    graphdef, blocks, ends = nnx.split(model, lambda path, _: path[0] == name, ...)
    blocks = jax.tree.map(lambda w: to_stages(w, schedule), blocks)
    ends = jax.tree.map(lambda w: jax.sharding.reshard(w, without_stage(w)), ends)

    def one_stage(blocks, ends, batch, given):
        stage = lax.axis_index("stage")
        ends, batch, given = jax.tree.map(
            lambda a: lax.pcast(a, "stage", to="varying"), (ends, batch, given)
        )
        model = nnx.merge(graphdef, jax.tree.map(lambda w: w[:, 0], blocks), ends)
        layer_graphdef, weights = nnx.split(getattr(model, name))

        def micro_batch(m):
            """Micro-batch m, all padding where there is none."""
            micro = jax.tree.map(
                lambda a: lax.dynamic_index_in_dim(
                    a, jnp.minimum(m, schedule.micro_batches - 1), 0, keepdims=False
                ),
                batch,
            )
            missing = m >= schedule.micro_batches
            return micro | {
                "segment_ids": jnp.where(missing, 0, micro["segment_ids"]),
                "targets": jnp.where(missing, IGNORE, micro["targets"]),
            }

        def side(m):
            micro = micro_batch(m)
            return rope_tables(model.config, micro["positions"]), micro["segment_ids"]

        def block(weights, x_BSD, side, works):
            rope, segment_ids_BS = side
            return nnx.merge(layer_graphdef, weights)(
                x_BSD, rope, jnp.where(works, segment_ids_BS, 0)
            )

        def entrance(m):
            micro = micro_batch(m)
            return model.enter(micro["tokens"], *side(m))

        def exit(m, x_BSD):
            micro = micro_batch(m)
            out: Output = model.leave(x_BSD, *side(m), micro["targets"])
            return head(model, micro, out, given), out.stats

        mine = jnp.arange(schedule.groups) * schedule.stages + stage
        # Entrance and exit contain what is rematerialised themselves: dense layers, MTP layers, logits.
        x_GBSD = lax.map(entrance, mine)
        x_GBSD, stats = run(
            schedule,
            weights,
            x_GBSD,
            side,
            block,
            lambda f: rematerialise(f, model.remat, model.offload),
        )
        sums, mtp_stats = lax.map(lambda a: exit(*a), (mine, x_GBSD))
        sums = jax.tree.map(lambda a: lax.psum(jnp.sum(a, axis=0), "stage"), sums)
        stats, mtp_stats = merge_stats(stats, axis=0), merge_stats(mtp_stats, axis=0)
        return (
            sums,
            jax.tree.map(lambda a: a[:, None], stats),
            jax.tree.map(lambda a: a[None], mtp_stats),
        )

    mapped = jax.shard_map(
        one_stage,
        in_specs=(P(None, "stage"), P(), P(), P()),
        out_specs=(P(), P(None, "stage"), P("stage")),
        axis_names={"stage"},
        check_vma=True,
    )
    sums, stats, mtp_stats = mapped(blocks, ends, batch, given)

    def in_order(a: jax.Array) -> jax.Array:
        return jax.sharding.reshard(a, P()).reshape(-1, *a.shape[3:])[: schedule.layers]

    stats = jax.tree.map(in_order, stats)
    mtp_stats = merge_stats(jax.tree.map(lambda a: jax.sharding.reshard(a, P()), mtp_stats), axis=0)
    return sums, join_layers(stats, mtp_stats)
