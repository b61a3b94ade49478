"""A small training state with every kind of array that a checkpoint holds, on meshes of any shape."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.checkpoint import Checkpointer

SPECS = {
    "step": P(),
    "params": {
        "embed": {"weight": P(None, ("fsdp", "expert"))},
        "experts": {"down_proj": P("expert", None, "fsdp")},
        "norm": P(),
    },
    "opt_state": {
        "0": {"mu": {"embed": {"weight": P(None, ("fsdp", "expert"))}}, "count": P()},
        "half": P("fsdp"),
    },
}


def explicit_mesh(fsdp: int, expert: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: fsdp * expert]
    return jax.make_mesh(
        (fsdp, expert), ("fsdp", "expert"), axis_types=(AxisType.Explicit,) * 2, devices=devices
    )


def values(seed: int = 0) -> dict:
    """Every kind of array that a state holds, with the float values that a careless copy would change."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 16)).astype(np.float32)
    weight[0, :5] = [np.nan, np.inf, -np.inf, -0.0, 1e-42]
    return {
        "step": np.int32(7 + seed),
        "params": {
            "embed": {"weight": weight},
            "experts": {"down_proj": rng.standard_normal((8, 3, 16)).astype(np.float32)},
            "norm": np.ones(5, np.float32),
        },
        "opt_state": {
            "0": {
                "mu": {"embed": {"weight": rng.standard_normal((24, 16)).astype(np.float32)}},
                "count": np.int32(7),
            },
            "half": np.asarray(rng.standard_normal(16), jnp.bfloat16),
        },
    }


def put(tree: dict, mesh: jax.sharding.Mesh) -> dict:
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, SPECS)


def abstract(tree: dict, mesh: jax.sharding.Mesh) -> dict:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)),
        tree,
        SPECS,
    )


def assert_same_bits(got: dict, want: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_one(directory: os.PathLike, step: int = 3) -> dict:
    mesh, state = explicit_mesh(2, 4), values()
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(str(directory))
        checkpointer.save(step, put(state, mesh), {"seed": 5})
        checkpointer.close()
    return state
