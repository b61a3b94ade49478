"""Rotary position embedding (Su et al. 2021) and its extensions to longer contexts. Shape letters: layers.py.

YaRN (Peng et al. 2023, arXiv:2309.00071), linear interpolation (Chen et al. 2023, arXiv:2306.15595)
and Llama 3.1's scaling (arXiv:2407.21783).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config.options import ModelConfig, RopeScaling
from deepseek_jax.model.layers import laid_out_as, reshaped, split_width


def yarn_temperature(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, m(mscale): 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """float64 [rope/2]: radians per position of every rotated pair, scaled as the options say."""
    width, scaling = config.rotary_dim, config.rope_scaling
    frequency = config.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling.type == "default":
        return frequency
    if scaling.type == "linear":
        return frequency / scaling.factor
    if scaling.type == "llama3":
        # How many wavelengths fit into the original context.
        wavelengths = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((wavelengths - low) / (high - low), 0, 1)
        return frequency * keep + frequency / scaling.factor * (1 - keep)

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that makes this many rotations over the original context."""
        length = scaling.original_max_position_embeddings
        return (
            width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), width - 1)
    # 0: keep the frequency, 1: divide it by the factor.
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency * (1 - ramp) + frequency / scaling.factor * ramp


def attention_factor(scaling: RopeScaling) -> float:
    """What cos and sin are scaled by: YaRN's attention temperature, 1 without YaRN."""
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        all_dim = yarn_temperature(scaling.factor, scaling.mscale_all_dim)
        return yarn_temperature(scaling.factor, scaling.mscale) / all_dim
    return yarn_temperature(scaling.factor, 1.0)


def rope_tables(config: ModelConfig, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, S, rope/2], of int32 positions [B, S]."""
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angle = positions_BS[..., None].astype(jnp.float32) * frequencies
    scale = attention_factor(config.rope_scaling)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def apply_rope(x_BSNR: jax.Array, cos: jax.Array, sin: jax.Array, interleave: bool) -> jax.Array:
    """Rotates pairs of the last axis: neighbours (2i, 2i+1) if `interleave`, else (i, i + half).

    Args:
      x_BSNR: any float dtype, in which the result is; computed in float32.
      cos: float32 [B, S, rope/2], as `sin`: from `rope_tables`.
      sin: likewise.
      interleave: which numbers are a pair.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    x32 = x_BSNR.astype(jnp.float32)
    if interleave:
        a = laid_out_as(x32[..., 0::2], x_BSNR)
        b = laid_out_as(x32[..., 1::2], x_BSNR)
        pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        out = reshaped(pairs, x_BSNR.shape, jax.typeof(x_BSNR).sharding.spec)
    else:
        a, b = split_width(x32, x32.shape[-1] // 2)
        out = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return out.astype(x_BSNR.dtype)
