"""AdamW with the published recipes, Muon and Adafactor, by optax.

Sources: DeepSeek-V2 (arXiv:2405.04434) section 3.1.2 and DeepSeek-V3 (arXiv:2412.19437) section 4.2 for the
schedules and the batch-size ramp; MiniCPM (arXiv:2404.06395) for warmup-stable-decay.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.train.muon_adafactor import scale_by_adafactor, scale_by_muon
from deepseek_jax.train.trainable import Multipliers

V3_TOKENS = 14.8  # trillions; the V3 schedule below is in shares of them


def learning_rate(config: Config) -> optax.Schedule:
    """Updates made -> learning rate, over optimizer.schedule_steps, or all steps of the run. All schedules
    start with a linear warmup from 0.

    cosine: to `final_fraction` of the peak. wsd: constant, then linear to `final_fraction` over the last
      `decay_fraction`.
    deepseek_v2: x 0.316 when `decay_fraction` of the training is left (0.4; V2-Lite: 0.2), and again for the
      last 10%.
    deepseek_v3: constant to 10T of 14.8T tokens, cosine to a tenth over 4.3T, constant for 333B, then x
      7.3/22 for 167B.
    """
    o, peak = config.optimizer, config.optimizer.learning_rate
    steps = o.schedule_steps or config.train.steps
    warm = min(o.warmup_steps, steps)
    rest = max(steps - warm, 1)
    end = peak * o.final_fraction

    def at(share):
        return max(round(share * steps) - warm, 1)  # boundaries count from the end of the warmup

    if o.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif o.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, o.final_fraction)
    elif o.schedule == "wsd":
        decay = max(round(steps * o.decay_fraction), 1)
        stable = max(rest - decay, 0)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, min(decay, rest))],
            [stable],
        )
    elif o.schedule == "deepseek_v2":
        after = optax.join_schedules(
            [optax.constant_schedule(peak * f) for f in (1, 0.316, 0.316**2)],
            [at(1 - o.decay_fraction), at(0.9)],
        )
    else:
        a, b, c = (at(t / V3_TOKENS) for t in (10.0, 14.3, 14.633))
        after = optax.join_schedules(
            [
                optax.constant_schedule(peak),
                optax.cosine_decay_schedule(peak, max(b - a, 1), 0.1),
                optax.constant_schedule(peak * 0.1),
                optax.constant_schedule(peak * 0.1 * 7.3 / 22),
            ],
            [a, b, c],
        )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warm, 1)), after], [warm])


def decay_mask(params: nnx.State) -> Any:
    """True for matrices; norm weights and biases are not decayed."""

    def is_variable(v):
        return isinstance(v, nnx.Variable)

    def is_matrix(v):
        return not {"norm", "heads_bias", "embed_bias"} & set(v.get_metadata()["out_sharding"])

    return jax.tree.map(lambda v: v.replace(is_matrix(v)), params, is_leaf=is_variable)


def make_optimizer(
    config: Config, params: nnx.State, multipliers: Multipliers | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, the optimizer's update, decoupled weight decay on matrices: lr * (update +
    weight_decay * weight), all alike, each weight with its factor of the learning rate.

    Args:
      params: those that learn; they give structure and logical axes only.
      multipliers: of the learning rate; None: all 1.
    """
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip else optax.identity()
    if o.name == "adamw":
        update = optax.adamw(
            learning_rate(config),
            o.b1,
            o.b2,
            o.eps,
            weight_decay=o.weight_decay,
            mask=decay_mask(params),
        )
    else:
        scale = (
            scale_by_adafactor(params, o.scale_parameter)
            if o.name == "adafactor"
            else scale_by_muon(params, o.momentum, optax.scale_by_adam(o.b1, o.b2, o.eps))
        )
        decay = optax.add_decayed_weights(o.weight_decay, decay_mask(params))
        update = optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate(config)))
    scaled = None if multipliers is None else multipliers.scale()
    return optax.chain(
        clip,
        update if o.moment_dtype == "float32" else moments_in(jnp.dtype(o.moment_dtype), update),
        *([] if scaled is None else [scaled]),
    )


def moments_in(dtype: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose float arrays are stored in `dtype`; it computes in float32 (DeepSeek-V3, section
    3.3.3, in bfloat16).
    """

    def cast(state: Any, dtype: Any) -> Any:
        return jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
        )

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def sequences_at(config: Config, step: int) -> int:
    """Batch size of a step, in sequences: batch_ramp_start growing linearly to batch_size, in whole
    micro-batches.
    """
    t, micro = config.train, config.micro_batch
    if not t.batch_ramp_start or step >= t.batch_ramp_steps:
        return t.batch_size
    size = t.batch_ramp_start + (t.batch_size - t.batch_ramp_start) * step / t.batch_ramp_steps
    return max(int(size) // micro, 1) * micro


def first_sequence(config: Config, step: int) -> int:
    """How many sequences the steps before `step` have taken: where its data begin, a pure function of the
    step.
    """
    ramp = min(step, config.train.batch_ramp_steps if config.train.batch_ramp_start else 0)
    return int(_ramp_totals(config)[ramp]) + (step - ramp) * config.train.batch_size


@functools.cache
def _ramp_totals(config: Config) -> np.ndarray:
    """Sequences before each step of the ramp, and before the first one after it."""
    return np.cumsum([0, *(sequences_at(config, s) for s in range(config.train.batch_ramp_steps))])
