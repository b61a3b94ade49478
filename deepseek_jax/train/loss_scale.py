"""Loss scaling for float16, whose numbers end at 65,504 and lose bits below 6e-5: DeepSpeed's `fp16` block,
its words and its rules.

The loss is multiplied by the scale before it is differentiated, so that small gradients survive in float16;
the float32 gradients are divided by it afterwards. Where one overflows, the update is skipped and a dynamic
scale falls.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import Config, Fp16Config

# a dynamic scale stops here: gradients that are exactly 0 would let it grow to infinity, and 0 * infinity
# is no number
MOST = 2.0**32


class LossScale(NamedTuple):
    """The part of the training state that a dynamic loss scale needs."""

    scale: jax.Array  # float32: the next step's loss is multiplied by it
    good_steps: (
        jax.Array
    )  # int32: steps without overflow since the scale last changed or overflowed
    hysteresis: (
        jax.Array
    )  # int32: the overflow of this number, from now on, halves the scale; 1: the next one


def init_loss_scale(config: Config) -> LossScale | None:
    """None where the scale never changes: it is then no part of the state."""
    if config.train.dtype != "float16" or config.fp16.loss_scale:
        return None
    return LossScale(
        jnp.float32(2.0**config.fp16.initial_scale_power),
        jnp.zeros((), jnp.int32),
        jnp.int32(config.fp16.hysteresis),
    )


def scale_of(config: Config, state: LossScale | None) -> jax.Array | None:
    """What the loss of a step is multiplied by, float32; None: nothing."""
    if state is not None:
        return state.scale
    return jnp.float32(config.fp16.loss_scale) if config.train.dtype == "float16" else None


def unscaled(grads: Any, scale: jax.Array | None) -> Any:
    """Gradients of the loss from those of the scaled loss, float32."""
    return jax.tree.map(
        lambda g: g.astype(jnp.float32) if scale is None else g.astype(jnp.float32) / scale, grads
    )


def may_fall(options: Fp16Config, state: LossScale) -> jax.Array:
    """Whether an overflow can still be the scale's fault: a lower one is left to try."""
    return state.scale > options.min_loss_scale


def adjust(
    options: Fp16Config, state: LossScale, overflow: jax.Array, bad_loss: jax.Array
) -> LossScale:
    """The scale for the next step, as DeepSpeed's DynamicLossScaler.

    Args:
      overflow: whether a gradient is not finite. The first `hysteresis - 1` overflows since the scale last
        grew leave it as it is; each further one halves it, down to min_loss_scale. After loss_scale_window
        steps without one it doubles.
      bad_loss: whether the loss, which the scale does not touch, is not finite: then the scale is not at
        fault and stays.
    """
    good = ~overflow & ~bad_loss
    overflow = overflow & ~bad_loss
    steps = state.good_steps + 1
    grow = good & (steps == options.loss_scale_window)
    fall = overflow & (state.hysteresis <= 1)
    lower = jnp.maximum(state.scale / 2, options.min_loss_scale)
    scale = jnp.where(
        fall,
        lower,
        jnp.where(grow, jnp.maximum(jnp.minimum(state.scale * 2, MOST), state.scale), state.scale),
    )
    hysteresis = jnp.where(
        grow,
        options.hysteresis,
        jnp.where(overflow, jnp.maximum(state.hysteresis - 1, 1), state.hysteresis),
    )
    return LossScale(scale, jnp.where(good & ~grow, steps, 0), hysteresis)
