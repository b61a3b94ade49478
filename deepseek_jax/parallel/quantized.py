"""Weights held in 8 or 4 bits, which nothing trains: the value of a variable in place of an array.

They are divided over the mesh as the weight would be, travel as they are held, and become numbers of the
compute dtype where they are used (weights.py). A weight is a matrix [I, O] or one for each expert, [E, I, O]
or [E, I, 2, O]; stacked layers have an axis before. Scales belong to outputs, so that a scale never stands
between two terms of one sum in int8, and blocks of nf4 lie along the inputs, as bitsandbytes has them.

    int8   round(w / s), s the largest |w| of an output divided by 127: the error is at most s / 2
    nf4    of the 16 numbers of NF4 (QLoRA, arXiv:2305.14314, appendix E) the nearest to w / a, a the largest
           |w| of 64 inputs of an output; a itself in 8 bits ("double quantisation"): what it has above or
           below the mean of its output, linear. bitsandbytes' 8 bits are logarithmic, finer next to the mean
           and twice as coarse at the ends. 4.1 bits for each number.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64
# The quantiles of a normal distribution that NF4 has, by the paper's table.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
STACKED = ("layers", "experts")  # logical axes before those of a matrix
Axes = tuple[str | None, ...]


class QuantizedWeight(abc.ABC):
    """What both kinds have in common: `parts`, arrays of which the first says the kind by its dtype."""

    @property
    def parts(self) -> list[Any]:
        """The arrays, in the order of the fields."""
        return jax.tree.leaves(self, is_leaf=lambda a: a is not self)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.shape)

    @staticmethod
    @abc.abstractmethod
    def axes(axes: Axes) -> list[Axes]:
        """The logical axes of the parts, from the weight's."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight(QuantizedWeight):
    """8 bits, symmetric, a scale for each output."""

    values: jax.Array  # int8, of the weight's shape
    scale: jax.Array  # float32, with one input

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @staticmethod
    def axes(axes: Axes) -> list[Axes]:
        return [axes, _without_inputs(axes)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Weight(QuantizedWeight):
    """4 bits in blocks of 64 inputs."""

    codes: (
        jax.Array
    )  # uint8 [..., I / 64, 32, ...]: input j of a block in the high bits, j + 32 in the low
    largest: jax.Array  # int8 [..., I / 64, ...]: of each block, from `mean` on in steps of `step`
    step: jax.Array  # float32, with one input
    mean: jax.Array  # float32, with one input
    # The axis of the inputs, counted from the end: stacks of layers have one more at the front.
    inputs: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.largest.shape)
        shape[self.inputs] *= BLOCK
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.largest.ndim

    @staticmethod
    def axes(axes: Axes) -> list[Axes]:
        i = inputs_of(axes)
        blocked = _at(axes, i, axes[i], None)
        return [blocked, axes, _without_inputs(axes), _without_inputs(axes)]


KINDS = {"int8": Int8Weight, "nf4": Nf4Weight}


def inputs_of(axes: Axes) -> int:
    """The axis of the inputs, counted from the end, by the logical axes of a weight."""
    return next(i for i, name in enumerate(axes) if name not in STACKED) - len(axes)


def _without_inputs(axes: Axes) -> Axes:
    return _at(axes, inputs_of(axes), None)


def _at(sizes: tuple, i: int, *new: Any) -> tuple:
    """A tuple with others in place of element i, which is counted from the end."""
    i += len(sizes)
    return (*sizes[:i], *new, *sizes[i + 1 :])


def abstract(kind: str, weight: Any, axes: Axes) -> QuantizedWeight:
    """Shapes of a weight, held so.

    Args:
      kind: int8 or nf4.
      weight: the shape of the weight, stacked or not.
      axes: its logical axes.
    """
    return jax.eval_shape(lambda w: quantize(kind, w, inputs_of(axes)), weight)


def quantize(kind: str, w: jax.Array, inputs: int) -> QuantizedWeight:
    """A weight, stacked or not, in few bits. It is whole along its inputs.

    Args:
      kind: int8 or nf4.
      w: in any float dtype.
      inputs: the axis of the inputs, counted from the end.
    """
    w = w.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(w), axis=inputs, keepdims=True) / 127
        values = jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        return Int8Weight(values, scale)
    blocks = w.reshape(_at(w.shape, inputs, w.shape[inputs] // BLOCK, BLOCK))
    exact = jnp.max(jnp.abs(blocks), axis=inputs)
    mean = jnp.mean(exact, axis=inputs, keepdims=True)
    step = jnp.max(jnp.abs(exact - mean), axis=inputs, keepdims=True) / 127
    largest = jnp.round((exact - mean) / jnp.where(step > 0, step, 1)).astype(jnp.int8)
    # The nearest of NF4 to what the block's own maximum makes of a number, as bitsandbytes chooses it.
    share = blocks / jnp.expand_dims(jnp.where(exact > 0, exact, 1), inputs)
    code = jnp.zeros_like(share, jnp.uint8)
    for low, high in zip(NF4, NF4[1:], strict=False):
        code += (share > (low + high) / 2).astype(jnp.uint8)
    first, second = jnp.split(code, 2, axis=inputs)
    return Nf4Weight(first << 4 | second, largest, step, mean, inputs)


def dequantized(parts: Sequence[jax.Array], dtype: Any, spec: Any = None) -> jax.Array:
    """The weight of one layer in `dtype`, from `QuantizedWeight.parts` as every device has them.

    Args:
      parts: of a matrix, or of experts.
      dtype: rounded to it once, from float32.
      spec: the PartitionSpec of the weight; None inside `per_device`.
    """
    if parts[0].dtype == jnp.int8:
        values, scale = parts
        return (values.astype(jnp.float32) * scale).astype(dtype)
    codes, largest, step, mean = parts
    inputs = (
        -3 if largest.ndim == 4 else -2
    )  # gate and up together, [E, I, 2, O], or [I, O], [E, I, O]
    scale = jnp.expand_dims(largest.astype(jnp.float32) * step + mean, inputs)
    halves = [
        (_number_of(code, spec is not None) * scale).astype(dtype)
        for code in (codes >> 4, codes & 15)
    ]
    blocks = jnp.concatenate(halves, axis=inputs)
    shape = _at(largest.shape, inputs, largest.shape[inputs] * BLOCK)
    return (
        blocks.reshape(shape) if spec is None else jax.lax.reshape(blocks, shape, out_sharding=spec)
    )


def _number_of(code: jax.Array, divided: bool) -> jax.Array:
    """float32: NF4 at codes from 0 to 15. Read from a table: choices by the bits are fifteen operations, of
    which XLA's GPU compiler kept sixteen results at once in a layer of experts.

    Args:
      code: uint8.
      divided: it lies over a mesh of explicit axes, as its type says.
    """
    table = jnp.asarray(NF4, jnp.float32).at[code]
    if not divided:
        return table.get(mode="promise_in_bounds")
    spec = jax.typeof(code).sharding.spec
    return table.get(mode="promise_in_bounds", out_sharding=spec)


def is_quantized(parts: Sequence[Any]) -> bool:
    """Whether arrays are the parts of such a weight."""
    return parts[0].dtype in (jnp.int8, jnp.uint8)
