"""The kernels of grouped_matmul.py in Pallas Mosaic GPU, for Hopper GPUs.

A block of the grid lives on one multiprocessor and takes tile after tile. One of its three warpgroups brings
the tiles of both operands into shared memory, some steps ahead; the other two multiply them by wgmma, each
half of the columns, and write what they have summed up. Tiles come in the order of rows, all columns of a
block of rows before the next, so that neighbours share rows and an expert's matrix stays in the second-level
cache.

In FP8 both operands lie with the inner width last, as wgmma wants numbers of 8 bits, and the warpgroups
divide the rows of a tile: half of the registers hold the sums of one step, which wgmma keeps in fewer bits
than float32, and the other half, to which these are added, the whole.

Shape letters: grouped_matmul.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from deepseek_jax.experts.block_rows import BLOCK, Blocks
from deepseek_jax.experts.grouped_matmul import tile_of

MULTIPLIERS = 2  # warpgroups that multiply
WARPGROUP = "warpgroup"
MULTIPROCESSOR = "multiprocessor"
COLUMNS = 128  # most that a warpgroup multiplies: 128 x 128 sums are 128 registers of each thread
STEP = 64  # most of an inner width per step: 128 bytes, the widest swizzle
STAGES = 4  # steps in shared memory: 48 KiB each with the largest tiles
STAGES_FLOAT32 = 3  # where float32 results need some of that memory
PART = 64  # rows and columns of the results that are on their way at once
MEMORY_REGISTERS = 40  # of the warpgroup that only copies
DEFAULT_PROCESSORS = 132  # of an H100 SXM, an H200


class Tile(NamedTuple):
    """The sizes of a product's tiles."""

    rows: int  # of a warpgroup
    columns: int  # of a warpgroup
    step: int  # of the inner width at a time
    in_fp8: bool = False  # the warpgroups divide the rows; else the columns

    @property
    def height(self) -> int:
        return self.rows * (MULTIPLIERS if self.in_fp8 else 1)

    @property
    def width(self) -> int:
        return self.columns * (1 if self.in_fp8 else MULTIPLIERS)


def multiply(
    rows_JI: jax.Array,
    weight_GIO: jax.Array,
    blocks: Blocks,
    *,
    transpose: bool,
    like: jax.ShapeDtypeStruct,
    interpret: bool,
) -> jax.Array:
    """Each row times the matrix of its expert: `like`, undefined in blocks of nobody. FP8: `transpose`."""
    inner, width = rows_JI.shape[1], like.shape[1]
    tile = Tile(BLOCK, _columns(width), tile_of(inner, STEP))
    if in_fp8 := rows_JI.dtype.itemsize == 1:
        assert transpose
        tile = Tile(BLOCK // MULTIPLIERS, COLUMNS, tile_of(inner, 2 * STEP), True)
    steps = inner // tile.step

    def kernel(expert_N, first_G1, rows, weight, out):
        def specs(block, column):
            left = _spec((BLOCK, tile.step), lambda i: (block, i), rows)
            if transpose:
                return left, _spec((tile.width, tile.step), lambda i: (column, i), rows)
            right = _spec((tile.step, tile.width), lambda i: (i, column), rows, tile.columns)
            return left, right

        def each_tile(run):
            filled = first_G1[weight.shape[0]]

            @mosaic.nd_loop((filled, width // tile.width), collective_axes=MULTIPROCESSOR)
            def _(info):
                block, column = info.index
                there = out.at[_part(block, BLOCK), _part(column, tile.width)]
                run(steps, specs(block, column), (rows, weight.at[expert_N[block]]), there)

        def add(total, left, right, mine):
            if in_fp8:
                mosaic.wgmma(total, left.at[mine, :], right.transpose((1, 0)))
                return
            matrix = right.at[mine, :].transpose((1, 0)) if transpose else right.at[:, mine]
            mosaic.wgmma(total, left, matrix)

        example = (steps, specs(0, 0), (rows, weight.at[0]))
        _tiles(tile, out, add, each_tile, example)

    args = (blocks.expert_N, blocks.first_G1, rows_JI, weight_GIO)
    return _kernel(kernel, "grouped_matmul", like, interpret)(*args)


def outer_of_columns(
    rows_IJ: jax.Array,
    rows_OJ: jax.Array,
    blocks: Blocks,
    *,
    like: jax.ShapeDtypeStruct,
    interpret: bool,
) -> jax.Array:
    """As `outer`, in FP8, of rows that lie as columns."""
    experts, inner, width = like.shape
    tile = Tile(BLOCK // MULTIPLIERS, COLUMNS, BLOCK, True)

    def kernel(first_G1, rows_IJ, rows_OJ, out):
        def specs(first, i, o):
            left = _spec((tile.height, tile.step), lambda n: (i, first + n), rows_IJ)
            return left, _spec((tile.width, tile.step), lambda n: (o, first + n), rows_OJ)

        def each_tile(run):
            grid = (experts, inner // tile.height, width // tile.width)

            @mosaic.nd_loop(grid, collective_axes=MULTIPROCESSOR)
            def _(info):
                expert, i, o = info.index
                first, end = first_G1[expert], first_G1[expert + 1]
                there = out.at[expert, _part(i, tile.height), _part(o, tile.width)]
                run(end - first, specs(first, i, o), (rows_IJ, rows_OJ), there)

        def add(total, left, right, mine):
            mosaic.wgmma(total, left.at[mine, :], right.transpose((1, 0)))

        example = (jnp.int32(1), specs(0, 0, 0), (rows_IJ, rows_OJ))
        _tiles(tile, out, add, each_tile, example)

    args = (blocks.first_G1, rows_IJ, rows_OJ)
    return _kernel(kernel, "grouped_outer_product", like, interpret)(*args)


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
    tile = Tile(tile_of(inner, BLOCK), _columns(width), STEP)
    turns = BLOCK // STEP

    def kernel(first_G1, rows_JI, rows_JO, out):
        def specs(first, i, o):
            left = _spec((STEP, tile.rows), lambda n: (first + n, i), rows_JI)
            return left, _spec((STEP, tile.width), lambda n: (first + n, o), rows_JO, tile.columns)

        def each_tile(run):
            grid = (experts, inner // tile.rows, width // tile.width)

            @mosaic.nd_loop(grid, collective_axes=MULTIPROCESSOR)
            def _(info):
                expert, i, o = info.index
                first, end = first_G1[expert] * turns, first_G1[expert + 1] * turns
                there = out.at[expert, _part(i, tile.rows), _part(o, tile.width)]
                run(end - first, specs(first, i, o), (rows_JI, rows_JO), there)

        def add(total, left, right, mine):
            mosaic.wgmma(total, left.transpose((1, 0)), right.at[:, mine])

        example = (jnp.int32(1), specs(0, 0, 0), (rows_JI, rows_JO))
        _tiles(tile, out, add, each_tile, example)

    args = (blocks.first_G1, rows_JI, rows_JO)
    return _kernel(kernel, "grouped_outer_product", like, interpret)(*args)


def _tiles(
    tile: Tile,
    out: Any,
    add: Callable[..., None],
    each_tile: Callable[[Callable[..., None]], None],
    example: tuple[Any, Any, Any],
) -> None:
    """One block of the grid: its tiles, one after the other.

    Args:
      tile: sizes.
      out: the whole result.
      add: (sums, left, right, columns of right, in FP8 rows of left): adds one step's product.
      each_tile: calls a function for each tile of this block, with the number of steps, how both operands
        come into shared memory, the operands, and the tile's part of the result.
      example: the first three of these, for what is allocated.
    """
    stages = STAGES_FLOAT32 if out.dtype == jnp.float32 else STAGES
    part = min(PART, tile.rows), min(PART, tile.columns)
    slots = min(2, tile.rows * tile.columns // (part[0] * part[1]))

    def pipeline(steps, specs, body, context):
        return mosaic.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            in_specs=specs,
            memory_registers=MEMORY_REGISTERS,
            max_concurrent_steps=stages,
            num_compute_wgs=MULTIPLIERS,
            wg_axis=WARPGROUP,
            compute_context=context,
        )

    def nothing(*_, **__):
        """What is computed has no influence on what is allocated."""

    steps, specs, operands = example
    allocations = pipeline(steps, specs, nothing, nothing).get_allocations(*operands)
    transforms = _transforms(part[1], out.dtype)
    results = mosaic.SMEM((MULTIPLIERS, slots, *part), out.dtype, transforms=transforms)

    @functools.partial(
        pl.run_scoped, allocations=allocations, results=results, collective_axes=WARPGROUP
    )
    def _(allocations, results):
        me = lax.axis_index(WARPGROUP)
        mine = _part(me, tile.rows if tile.in_fp8 else tile.columns)
        size = tile.rows, tile.columns

        def run(steps, specs, operands, there):
            there = there.at[mine, :] if tile.in_fp8 else there.at[:, mine]

            def write(sums):
                _write(sums.astype(out.dtype), results, there, part, me)

            def context(run_pipeline):
                if tile.in_fp8:
                    write(run_pipeline(jnp.zeros(size, jnp.float32)))
                    return

                @functools.partial(pl.run_scoped, total=mosaic.ACC(size, jnp.float32))
                def _(total):
                    run_pipeline(total)
                    write(total[...])

            def step(_, left, right, total):
                if tile.in_fp8:
                    return total + of_step(left, right)
                add(total, left, right, mine)
                mosaic.wgmma_wait(0)
                return total

            def of_step(left, right):
                @functools.partial(pl.run_scoped, sums=mosaic.ACC(size, jnp.float32))
                def found(sums):
                    add(sums, left, right, mine)
                    return sums[...]

                return found

            pipeline(steps, specs, step, context)(*operands, allocations=allocations)

        each_tile(run)

    mosaic.wait_smem_to_gmem(0, wait_read_only=True)


def _write(sums: jax.Array, results: Any, out: Any, part: tuple[int, int], me: jax.Array) -> None:
    """A warpgroup's sums, part by part: one is on its way while the next is put into shared memory."""
    slots = results.shape[1]
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
    number = 0
    for row in range(0, sums.shape[0], part[0]):
        for column in range(0, sums.shape[1], part[1]):
            slot = number % slots
            mosaic.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            results[me, slot] = sums[row : row + part[0], column : column + part[1]]
            mosaic.commit_smem()
            there = out.at[pl.ds(row, part[0]), pl.ds(column, part[1])]
            mosaic.copy_smem_to_gmem(results.at[me, slot], there)
            number += 1


def _kernel(body: Callable, name: str, like: jax.ShapeDtypeStruct, interpret: bool) -> Callable:
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = mosaic.InterpretGPUParams()
    return mosaic.kernel(
        body,
        out_type=like,
        grid=(_processors(interpret),),
        grid_names=(MULTIPROCESSOR,),
        num_threads=MULTIPLIERS + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=mosaic.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
        **options,
    )


def _processors(interpret: bool) -> int:
    """Multiprocessors of the GPUs of the current mesh, which need not be here; else of this process's."""
    if interpret:
        return 2
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    for name in ("num_cores", "core_count"):
        if found := getattr(device, name, None):
            return int(found)
    return DEFAULT_PROCESSORS


def _columns(width: int) -> int:
    """Of a tile and a warpgroup."""
    return tile_of(width // MULTIPLIERS, COLUMNS)


def _part(index: Any, size: int) -> Any:
    return pl.ds(index * size, size)


def _spec(shape: tuple[int, int], index: Callable, operand: Any, unit: int = 0) -> Any:
    """How tiles come into shared memory. `unit`: columns that a warpgroup reads; 0: all of them."""
    transforms = _transforms(unit or shape[1], operand.dtype)
    return mosaic.BlockSpec(shape, index, transforms=transforms, memory_space=mosaic.SMEM)


def _transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile lies in shared memory, so that wgmma reads it without conflicts."""
    bytes_of_one = jnp.dtype(dtype).itemsize
    swizzle = mosaic.find_swizzle(width * bytes_of_one * 8)
    return (
        mosaic.TilingTransform((8, swizzle // bytes_of_one)),
        mosaic.SwizzleTransform(swizzle),
    )
