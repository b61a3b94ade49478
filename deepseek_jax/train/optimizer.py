"""AdamW with the published recipes, Muon, Adafactor, Lion and SGD, by optax; their learning rates are in
schedules.py.

Sources: DeepSeek-V2 (arXiv:2405.04434) section 3.1.2 and DeepSeek-V3 (arXiv:2412.19437) section 4.2 for the
batch-size ramp; Lion: Chen et al. 2023 (arXiv:2302.06675).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.train.adafactor import adafactor
from deepseek_jax.train.muon import scale_by_muon
from deepseek_jax.train.schedules import learning_rate
from deepseek_jax.train.trainable import Multipliers


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
    """Clip by global norm, the optimizer's update, weight decay on matrices, each weight with its factor of
    the learning rate.

    Decay is decoupled, lr * (update + weight_decay * weight), but for sgd, which adds it to the clipped
    gradient as torch.optim.SGD does.

    Args:
      params: those that learn; they give structure and logical axes only.
      multipliers: of the learning rate; None: all 1.
    """
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip else optax.identity()
    update = _update(config, params)
    scaled = None if multipliers is None else multipliers.scale()
    return optax.chain(
        clip,
        update if o.moment_dtype == "float32" else moments_in(jnp.dtype(o.moment_dtype), update),
        *([] if scaled is None else [scaled]),
    )


def _update(config: Config, params: nnx.State) -> optax.GradientTransformation:
    """From clipped gradients to what is added to the weights."""
    o, rate, mask = config.optimizer, learning_rate(config), decay_mask(params)
    if o.name == "adamw":
        return optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=mask)
    if o.name == "lion":
        return optax.lion(rate, o.b1, o.b2, weight_decay=o.weight_decay, mask=mask)
    if o.name == "adafactor":
        return adafactor(o, params, rate, mask)
    decay = optax.add_decayed_weights(o.weight_decay, mask)
    descend = optax.scale_by_learning_rate(rate)
    if o.name == "sgd":
        momentum = optax.trace(o.momentum, o.nesterov) if o.momentum else optax.identity()
        return optax.chain(decay, momentum, descend)
    muon = scale_by_muon(params, o.momentum, optax.scale_by_adam(o.b1, o.b2, o.eps))
    return optax.chain(muon, decay, descend)


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
