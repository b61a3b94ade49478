"""Blocks over stages: which block lies where, and the schedule by which micro-batches go through them.

Stage s holds `virtual_stages` groups of `blocks` consecutive layers: its virtual stage c is layers (c *
stages + s) * blocks and on. A micro-batch goes round the stages `virtual_stages` times; while one stage works
on it the others work on its neighbours. That is the interleaved schedule of Megatron-LM (Narayanan et al.
2021, arXiv:2104.04473), as one program for all stages: micro-batches come in groups of `stages`, and what the
k-th unit of work of a stage is follows from a formula, the same on every stage but for a delay of s ticks:

    local = tick - s
    group = local // (stages * virtual_stages)
    virtual = local // stages % virtual_stages
    lane = local % stages

What leaves the last stage with virtual stage c reaches the first one just when c + 1 is due, so nothing is
ever stored in between. A tick without work, and a slot without a layer (61 blocks on 4 stages), run on
padding, which routes nowhere: other stages are at work then anyway. Skipping them by a `cond` would gain no
time, would stop the device for the condition, and would hang where a collective concerns devices that take
the other branch. The backward pass is the transpose: the same schedule the other way round.

Shape letters: model/layers.py, and G groups of micro-batches, one micro-batch per stage; Q ticks, P virtual
stages, n layers of each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.sharding import without_stage

# The most that are chosen without being asked for: more move the activations more often and save little.
MOST_VIRTUAL_STAGES = 4


class Schedule(NamedTuple):
    layers: int
    stages: int
    virtual_stages: int  # of each stage: config.sharding.virtual_stages
    blocks: int  # layers of a virtual stage
    micro_batches: int

    @property
    def groups(self) -> int:
        return -(-self.micro_batches // self.stages)

    @property
    def ticks(self) -> int:
        """Units of time, each that of a virtual stage: all work of a stage, and the delay of the last one."""
        return self.groups * self.stages * self.virtual_stages + self.stages - 1

    @property
    def bubble_share(self) -> float:
        """Share of the stages' time without work: filling and draining, missing micro-batches of the last
        group, missing layers.
        """
        return 1 - self.micro_batches * self.layers / (self.stages * self.ticks * self.blocks)


def make_schedule(config: Config, stages: int, micro_batches: int | None = None) -> Schedule:
    """The schedule of a config on so many stages; with virtual_stages=0 the quickest of up to
    MOST_VIRTUAL_STAGES.

    Without rematerialisation it is one: gathered weights are kept for backward then, once for a stage's only
    virtual stage, but for every tick where which one it is depends on the tick.

    Args:
      micro_batches: config.train.accumulation by default; fewer in the steps of a batch ramp.
    """
    layers, a_stage = config.pipelined_blocks, -(-config.pipelined_blocks // stages)

    def of(virtual_stages: int) -> Schedule:
        return Schedule(
            layers,
            stages,
            virtual_stages,
            -(-layers // (stages * virtual_stages)),
            micro_batches or config.train.accumulation,
        )

    if config.sharding.virtual_stages:
        return of(config.sharding.virtual_stages)
    most = 1 if config.train.remat == "none" else min(MOST_VIRTUAL_STAGES, a_stage)
    return min((of(r) for r in range(1, most + 1)), key=lambda s: s.ticks * s.blocks)


def to_stages(w: jax.Array, schedule: Schedule) -> jax.Array:
    """A stacked weight [L, ...] as stored, every stage a slice of it, to [P, stages, n, ...] with each layer
    on its stage.

    An all-to-all over the stage axis, once a step; its transpose brings the gradient back.
    """
    s, spec = schedule, jax.typeof(w).sharding.spec
    divided = [i for i, axes in enumerate(spec) if axes and "stage" in axes]

    def place(w):
        missing = s.virtual_stages * s.stages * s.blocks - s.layers
        w = jnp.pad(w, [(0, missing)] + [(0, 0)] * (w.ndim - 1)).reshape(
            s.virtual_stages, s.stages, s.blocks, *w.shape[1:]
        )
        if divided:
            return lax.all_to_all(w, "stage", split_axis=1, concat_axis=divided[0] + 2, tiled=True)
        return lax.dynamic_slice_in_dim(
            lax.pcast(w, "stage", to="varying"), lax.axis_index("stage"), 1, axis=1
        )

    return per_device(place, (spec,), jax.P(None, "stage", None, *without_stage(w)[1:]))(w)


def run(
    schedule: Schedule,
    weights: Any,
    x_GBSD: jax.Array,
    side: Callable,
    block: Callable,
    remat: Callable,
) -> tuple[jax.Array, Any, Any]:
    """One stage's part of the pipeline, inside a shard_map over `stage`.

    Args:
      weights: this stage's, leaves [P, n, ...].
      x_GBSD: what goes in: micro-batch group * stages + s on stage s.
      side: micro-batch number -> what its layers need besides x.
      block: (weights of one layer, x_BSD, side, bool: whether to work) -> (x_BSD, statistics, taps). Without
        work it takes all tokens for padding.
      remat: function -> the same, rematerialised as the run wants.

    Returns:
      What comes out, [G, B, S, D] as x_GBSD; statistics with leaves [Q, P, n, ...]: of each tick, zeros where
      it did nothing; and the taps of all layers for the micro-batches that come out here, leaves [G, L, ...].
    """
    s, stage = schedule, lax.axis_index("stage")
    around = s.stages * s.virtual_stages

    def shift(a, by):
        return lax.ppermute(a, "stage", [(i, (i + by) % s.stages) for i in range(s.stages)])

    def at(a, i):
        return lax.dynamic_index_in_dim(a, i, 0, keepdims=False)

    last_out = (
        around + s.stages - 2
    )  # the tick when the last micro-batch of group 0 leaves; the others are on their way to their stages

    # With several virtual stages a layer's weights are taken out of the stage's inside what is
    # rematerialised: outside, every tick would keep the copy that it worked with.
    def pick(w, virtual, place):
        return lax.squeeze(
            lax.dynamic_slice(w, (virtual, place, *[0] * (w.ndim - 2)), (1, 1, *w.shape[2:])),
            (0, 1),
        )

    whole_block = remat(block)
    picked_block = remat(
        lambda at, *args: block(jax.tree.map(lambda w: pick(w, *at), weights), *args)
    )

    def tick(carry, t):
        ring_BSD, coming_BSD, leaving_BSD, y_GBSD = carry
        local = jnp.maximum(t - stage, 0)
        group, virtual, lane = (
            local // around,
            local // s.stages % s.virtual_stages,
            local % s.stages,
        )
        micro = group * s.stages + lane
        working = (t >= stage) & (micro < s.micro_batches)
        # A group is taken up by all stages at once, and walks to stage 0, one a tick.
        coming_BSD = jnp.where(
            t % around == 0, at(x_GBSD, jnp.minimum(t // around, s.groups - 1)), coming_BSD
        )
        h_BSD = jnp.where((stage == 0) & (virtual == 0), coming_BSD, ring_BSD)
        given = side(jnp.minimum(micro, s.micro_batches - 1))

        def layer(h_BSD, layer_weights, place):
            exists = (virtual * s.stages + stage) * s.blocks + place < s.layers
            args = h_BSD, given, working & exists
            out_BSD, stats, taps = (
                whole_block(layer_weights, *args)
                if s.virtual_stages == 1
                else picked_block((virtual, place), *args)
            )
            return jnp.where(exists, out_BSD, h_BSD), (stats, taps)

        only_virtual = jax.tree.map(lambda w: w[0], weights) if s.virtual_stages == 1 else None
        h_BSD, (stats, taps) = lax.scan(
            lambda h, xs: layer(h, *xs), h_BSD, (only_virtual, jnp.arange(s.blocks))
        )
        stats = jax.tree.map(
            lambda a: jnp.where(
                (jnp.arange(s.virtual_stages) == virtual).reshape(-1, *[1] * a.ndim), a[None], 0
            ),
            stats,
        )
        # What is done leaves at the last stage and walks to the stage that its micro-batch came from.
        done = (stage == s.stages - 1) & (virtual == s.virtual_stages - 1)
        leaving_BSD = jnp.where(done, h_BSD, shift(leaving_BSD, -1))
        home = (t >= last_out) & ((t - last_out) % around == 0)
        slot = jnp.clip((t - last_out) // around, 0, s.groups - 1)
        y_GBSD = jnp.where(
            home, lax.dynamic_update_index_in_dim(y_GBSD, leaving_BSD, slot, 0), y_GBSD
        )
        return (shift(h_BSD, 1), shift(coming_BSD, -1), leaving_BSD, y_GBSD), (stats, taps)

    empty = jnp.ones_like(
        x_GBSD
    )  # not zeros: with rms_norm_eps=0 neither their norm nor its gradient is a number
    (_, _, _, y_GBSD), (stats, taps) = lax.scan(
        tick, (empty[0], empty[0], empty[0], empty), jnp.arange(s.ticks)
    )
    return y_GBSD, stats, jax.tree.map(lambda a: _taps_at_exit(s, a), taps)


def _taps_at_exit(schedule: Schedule, taps: jax.Array) -> jax.Array:
    """A tap of this stage's layers by tick, [Q, n, ...], to one of all layers for the micro-batches that
    leave here, [G, L, ...].
    """
    s = schedule
    # The k-th unit of work of a stage is at tick k + stage: by group, virtual stage and the micro-batch's
    # place in its group.
    work = lax.dynamic_slice_in_dim(
        taps, lax.axis_index("stage"), s.groups * s.virtual_stages * s.stages, axis=0
    )
    work = work.reshape(s.groups, s.virtual_stages, s.stages, *taps.shape[1:])
    # Micro-batch group * stages + k leaves at stage k; there the axis is of the stages that it came through.
    came = lax.all_to_all(work, "stage", split_axis=2, concat_axis=2, tiled=True)
    return came.reshape(s.groups, -1, *taps.shape[2:])[:, : s.layers]
