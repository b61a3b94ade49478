"""Learning rates over the steps of a run: config.optimizer's schedule, warmup and hold.

Each schedule is the published or the library's formula, in float32:

  DeepSeek-V2 (arXiv:2405.04434) section 3.1.2, DeepSeek-V3 (arXiv:2412.19437) section 4.2;
  linear, polynomial, inverse_sqrt, cosine_with_restarts: transformers.optimization.get_scheduler;
  wsd: MiniCPM (arXiv:2404.06395); its decay shapes: Megatron-Core's OptimizerParamScheduler;
  warmup_shape=log: DeepSpeed's WarmupLR; hold_steps: NeMo's CosineAnnealing(constant_steps=).
"""

import math

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config.options import Config, OptimizerConfig

V3_TOKENS = 14.8  # trillions; the V3 schedule below is in shares of them
NO_TIMESCALE = 10_000  # of inverse_sqrt without a warmup, as transformers


def learning_rate(config: Config) -> optax.Schedule:
    """Updates made, int32 -> learning rate, float32.

    From `warmup_init_fraction` of the peak up to it, then down as `schedule` says, until `hold_steps` before
    the end of optimizer.schedule_steps, or of the run; the rate that is reached there stays.

    cosine, linear, polynomial, cosine_with_restarts: to `final_fraction` of the peak. inverse_sqrt: not below
      it. wsd: constant, then to `final_fraction` over the last `decay_fraction`.
    deepseek_v2: x 0.316 when `decay_fraction` of the training is left (0.4; V2-Lite: 0.2), and again for the
      last 10%.
    deepseek_v3: constant to 10T of 14.8T tokens, cosine to a tenth over 4.3T, constant for 333B, then x
      7.3/22 for 167B.
    """
    o = config.optimizer
    if o.relative_step:
        return _relative_step(o.warmup_init)
    steps = decay_end(config)
    warm = min(warmup_steps(config), steps)
    return optax.join_schedules([_warmup(o, warm), _after_warmup(o, warm, steps)], [warm])


def length(config: Config) -> int:
    """Steps that the schedule spans, warmup and hold among them."""
    return config.optimizer.schedule_steps or config.train.steps


def decay_end(config: Config) -> int:
    """Updates before which the schedule has come to its last learning rate."""
    return max(length(config) - config.optimizer.hold_steps, 1)


def warmup_steps(config: Config) -> int:
    """Steps of the warmup; more than the schedule has are cut off there."""
    o = config.optimizer
    if not o.warmup_fraction:
        return o.warmup_steps
    # In floating point as transformers' get_warmup_steps: 0.07 of 100 steps are 8, and not 7.
    return math.ceil(length(config) * o.warmup_fraction)


def _warmup(o: OptimizerConfig, warm: int) -> optax.Schedule:
    peak = o.learning_rate
    first = peak * o.warmup_init_fraction
    if o.warmup_shape == "linear":
        return optax.linear_schedule(first, peak, max(warm, 1))

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        # DeepSpeed takes a warmup of one step for one of two: the logarithm of 1 divides.
        share = jnp.log(jnp.asarray(count, jnp.float32) + 1) / math.log(max(warm, 2))
        return first + (peak - first) * jnp.minimum(share, 1.0)

    return rate


def _after_warmup(o: OptimizerConfig, warm: int, steps: int) -> optax.Schedule:
    """Updates made since the warmup's end -> learning rate."""
    peak, rest = o.learning_rate, max(steps - warm, 1)
    if o.schedule == "constant":
        return optax.constant_schedule(peak)
    if o.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, rest, o.final_fraction)
    if o.schedule in ("linear", "polynomial"):
        return _polynomial(o, rest)
    if o.schedule == "cosine_with_restarts":
        return _restarts(o, rest)
    if o.schedule == "inverse_sqrt":
        return _inverse_sqrt(o, warm, rest)
    if o.schedule == "wsd":
        decay = min(max(round(steps * o.decay_fraction), 1), rest)
        return optax.join_schedules(
            [optax.constant_schedule(peak), _decay(o, decay)],
            [rest - decay],
        )
    return _published(o, warm, steps)


def _published(o: OptimizerConfig, warm: int, steps: int) -> optax.Schedule:
    peak = o.learning_rate

    def at(share: float) -> int:
        return max(round(share * steps) - warm, 1)  # boundaries count from the end of the warmup

    if o.schedule == "deepseek_v2":
        return optax.join_schedules(
            [optax.constant_schedule(peak * f) for f in (1, 0.316, 0.316**2)],
            [at(1 - o.decay_fraction), at(0.9)],
        )
    a, b, c = (at(t / V3_TOKENS) for t in (10.0, 14.3, 14.633))
    return optax.join_schedules(
        [
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, max(b - a, 1), 0.1),
            optax.constant_schedule(peak * 0.1),
            optax.constant_schedule(peak * 0.1 * 7.3 / 22),
        ],
        [a, b, c],
    )


def _decay(o: OptimizerConfig, steps: int) -> optax.Schedule:
    """Of wsd, from the peak to its end."""
    peak, end = o.learning_rate, o.learning_rate * o.final_fraction
    if o.decay_shape == "linear":
        return optax.linear_schedule(peak, end, steps)
    if o.decay_shape == "cosine":
        return optax.cosine_decay_schedule(peak, steps, o.final_fraction)

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        p = 1 - _left(count, steps)
        factor = 1 - jnp.sqrt(p) if o.decay_shape == "sqrt" else 2 * 0.5**p - 1
        return end + (peak - end) * factor

    return rate


def _left(count: jax.typing.ArrayLike, steps: int) -> jax.Array:
    """The share of the steps that is left, exactly 0 after the last: a quotient may round to just below 1."""
    left = steps - jnp.clip(jnp.asarray(count, jnp.int32), 0, steps)
    return left.astype(jnp.float32) / steps


def _polynomial(o: OptimizerConfig, steps: int) -> optax.Schedule:
    peak, end = o.learning_rate, o.learning_rate * o.final_fraction
    power = o.power if o.schedule == "polynomial" else 1.0

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        return end + (peak - end) * _left(count, steps) ** power

    return rate


def _restarts(o: OptimizerConfig, steps: int) -> optax.Schedule:
    peak, end = o.learning_rate, o.learning_rate * o.final_fraction

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        # In integers: a share that rounds to just below a whole cycle would give the last rate for the peak.
        count = jnp.asarray(count, jnp.int32)
        p = (count * o.cycles % steps).astype(jnp.float32) / steps
        wave = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * p))
        return jnp.where(count >= steps, end, wave)

    return rate


def _inverse_sqrt(o: OptimizerConfig, warm: int, steps: int) -> optax.Schedule:
    peak, timescale = o.learning_rate, o.timescale or warm or NO_TIMESCALE

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        since = jnp.clip(jnp.asarray(count, jnp.float32), 0, steps)
        return jnp.maximum(peak / jnp.sqrt(1 + since / timescale), peak * o.final_fraction)

    return rate


def _relative_step(warmup_init: bool) -> optax.Schedule:
    """Of transformers.optimization.Adafactor, whose first step is 1."""

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1
        return jnp.minimum(1e-6 * step if warmup_init else 1e-2, 1 / jnp.sqrt(step))

    return rate
