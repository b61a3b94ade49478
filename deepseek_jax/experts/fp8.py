"""Products of experts in FP8, with a scale for each row and each column: `config.train.fp8=row`.

Every product of rows and matrices, and every sum of outer products, is of numbers of 8 bits: e4m3 (3 bits of
mantissa, up to 448) for rows and weights, e5m2 (2 bits, up to 57,344) for gradients. A scale belongs to all
terms of one sum, so that it stands before the sum and a matrix unit needs to know nothing of it:

    x W       a scale for each row of x, and for each column of W, expert by expert
    dy W^T    for each row of dy, and for each row of W
    x^T dy    for each column of x and of dy, over the rows of one expert

Scales are powers of two, as in DeepSeek-V3 where a tensor is needed by rows and by columns
(arXiv:2412.19437, 3.3.3). So a number is rounded alike whatever stands beside it, unless it is so small
(2^-14 of the largest in e4m3, 2^-30 in e5m2) that its last bits have no place. From that follows:

- the mesh, which decides which rows share a column's scale, changes nothing but those small numbers;
- what was rounded is not changed by rounding it again: tokens that travel in FP8 give the same products;
- scales multiply without rounding, in bfloat16 too. A device without FP8 gets the same numbers from products
  of rounded numbers in the compute dtype, slower than without FP8.

Sums are float32. Weights and gradients that leave are of the compute dtype, float32 for gradients of weights.

Shape letters: swiglu.py; W = D + 4 bytes of a row that travels.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.experts.swiglu import Products

FORWARD = jnp.float8_e4m3fn
GRADIENT = jnp.float8_e5m2
SCALE_BYTES = 4
LEAST, MOST = -126, 126  # exponents of scales: these and their inverses are normal numbers


class Scaled(NamedTuple):
    """Numbers in FP8."""

    values: jax.Array
    scale: (
        jax.Array
    )  # float32 powers of two; quantize: 1 wide along the axis whose numbers share one

    def numbers(self, dtype: Any) -> jax.Array:
        """As they were, but for the rounding; exact in any dtype of 8 bits of exponent."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(a: jax.Array, kind: Any, axis: int) -> Scaled:
    """Rounds to FP8.

    Args:
      a: in any float dtype.
      kind: FORWARD or GRADIENT.
      axis: along which numbers share a scale.
    """
    scale, inverse = scale_of(jnp.max(jnp.abs(a), axis=axis, keepdims=True), kind)
    return Scaled(_rounded(a, inverse, kind), scale)


def scale_of(largest: jax.Array, kind: Any) -> tuple[jax.Array, jax.Array]:
    """(scale, its inverse), float32: the least power of two with `largest` / scale in the range of `kind`.

    1 where `largest` is 0, and where it is no number, which the row then shows.
    """
    top_mantissa, top_exponent = math.frexp(float(jnp.finfo(kind).max))
    mantissa, exponent = jnp.frexp(largest.astype(jnp.float32))
    power = exponent - top_exponent + (mantissa > top_mantissa)
    usable = jnp.isfinite(largest) & (largest > 0)
    power = jnp.where(usable, jnp.clip(power, LEAST, MOST), 0)
    return _power_of_two(power), _power_of_two(-power)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def _rounded(a: jax.Array, inverse: jax.Array, kind: Any) -> jax.Array:
    return (a.astype(jnp.float32) * inverse).astype(kind)


@dataclasses.dataclass(frozen=True)
class Fp8:
    """How products become products in FP8; equal ones are one program.

    Attributes:
      native: the products take FP8. False: they take the same numbers in the compute dtype.
    """

    native: bool

    def products(self, raw: Products) -> Products:
        """In FP8, of the same rows. The narrow factors of LoRA stay in the compute dtype."""

        def multiply(rows_JI, weight_GIO, transpose=False, into=None):
            dtype = rows_JI.dtype
            rows = quantize(rows_JI, GRADIENT if transpose else FORWARD, 1)
            weight = quantize(weight_GIO, FORWARD, 2 if transpose else 1)
            if not self.native:
                numbers = rows.numbers(dtype), weight.numbers(dtype)
                return raw.multiply(*numbers, transpose=transpose, into=into)
            out_JO = raw.multiply(rows.values, weight.values, transpose=transpose, dtype=dtype)
            scale_GO = weight.scale.reshape(len(weight_GIO), -1).astype(dtype)
            return out_JO * rows.scale.astype(dtype) * raw.of_expert(scale_GO)

        def outer(rows_JI, rows_JO):
            left_JI, left_GI = by_columns(rows_JI, FORWARD)
            right_JO, right_GO = by_columns(rows_JO, GRADIENT)
            if not self.native:
                return raw.outer(left_JI, right_JO)
            out_GIO = raw.outer(left_JI, right_JO)
            return out_GIO * left_GI[:, :, None] * right_GO[:, None, :]

        def by_columns(rows_JI, kind):
            """What `raw.outer` takes, and the scales of the columns of each expert."""
            scale_GI, inverse_GI = scale_of(raw.largest(rows_JI), kind)
            values_JI = _rounded(rows_JI, raw.of_expert(inverse_GI), kind)
            if not self.native:
                values_JI = Scaled(values_JI, raw.of_expert(scale_GI)).numbers(rows_JI.dtype)
            return values_JI, scale_GI

        return raw._replace(multiply=multiply, outer=outer)


class Method(Protocol):
    """As sorted_rows.Method."""

    def products(self, rows: Any) -> Products:
        """Of rows."""


@dataclasses.dataclass(frozen=True)
class InFp8:
    """A method of sorted_rows.py with its products in FP8."""

    method: Method
    fp8: Fp8

    def products(self, rows: Any) -> Products:
        """Those of these rows."""
        return self.fp8.products(self.method.products(rows))


def encode(x_TD: jax.Array) -> jax.Array:
    """uint8 [T, W]: rows in e4m3 and the bytes of each one's scale, so that both travel at once."""
    values, scale = quantize(x_TD, FORWARD, 1)
    parts = [lax.bitcast_convert_type(a, jnp.uint8) for a in (values, scale)]
    return jnp.concatenate([parts[0], parts[1].reshape(-1, SCALE_BYTES)], axis=1)


def decode(bytes_JW: jax.Array, dtype: Any) -> jax.Array:
    """[J, D]: what `encode` made; zeros of rows of zero bytes."""
    values, scale = jnp.split(bytes_JW, [bytes_JW.shape[1] - SCALE_BYTES], axis=1)
    scale = lax.bitcast_convert_type(scale.reshape(-1, 1, SCALE_BYTES), jnp.float32)
    return Scaled(lax.bitcast_convert_type(values, FORWARD), scale).numbers(dtype)
