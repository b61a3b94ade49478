"""How large a cache is, and which sizes are compiled for."""

from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.attention.kinds import attention_class


def describe(config: ModelConfig, layers: int, sequences: int, slots: int, itemsize: int) -> str:
    """ "576 numbers per token and layer, 27 layers, 12.3 MB for 2 x 512 tokens"."""
    shapes = attention_class(config).cache_shapes(config)
    numbers = sum(shape.numbers_per_token for shape in shapes)
    size = gb(numbers * layers * sequences * slots * itemsize)
    return f"{numbers} numbers per token and layer, {layers} layers, {size} for {sequences} x {slots} tokens"


def slots_for(tokens: int, longest: int) -> int:
    """Slots for sequences of up to so many tokens: 64, 128, 192, 256, 384, 512, ...

    So few programs are compiled.

    Never above `longest`, unless `tokens` is.
    """
    return min(bucket(tokens, 64), max(tokens, longest))


def bucket(n: int, least: int) -> int:
    """The smallest of least * 1, 2, 3, 4, 6, 8, 12, ... that is at least n."""
    if n <= least:
        return least
    power = least
    while 2 * power < n:
        power *= 2
    return power * 3 // 2 if n <= power * 3 // 2 and power > least else 2 * power
