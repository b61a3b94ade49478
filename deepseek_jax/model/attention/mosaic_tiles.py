"""What the kernels of fused_mosaic.py have in common: tiles in shared memory, their products, their masks.

A tile's rows lie in shared memory as parts of WIDTH columns, one after the other: results, which may be
narrower than what was read, take its place part by part. Shape letters: fused.py; R = 64 rows, C columns
of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from deepseek_jax.model.attention.visible_blocks import Range

MULTIPLIERS = 2  # warpgroups that multiply
WARPGROUP = "warpgroup"
GRID = ("sequence", "head", "tile")  # the last changes fastest: neighbours share a head
ROWS = 64  # of a warpgroup
TILE = MULTIPLIERS * ROWS
WIDTH = 64  # columns of a part: 128 bytes, the widest swizzle
MEMORY_REGISTERS = 40  # of the warpgroup that only copies


def masked(
    score: jax.Array, range_: Range, step: jax.Array, ids: Any, others: Any, are_rows_queries: bool
) -> jax.Array:
    """Scores, -inf where a query does not see a key.

    Args:
      score: float32 [R, C].
      range_: of the tile.
      step: number of the block in it.
      ids: [2, R] in shared memory: positions and segments of rows.
      others: [2, C]: of columns.
      are_rows_queries: else columns are.
    """

    def masked(score):
        position, other = down(ids[0], score), along(others[0], score)
        is_before = other <= position if are_rows_queries else position <= other
        is_same = down(ids[1], score) == along(others[1], score)
        return jnp.where(is_before & is_same, score, -jnp.inf)

    block = range_.first + step
    is_whole = (block >= range_.whole_first) & (block < range_.whole_end)
    return lax.cond(is_whole, lambda score: score, masked, score)


def rows_by_rows(rows: Any, block: Any, parts: int) -> jax.Array:
    """float32 [R, C]: rows, in parts of their columns, by the rows of a block."""

    def multiply(total):
        for i in range(parts):
            right = block.at[:, pl.ds(i * WIDTH, WIDTH)].transpose((1, 0))
            mosaic.wgmma(total, rows.at[i], right)
        return total[...]

    return pl.run_scoped(multiply, mosaic.ACC((ROWS, block.shape[0]), jnp.float32))


def add(total: Any, left: jax.Array, right: Any, staging: Any, me: jax.Array) -> None:
    """Starts the product of registers and a block. The interpreter multiplies shared memory only."""
    if staging is not None:
        staging[me] = left
        mosaic.wgmma(total, staging.at[me], right)
    else:
        mosaic.wgmma(total, left, right)


def down(a_R: jax.Array, like_RC: jax.Array) -> jax.Array:
    """A number a row."""
    return lax.broadcast_in_dim(a_R, like_RC.shape, [0])


def along(a_C: jax.Array, like_RC: jax.Array) -> jax.Array:
    """A number a column."""
    return lax.broadcast_in_dim(a_C, like_RC.shape, [1])


def range_of(ranges: Any) -> Range:
    return Range(*(ranges[i] for i in range(len(Range._fields))))


def pairs(whole: Any, other: Any, parts: int) -> list[tuple[Any, Any]]:
    """(from, to): [R, width] in the GPU's memory, and the same as [parts, R, WIDTH] in shared memory."""
    columns = [pl.ds(i * WIDTH, WIDTH) for i in range(parts)]
    if len(whole.shape) == 3:
        return [(whole.at[i], other.at[:, part]) for i, part in enumerate(columns)]
    return [(whole.at[:, part], other.at[i]) for i, part in enumerate(columns)]


def bring(come: list[tuple[Any, Any]], arrived: Any) -> None:
    for there, here in come:
        mosaic.copy_gmem_to_smem(there, here, arrived)
    mosaic.barrier_wait(arrived)


def put(value: jax.Array, here: Any, parts: int) -> None:
    """Results in place of what was read. All products that read it have been waited for."""
    for i in range(parts):
        here[i] = value[:, i * WIDTH : (i + 1) * WIDTH].astype(here.dtype)


def tile_of_parts(parts: int, dtype: Any) -> Any:
    shape = (MULTIPLIERS, parts, ROWS, WIDTH)
    return mosaic.SMEM(shape, dtype, transforms=_transforms(dtype))


def block(shape: tuple[int | None, ...], index: Callable, dtype: Any) -> Any:
    return mosaic.BlockSpec(shape, index, transforms=_transforms(dtype))


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """How rows of WIDTH columns lie in shared memory, so that wgmma reads them without conflicts."""
    swizzle = WIDTH * jnp.dtype(dtype).itemsize
    return mosaic.TilingTransform((8, WIDTH)), mosaic.SwizzleTransform(swizzle)


def pipeline(
    step: Callable, context: Callable, grid: tuple[Any, ...], specs: list[Any], stages: int
) -> Callable[..., None]:
    return mosaic.emit_pipeline_warp_specialized(
        step,
        grid=grid,
        in_specs=specs,
        memory_registers=MEMORY_REGISTERS,
        max_concurrent_steps=stages,
        num_compute_wgs=MULTIPLIERS,
        wg_axis=WARPGROUP,
        manual_consumed_barriers=True,
        compute_context=context,
    )


def kernel_of(
    body: Callable,
    name: str,
    like: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    scratch: list[Any],
    columns: int,
    dtype: Any,
    interpret: bool,
) -> Callable:
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = mosaic.InterpretGPUParams()
        scratch = [*scratch, mosaic.SMEM((MULTIPLIERS, ROWS, columns), dtype)]
    else:
        body = functools.partial(body, staging=None)
    return mosaic.kernel(
        body,
        out_type=like,
        grid=grid,
        grid_names=GRID,
        num_threads=MULTIPLIERS + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        scratch_types=scratch,
        compiler_params=mosaic.CompilerParams(
            approx_math=True, lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
        **options,
    )
