"""Some of a layer's experts as a stack of their own, [N, ...] beside all of them, [E, ...]: what learns in
expert-specialised fine-tuning (train/expert_table.py).

All experts lie on the `expert` axis as ever. The stack is divided as a dense weight, along its embed axis,
and not by experts: which ones learn has nothing to do with where they are, so that one device would have many
and another none. An index, int32 [N], says which experts they are, -1 for none; [L, N] of stacked layers.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import per_device

# Logical axes of the stack for those of all experts (sharding.py).
AXES = {"experts": "some_experts", "expert_embed": "embed"}


def places(index_N: jax.Array, experts: int) -> jax.Array:
    """Inside `per_device`, the places of experts among this device's `experts`; `experts` itself for others
    and for none.
    """
    local_N = index_N - lax.axis_index("expert") * experts
    here_N = (index_N >= 0) & (local_N >= 0) & (local_N < experts)
    return jnp.where(here_N, local_N, experts)


def among_all(rows: jax.Array, index_N: jax.Array, experts: int) -> jax.Array:
    """Inside `per_device`, [N, ...] to this device's [experts, ...]: zeros where none of the rows belongs."""
    zeros = jnp.zeros_like(rows, shape=(experts, *rows.shape[1:]))
    return zeros.at[places(index_N, experts)].add(rows, mode="drop")


def take(whole: jax.Array, index: jax.Array) -> jax.Array:
    """The experts of an index, [N, ...] or [L, N, ...], whole along that axis; zeros where it says none."""
    spec = jax.typeof(whole).sharding.spec

    def one_layer(whole, index_N):
        at = places(index_N, whole.shape[0])
        rows = whole.at[at].get(mode="fill", fill_value=0)
        # As bits: among floats -0 + 0 is 0.
        bits = lax.bitcast_convert_type(rows, jnp.uint32)
        return lax.bitcast_convert_type(lax.psum(bits, "expert"), rows.dtype)

    f = one_layer if index.ndim == 1 else jax.vmap(one_layer)
    return per_device(f, (spec, jax.P()), _without_experts(spec, index.ndim))(whole, index)


def put(whole: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """All experts with those of an index replaced: the inverse of `take`."""
    spec = jax.typeof(whole).sharding.spec
    held = _without_experts(spec, index.ndim)

    def one_layer(whole, rows, index_N):
        return whole.at[places(index_N, whole.shape[0])].set(rows, mode="drop")

    f = one_layer if index.ndim == 1 else jax.vmap(one_layer)
    rows = jax.sharding.reshard(rows, held)
    return per_device(f, (spec, held, jax.P()), spec)(whole, rows, index)


def _without_experts(spec: jax.P, dimensions: int) -> jax.P:
    """The spec of all experts, undivided along their axis: the last of the index."""
    return jax.P(*spec[: dimensions - 1], None, *spec[dimensions:])
