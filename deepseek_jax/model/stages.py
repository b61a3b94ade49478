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

from deepseek_jax.model.moe_statistics import MoEStats, join_layers, merge_stats
from deepseek_jax.model.remat import rematerialise
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.model.taps import Asked, chosen, collect, join, of_layers
from deepseek_jax.model.transformer import Output, Transformer
from deepseek_jax.parallel.pipeline import Schedule, run, to_stages
from deepseek_jax.parallel.sharding import without_stage
from deepseek_jax.runtime.jax_private import keep_explicit_axes_through_shard_map

keep_explicit_axes_through_shard_map()


def through_stages(
    model: Transformer,
    schedule: Schedule,
    fields: dict[str, tuple[jax.Array, int | float]],
    others: Any,
    given: Any,
    head: Callable[..., Any],
    taps: Asked = (),
) -> tuple[Any, MoEStats | None]:
    """All micro-batches of a step through the pipeline.

    Args:
      fields: by name (an array [A, B, ...] of A micro-batches, its value in a micro-batch that is missing:
        padding).
      others: a pytree of arrays [A, ...] that `head` needs besides, of each micro-batch.
      given: arrays that `head` needs, the same on all stages.
      head: (model, micro-batch, its Output, its part of `others`, given) -> sums to be added up over
        micro-batches: the loss.
      taps: names of what layers hand out (taps.py), for `head`.

    Returns:
      (the sums, statistics as Transformer returns them, added up over micro-batches).
    """
    name = model.blocks_name
    here = model.layers_of(getattr(model, name))
    of_blocks = of_layers(taps, here.start, here.stop)
    graphdef, blocks, ends = nnx.split(model, lambda path, _: path[0] == name, ...)
    blocks = jax.tree.map(lambda w: to_stages(w, schedule), blocks)
    ends = jax.tree.map(lambda w: jax.sharding.reshard(w, without_stage(w)), ends)
    batch = {name: a for name, (a, _) in fields.items()}

    def one_stage(blocks, ends, batch, others, given):
        stage = lax.axis_index("stage")
        ends, batch, others, given = jax.tree.map(
            lambda a: lax.pcast(a, "stage", to="varying"), (ends, batch, others, given)
        )
        model = nnx.merge(graphdef, jax.tree.map(lambda w: w[:, 0], blocks), ends)
        layer_graphdef, weights = nnx.split(getattr(model, name))

        def pick(tree, m):
            last = schedule.micro_batches - 1
            return jax.tree.map(
                lambda a: lax.dynamic_index_in_dim(a, jnp.minimum(m, last), 0, keepdims=False),
                tree,
            )

        def micro_batch(m):
            """Micro-batch m, all padding where there is none."""
            missing = m >= schedule.micro_batches
            micro = pick(batch, m)
            return {k: jnp.where(missing, fields[k][1], a) for k, a in micro.items()}

        def side(m):
            micro = micro_batch(m)
            return rope_tables(model.config, micro["positions"]), micro["segment_ids"]

        def block(weights, x_BSD, side, works):
            rope, segment_ids_BS = side
            with collect(of_blocks) as found:
                x_BSD, stats = nnx.merge(layer_graphdef, weights)(
                    x_BSD, rope, jnp.where(works, segment_ids_BS, 0)
                )
            return x_BSD, stats, found

        def entrance(m):
            micro = micro_batch(m)
            return model.enter(micro["tokens"], *side(m), taps, micro.get("row"))

        def exit(m, x_BSD, first, found):
            micro = micro_batch(m)
            out: Output = model.leave(x_BSD, *side(m), micro.get("next_tokens"), taps)
            out, stats = out._replace(stats=None, taps=join(first, found, out.taps)), out.stats
            return head(model, micro, out, pick(others, m), given), stats

        mine = jnp.arange(schedule.groups) * schedule.stages + stage
        # Entrance and exit contain what is rematerialised themselves: dense layers, MTP layers, logits.
        x_GBSD, first = lax.map(entrance, mine)
        x_GBSD, stats, found = run(
            schedule,
            weights,
            x_GBSD,
            side,
            block,
            lambda f: rematerialise(f, model.remat, model.offload),
        )
        found = chosen(of_blocks, found, axis=1)
        sums, mtp_stats = lax.map(lambda a: exit(*a), (mine, x_GBSD, first, found))
        sums = jax.tree.map(lambda a: lax.psum(jnp.sum(a, axis=0), "stage"), sums)
        stats, mtp_stats = merge_stats(stats, axis=0), merge_stats(mtp_stats, axis=0)
        return (
            sums,
            jax.tree.map(lambda a: a[:, None], stats),
            jax.tree.map(lambda a: a[None], mtp_stats),
        )

    mapped = jax.shard_map(
        one_stage,
        in_specs=(P(None, "stage"), P(), P(), P(), P()),
        out_specs=(P(), P(None, "stage"), P("stage")),
        axis_names={"stage"},
        check_vma=True,
    )
    sums, stats, mtp_stats = mapped(blocks, ends, batch, others, given)

    def in_order(a: jax.Array) -> jax.Array:
        return jax.sharding.reshard(a, P()).reshape(-1, *a.shape[3:])[: schedule.layers]

    stats = jax.tree.map(in_order, stats)
    mtp_stats = merge_stats(jax.tree.map(lambda a: jax.sharding.reshard(a, P()), mtp_stats), axis=0)
    return sums, join_layers(stats, mtp_stats)
