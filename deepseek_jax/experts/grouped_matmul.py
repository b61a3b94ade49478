"""Grouped matmuls of rows in blocks (block_rows.py) by kernels for NVIDIA GPUs: the one door to them.

One kernel for all experts per product: rows times matrices, rows times transposed matrices (the gradient of
rows), and the sum of an expert's outer products (the gradient of its matrix, in float32). Blocks of no expert
cost nothing.

    kernels     for                                                              numbers
    mosaic      Hopper GPUs, compute capability 9 (Pallas Mosaic GPU: wgmma)     bfloat16, float16, FP8
    triton      GPUs from Ampere on (Pallas Triton, which JAX is to remove)      float32 too
    reference   any device, plain JAX: what tests compare with; it copies a      any
                matrix for every block

Shape letters: block_rows.py; I inner and O outer width of any product.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.experts.block_rows import BLOCK, ArrivedRows, BlockRows, Blocks
from deepseek_jax.experts.swiglu import Products

MODULES = {
    "mosaic": "deepseek_jax.experts.grouped_mosaic",
    "triton": "deepseek_jax.experts.grouped_triton",
}
NAMES = (*MODULES, "reference")
# (inner, outer): widths are padded to multiples of these, the least of a kernel's tiles. Those of real models
# are multiples; the ranks of LoRA need not be.
LEAST_WIDTHS = {"mosaic": (64, 128), "triton": (16, 16)}
LEAST_WIDTH_IN_FP8 = 128  # inner and outer, of Mosaic's


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """A method of sorted_rows.py, and how rounds.py computes what arrived.

    Attributes:
      kernels: one of NAMES.
      interpret: kernels are interpreted, on any device.
    """

    kernels: str
    interpret: bool = False

    def products(self, rows: BlockRows | ArrivedRows) -> Products:
        """Those of these rows."""
        multiply = functools.partial(_multiply, self, rows.blocks)
        outer = functools.partial(_outer, self, rows.blocks)
        of_columns = (functools.partial(f, rows.blocks) for f in (_largest, _of_expert))
        return Products(multiply, outer, multiply, outer, *of_columns)


def _multiply(
    method: GroupedMatmul,
    blocks: Blocks,
    rows_JI: jax.Array,
    weight_GIO: jax.Array,
    transpose: bool = False,
    into: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """As swiglu.Products.multiply. A kernel writes while it reads, so that `into` is of no use."""
    if method.kernels == "reference":
        return _reference_multiply(rows_JI, weight_GIO, blocks, transpose)
    inner, outer = LEAST_WIDTHS[method.kernels]
    if dtype is not None:
        inner = outer = LEAST_WIDTH_IN_FP8
        weight_GIO, transpose = (weight_GIO if transpose else jnp.swapaxes(weight_GIO, 1, 2)), True
    width = weight_GIO.shape[1 if transpose else 2]
    rows_JI = _padded(rows_JI, 1, inner)
    units = (outer, inner) if transpose else (inner, outer)
    weight_GIO = _padded(weight_GIO, 1, *units)
    like = jax.ShapeDtypeStruct((len(rows_JI), _multiple(width, outer)), dtype or rows_JI.dtype)
    call = functools.partial(_module(method).multiply, transpose=transpose)
    out_JO = _call(call, method, like, rows_JI, weight_GIO, blocks)
    return out_JO[:, :width]


def _outer(
    method: GroupedMatmul, blocks: Blocks, rows_JI: jax.Array, rows_JO: jax.Array
) -> jax.Array:
    """As swiglu.Products.outer."""
    if method.kernels == "reference":
        return _reference_outer(rows_JI, rows_JO, blocks)
    inner, outer = LEAST_WIDTHS[method.kernels]
    if in_fp8 := rows_JI.dtype.itemsize == 1:
        inner = outer = LEAST_WIDTH_IN_FP8
    widths = rows_JI.shape[1], rows_JO.shape[1]
    rows_JI, rows_JO = _padded(rows_JI, 1, inner), _padded(rows_JO, 1, outer)
    sizes = (len(blocks.first_G1) - 1, rows_JI.shape[1], rows_JO.shape[1])
    like = jax.ShapeDtypeStruct(sizes, jnp.float32)
    if in_fp8:
        call, rows_JI, rows_JO = _module(method).outer_of_columns, rows_JI.T, rows_JO.T
    else:
        call = _module(method).outer
    out_GIO = _call(call, method, like, rows_JI, rows_JO, blocks)
    return out_GIO[:, : widths[0], : widths[1]]


def _largest(blocks: Blocks, rows_JI: jax.Array) -> jax.Array:
    """As swiglu.Products.largest."""
    of_blocks_NI = jnp.max(jnp.abs(rows_JI.reshape(-1, BLOCK, rows_JI.shape[1])), axis=1)
    zeros_GI = jnp.zeros_like(rows_JI, shape=(len(blocks.first_G1) - 1, rows_JI.shape[1]))
    return zeros_GI.at[blocks.expert_N].max(of_blocks_NI, mode="drop")


def _of_expert(blocks: Blocks, of_GI: jax.Array) -> jax.Array:
    """As swiglu.Products.of_expert."""
    of_NI = of_GI.at[blocks.expert_N].get(mode="clip")
    return jnp.repeat(of_NI, BLOCK, axis=0)


def _module(method: GroupedMatmul) -> Any:
    return importlib.import_module(MODULES[method.kernels])


def _call(kernel: Any, method: GroupedMatmul, like: jax.ShapeDtypeStruct, *args: Any) -> jax.Array:
    """A kernel's result, which varies over the mesh axes that any of its arguments varies over: inside
    `per_device` a kernel must be told."""
    leaves = jax.tree.leaves(args)
    axes: frozenset[str] = frozenset().union(*(_axes(a) for a in leaves))
    args = jax.tree.map(lambda a: _varying(a, axes), args)
    kind = next((jax.typeof(a).manual_axis_type for a in jax.tree.leaves(args)))
    like = jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=kind)
    return _varying(kernel(*args, like=like, interpret=method.interpret), axes)


def _axes(a: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(a).manual_axis_type.varying)


def _varying(a: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(a)))
    return lax.pcast(a, missing, to="varying") if missing else a


def _multiple(width: int, unit: int) -> int:
    return -(-width // unit) * unit


def _padded(a: jax.Array, *units: int) -> jax.Array:
    """With zeros up to a multiple of a unit along each axis."""
    more = [(0, _multiple(n, unit) - n) for n, unit in zip(a.shape, units, strict=True)]
    return jnp.pad(a, more) if any(n for _, n in more) else a


def tile_of(width: int, most: int) -> int:
    """The largest power of two up to `most` that divides a width."""
    return min(most, width & -width)


def _reference_multiply(rows_JI, weight_GIO, blocks, transpose):
    """Zeros where a block is nobody's."""
    experts = len(weight_GIO)
    mine = weight_GIO.at[blocks.expert_N].get(mode="clip")
    rows_NBI = rows_JI.reshape(-1, BLOCK, rows_JI.shape[1])
    out_NBO = jnp.einsum("nbi,noi->nbo" if transpose else "nbi,nio->nbo", rows_NBI, mine)
    out_NBO = jnp.where((blocks.expert_N < experts)[:, None, None], out_NBO, 0)
    return out_NBO.reshape(len(rows_JI), -1)


def _reference_outer(rows_JI, rows_JO, blocks):
    experts = len(blocks.first_G1) - 1
    is_of_NG = blocks.expert_N[:, None] == jnp.arange(experts)
    parts = (a.reshape(-1, BLOCK, a.shape[1]) for a in (rows_JI, rows_JO))
    return jnp.einsum(
        "nbi,nbo,ng->gio",
        *parts,
        is_of_NG.astype(rows_JI.dtype),
        preferred_element_type=jnp.float32,
    )
