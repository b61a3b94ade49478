"""The sum of gradients over replicas in few bytes, with error feedback:
`config.sharding.gradient_compression`.

Replicas along `data` lie furthest apart (parallel/mesh.py), and what they exchange is the gradients' sum,
once a step. Each replica adds to its gradient what earlier steps left over of it, and sends it in bfloat16,
or in int8 with a scale for every block of BLOCK numbers, in two phases: an all-to-all that gives each replica
a chunk of everyone's gradient, whose sum it makes in float32; and an all-gather of the sums. So int8 is what
travels, and nothing overflows. What rounding took away stays in the residual of the device that rounded, in
the first phase and in the second: the sum of all updates so far and of all residuals is the sum of all
gradients. (Two phases with feedback at both: 1-bit Adam, Tang et al. 2021, arXiv:2102.02888. All-to-all of
block-quantised gradients: qgZ of ZeRO++, Wang et al. 2023, arXiv:2306.10209. That feedback converges:
Karimireddy et al. 2019, arXiv:1901.09847.)

The residual is float32: in bfloat16 every step would lose some of what it is there to keep.

Shape letters: R replicas, C numbers of a chunk, which is one replica's to sum; W numbers of a chunk as it
travels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.weights import REPLICAS

BLOCK = 256  # numbers that share an int8 scale, a float32: 1.6% more bytes


def residual(
    config: Config, params: nnx.State, grad_specs: nnx.State, replicas: int
) -> tuple[Any, Any]:
    """(shapes, PartitionSpecs) of the residual of every parameter, laid out like each replica's gradient;
    (None, None) without compression.
    """
    if config.sharding.gradient_compression == "none":
        return None, None

    def shape(w: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((replicas, *w.shape), jnp.float32)

    return jax.tree.map(shape, params), jax.tree.map(
        lambda s: P(REPLICAS, *s), grad_specs, is_leaf=lambda s: isinstance(s, P)
    )


def summed(method: str, gradients: Any, residuals: Any) -> tuple[Any, Any]:
    """The sum over replicas, compressed.

    Args:
      method: bfloat16 | int8.
      gradients: float32 arrays [R, ...], divided over `data` along R. residuals: the same, of the step
        before.

    Returns:
      (sums [...], the same on every replica, in the layout that the gradients have inside a replica;
      residuals). Neither is finite where a gradient is not.
    """
    leaves, tree = jax.tree.flatten(gradients)
    specs = [jax.typeof(g).sharding.spec for g in leaves]
    n = len(leaves)

    def one_device(*arrays):
        pairs = [
            sum_of_replicas(method, g[0], e[0]) for g, e in zip(arrays[:n], arrays[n:], strict=True)
        ]
        return [g for g, _ in pairs], [e[None] for _, e in pairs]

    reduce = per_device(one_device, (*specs, *specs), ([P(*s[1:]) for s in specs], specs))
    sums, rest = reduce(*leaves, *jax.tree.leaves(residuals))
    return jax.tree.unflatten(tree, sums), jax.tree.unflatten(tree, rest)


def sum_of_replicas(
    method: str, gradient: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One device's part of `summed`, of one array. Returns (sum, new residual)."""
    replicas, size = lax.axis_size(REPLICAS), gradient.size
    block, encode, decode = CODECS[method]
    block = min(block, -(-size // replicas))
    chunk = -(-size // (replicas * block)) * block
    wanted_RC = jnp.pad((gradient + residual).reshape(-1), (0, replicas * chunk - size)).reshape(
        replicas, chunk
    )

    sent_RW = encode(wanted_RC, block)
    received_RW = lax.all_to_all(sent_RW, REPLICAS, split_axis=0, concat_axis=0, tiled=True)
    sum_1C = jnp.sum(decode(received_RW, block), axis=0, keepdims=True)
    sum_1W = encode(sum_1C, block)
    sums_RC = decode(lax.all_gather(sum_1W, REPLICAS, axis=0, tiled=True, to="invarying"), block)

    mine = jnp.arange(replicas)[:, None] == lax.axis_index(REPLICAS)
    left_RC = (
        wanted_RC - decode(sent_RW, block) + jnp.where(mine, sum_1C - decode(sum_1W, block), 0.0)
    )

    def unpadded(a_RC: jax.Array) -> jax.Array:
        return a_RC.reshape(-1)[:size].reshape(gradient.shape)

    return unpadded(sums_RC), unpadded(left_RC)


def _to_int8(x_RC: jax.Array, block: int) -> jax.Array:
    """int8 [R, W]: all numbers, then the bytes of the blocks' scales, so that both travel at once."""
    blocks = x_RC.reshape(x_RC.shape[0], -1, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    whole = jnp.round(jnp.where(scale > 0, blocks / scale, 0.0)).astype(
        jnp.int8
    )  # a scale that is not a number spoils its block in decoding
    return jnp.concatenate(
        [a.reshape(x_RC.shape[0], -1) for a in (whole, lax.bitcast_convert_type(scale, jnp.int8))],
        axis=1,
    )


def _from_int8(x_RW: jax.Array, block: int) -> jax.Array:
    rows, width = x_RW.shape
    blocks = width // (block + 4)
    whole, scale = jnp.split(x_RW, [blocks * block], axis=1)
    scale = lax.bitcast_convert_type(scale.reshape(rows, blocks, 4), jnp.float32)[..., None]
    return (whole.reshape(rows, blocks, block).astype(jnp.float32) * scale).reshape(rows, -1)


def _to_bfloat16(x_RC: jax.Array, block: int) -> jax.Array:
    return lax.bitcast_convert_type(
        x_RC.astype(jnp.bfloat16), jnp.uint16
    )  # as bits: a compiler may widen collectives of bfloat16


def _from_bfloat16(x_RW: jax.Array, block: int) -> jax.Array:
    return lax.bitcast_convert_type(x_RW, jnp.bfloat16).astype(jnp.float32)


# method -> numbers of a block; float32 [R, C] to what travels [R, W], and back
CODECS = {"int8": (BLOCK, _to_int8, _from_int8), "bfloat16": (1, _to_bfloat16, _from_bfloat16)}
