"""The kernels of grouped_matmul.py in Pallas Triton, for GPUs that Mosaic's do not run on.

JAX 0.11 and 0.12 announce the end of this backend; tests/experts/test_grouped.py notices when it is gone.
Interpreted they run on any device. The first axis of a grid changes fastest: neighbours share rows, and an
expert's matrix stays in the second-level cache. Shape letters: grouped_matmul.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from deepseek_jax.experts.block_rows import BLOCK, Blocks
from deepseek_jax.experts.grouped_matmul import tile_of

TILE = 128  # of an outer width
STEP_BYTES = 128  # of an inner width, or of rows in a weight gradient, per turn
# 32 KiB a stage: three of them fit the least shared memory of GPUs from Ampere on, 99 KiB.
OPTIONS = {"num_warps": 8, "num_stages": 3}


def multiply(
    rows_JI: jax.Array,
    weight_GIO: jax.Array,
    blocks: Blocks,
    *,
    transpose: bool,
    like: jax.ShapeDtypeStruct,
    interpret: bool,
) -> jax.Array:
    """Each row times the matrix of its expert: `like`, undefined in blocks of nobody."""
    inner, outer = rows_JI.shape[1], like.shape[1]
    tile, step = tile_of(outer, TILE), _step(rows_JI, inner)
    kernel = functools.partial(_multiply_kernel, step=step, transpose=transpose)
    return pl.pallas_call(
        kernel,
        out_shape=like,
        grid=(outer // tile, len(blocks.expert_N)),
        in_specs=[
            _whole(blocks.expert_N),
            pl.BlockSpec((BLOCK, inner), lambda o, n: (n, 0)),
            _whole(weight_GIO),
        ],
        out_specs=pl.BlockSpec((BLOCK, tile), lambda o, n: (n, o)),
        name="grouped_matmul",
        **_options(interpret),
    )(blocks.expert_N, rows_JI, weight_GIO)


def _multiply_kernel(expert_N, rows, weight, out, *, step, transpose):
    column, expert = pl.program_id(0), expert_N[pl.program_id(1)]
    tile = out.shape[1]

    @pl.when(expert < weight.shape[0])
    def _():
        def add(i, total):
            inner, outer = pl.ds(i * step, step), pl.ds(column * tile, tile)
            matrix = weight[expert, outer, inner].T if transpose else weight[expert, inner, outer]
            return total + jnp.dot(rows[:, inner], matrix, preferred_element_type=jnp.float32)

        total = jnp.zeros(out.shape, jnp.float32)
        total = lax.fori_loop(0, rows.shape[1] // step, add, total)
        out[...] = total.astype(out.dtype)


def outer(
    rows_JI: jax.Array,
    rows_JO: jax.Array,
    blocks: Blocks,
    *,
    like: jax.ShapeDtypeStruct,
    interpret: bool,
) -> jax.Array:
    """Float32: of each expert the sum of its rows' outer products, 0 where it has none."""
    experts, inner, width = like.shape
    tiles = tile_of(inner, TILE), tile_of(width, TILE)
    return pl.pallas_call(
        functools.partial(_outer_kernel, step=_step(rows_JI, BLOCK)),
        out_shape=like,
        grid=(width // tiles[1], inner // tiles[0], experts),
        in_specs=[_whole(blocks.first_G1), _whole(rows_JI), _whole(rows_JO)],
        out_specs=pl.BlockSpec((1, *tiles), lambda o, i, g: (g, i, o)),
        name="grouped_outer_product",
        **_options(interpret),
    )(blocks.first_G1, rows_JI, rows_JO)


def _outer_kernel(first_G1, rows_JI, rows_JO, out, *, step):
    o, i, expert = (pl.program_id(axis) for axis in range(3))
    _, inner, width = out.shape

    def add(n, total):
        turn = pl.ds(n * step, step)
        left, right = rows_JI[turn, pl.ds(i * inner, inner)], rows_JO[turn, pl.ds(o * width, width)]
        return total + jnp.dot(left.T, right, preferred_element_type=jnp.float32)

    turns = BLOCK // step
    total = jnp.zeros((inner, width), jnp.float32)
    first, end = first_G1[expert] * turns, first_G1[expert + 1] * turns
    out[0] = lax.fori_loop(first, end, add, total)


def _step(rows: jax.Array, length: int) -> int:
    return tile_of(length, STEP_BYTES // rows.dtype.itemsize)


def _whole(a: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)


def _options(interpret: bool) -> dict[str, Any]:
    params = None if interpret else triton.CompilerParams(**OPTIONS)
    return {"compiler_params": params, "interpret": interpret}
