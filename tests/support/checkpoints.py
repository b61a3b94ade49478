"""Checkpoints of a small state, of every kind: written, read and compared bit for bit."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig

KINDS = ("sharded", "full", "local")
MESH = (2, 4)
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


def options(tmp_path, kind: str, **more: Any) -> CheckpointConfig:
    local = str(tmp_path / "local") if kind == "local" else ""
    own: dict[str, Any] = {"kind": kind, "keep": 0, "local_dir": local}
    return CheckpointConfig(**own | more)


def opened(
    tmp_path, kind: str, said: list | None = None, read_only: bool = False, **more
) -> Checkpointer:
    return Checkpointer(
        str(tmp_path / "checkpoints"),
        options=options(tmp_path, kind, **more),
        read_only=read_only,
        warn=said.append if said is not None else lambda text: pytest.fail(text),
    )


def write(
    tmp_path, kind: str, steps=(1, 2), said: list | None = None, losses: dict | None = None, **more
) -> None:
    mesh = explicit_mesh(*MESH)
    with jax.set_mesh(mesh):
        c = opened(tmp_path, kind, said, **more)
        for step in steps:
            c.save(step, put(values(step), mesh), {"at": step}, (losses or {}).get(step))
        c.close()


def read(tmp_path, kind: str, shape=MESH, said: list | None = None, **more) -> tuple[dict, int]:
    mesh = explicit_mesh(*shape)
    with jax.set_mesh(mesh):
        state, extra = opened(tmp_path, kind, said, **more).restore(abstract(values(), mesh))
    return state, extra["at"]


def where(tmp_path, kind: str, step: int = 2) -> pathlib.Path:
    if kind == "local":
        return (
            tmp_path
            / "local"
            / (tmp_path / "checkpoints" / "run_id").read_text()
            / "process_00000"
            / str(step)
        )
    return tmp_path / "checkpoints" / str(step)


def files_in(top: pathlib.Path) -> list[str]:
    return sorted(p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file())
