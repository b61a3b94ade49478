"""The cache: what attention keeps of every token and layer.

MLA keeps the normed latent and the rotated key that all heads share, [B, C, kv_lora_rank + qk_rope_head_dim]; grouped-query attention keys
and values, [B, M, C, H] each. A token's slot is its position in its own row, so that rows of any length lie side by side; what lies beyond
a row's last position is never seen. Shape letters: model/layers.py; C slots, M heads of keys and values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.parallel.mesh import BATCH_AXES, per_device

Layer = tuple[jax.Array, ...]  # of one layer: (latents,) or (keys, values)


class Shape(NamedTuple):
    """One array of a layer's cache."""

    heads: int | None  # None: shared by all heads
    width: int

    def sizes(self, rows: int, slots: int) -> tuple[int, ...]:
        return (
            (rows, slots, self.width)
            if self.heads is None
            else (rows, self.heads, slots, self.width)
        )

    @property
    def spec(self) -> P:
        """Over the batch axes, and over tensor where heads have their own."""
        return (
            P(BATCH_AXES, None, None) if self.heads is None else P(BATCH_AXES, "tensor", None, None)
        )


def shapes(model: ModelConfig) -> tuple[Shape, ...]:
    """The arrays of one layer."""
    if model.num_key_value_heads is None:
        return (Shape(None, model.kv_lora_rank + model.qk_rope_head_dim),)
    return (Shape(model.num_key_value_heads, model.qk_head_dim),) * 2


def numbers_a_token(model: ModelConfig) -> int:
    """Numbers that a layer keeps of a token."""
    return sum((s.heads or 1) * s.width for s in shapes(model))


def describe(model: ModelConfig, layers: int, rows: int, slots: int, itemsize: int) -> str:
    """ "576 numbers a token and layer, 27 layers, 12.3 MB for 2 x 512 tokens"."""
    numbers = numbers_a_token(model)
    size = numbers * layers * rows * slots * itemsize
    return f"{numbers} numbers a token and layer, {layers} layers, {gb(size)} for {rows} x {slots} tokens"


def slots_for(tokens: int, longest: int) -> int:
    """Slots for rows of up to so many tokens: 64, 128, 192, 256, 384, 512, ... so that few programs are compiled; never above `longest`
    more than `tokens` is."""
    return min(bucket(tokens, 64), max(tokens, longest))


def bucket(n: int, least: int) -> int:
    """The next of least * 1, 2, 3, 4, 6, 8, 12, ..."""
    size = least
    while size < n:
        size = (
            size * 3 // 2
            if size & (size - 1) == 0 and size > least
            else size * 4 // 3
            if size > least
            else size * 2
        )
    return size


def fresh(new: jax.Array, slots: int) -> jax.Array:
    """A cache that begins with [B, (M,) S, W] of positions 0 to S - 1."""
    s = new.shape[-2]
    if s >= slots:
        return lax.slice_in_dim(new, 0, slots, axis=new.ndim - 2)
    return lax.pad(
        new, jnp.zeros((), new.dtype), [(0, 0, 0)] * (new.ndim - 2) + [(0, slots - s, 0), (0, 0, 0)]
    )


def write(cache: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
    """On one device: puts [B, (M,) S, W] into slots start_B[b] to start_B[b] + S - 1 of row b, which must be there."""
    if cache.shape[0] == 1:
        # As a scatter of two rows at least: a dynamic_update_slice, or a scatter that is one, XLA on CPUs fuses with every use, and copies the
        # cache for each.
        slots = start_B[0] + jnp.arange(new.shape[-2], dtype=jnp.int32)
        if len(slots) == 1:
            slots, new = jnp.concatenate([slots] * 2), jnp.concatenate([new] * 2, axis=-2)
        put = lambda c, n: c.at[slots].set(n, mode="promise_in_bounds")
        return (put if cache.ndim == 3 else jax.vmap(put))(cache[0], new[0])[None]
    zeros = (0,) * (cache.ndim - 3)
    return jax.vmap(lambda c, n, start: lax.dynamic_update_slice(c, n, (*zeros, start, 0)))(
        cache, new, start_B
    )


def pick(a_BS: jax.Array, at_B: jax.Array) -> jax.Array:
    """[B, 1, ...]: one place of every row of [B, S, ...]."""
    at = lambda a, i: jnp.take_along_axis(a, i.reshape(-1, *[1] * (a.ndim - 1)), axis=1)
    return per_device(at, (P(BATCH_AXES), P(BATCH_AXES)), P(BATCH_AXES))(a_BS, at_B)
