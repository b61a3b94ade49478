"""Plain Orbax restores our checkpoints of the kinds `sharded` and `full`, bit for bit, without code of ours.

Each test reads WORKDIR/checkpoints/STEP/state with orbax.checkpoint alone. Checkpoints of kind `local` are
excepted: they are pieces on the disks of several hosts.
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deepseek_jax.checkpoint import __main__ as commands
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.tensorfile.arrays import unflatten
from tests.support.checkpoints import (
    abstract,
    assert_same_bits,
    explicit_mesh,
    put,
    values,
)

STEP = 3


def save(workdir, kind: str) -> dict:
    """A run's checkpoint; what it holds."""
    state, mesh = values(), explicit_mesh(2, 4)
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(f"{workdir}/checkpoints", options=CheckpointConfig(kind=kind))
        checkpointer.save(STEP, put(state, mesh), {"seed": 5})
        checkpointer.close()
    return state


def on_host(state: dict) -> dict:
    """NumPy arrays are asked for: any computer can read the checkpoint, whatever devices wrote it."""
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), state)


def test_orbax_restores_sharded(tmp_path):
    state = save(tmp_path, "sharded")
    folder = tmp_path / "checkpoints" / str(STEP) / "state"

    # Into shards, of another mesh than the one that wrote them.
    wanted = abstract(state, explicit_mesh(4, 1))
    with ocp.StandardCheckpointer() as orbax:
        got = orbax.restore(folder, wanted)
    assert_same_bits(got, state)
    for leaf, like in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)

    # Onto the host, by the tree that Orbax itself reads from the folder.
    with ocp.PyTreeCheckpointer() as orbax:
        tree = orbax.metadata(folder).item_metadata.tree
        got = orbax.restore(folder, ocp.args.PyTreeRestore(restore_args=on_host(tree)))
    assert_same_bits(got, state)


def test_orbax_manager_finds_the_steps_of_a_run(tmp_path):
    state = save(tmp_path, "sharded")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        assert manager.latest_step() == STEP
        wanted = ocp.args.StandardRestore(abstract(state, explicit_mesh(2, 4)))
        got = manager.restore(STEP, args=ocp.args.Composite(state=wanted))
    assert_same_bits(got["state"], state)


def load_full(folder, wanted: dict | None = None) -> dict:
    """{"params/embed/weight": array}, as checkpoint/full.py says."""
    import orbax.checkpoint.experimental.v1 as orbax

    with orbax.Context(checkpoint_layout=orbax.options.CheckpointLayout.SAFETENSORS):
        return orbax.load(folder, abstract_state=wanted)


@pytest.mark.parametrize("file_bytes", [1 << 30, 1 << 10])
def test_orbax_restores_full(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr("deepseek_jax.tensorfile.files.FILE_BYTES", file_bytes)
    state = save(tmp_path, "full")
    folder = tmp_path / "checkpoints" / str(STEP) / "state"
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (file_bytes < 1 << 20)
    assert_same_bits(unflatten(load_full(folder)), state)

    # Into shards, of a part of the state.
    wanted = abstract(state, explicit_mesh(4, 1))["params"]["experts"]["down_proj"]
    got = load_full(folder, {"params/experts/down_proj": wanted})["params/experts/down_proj"]
    assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)
    assert_same_bits(got, state["params"]["experts"]["down_proj"])


@pytest.mark.parametrize("shards", [1, 4])
def test_orbax_restores_what_reshard_writes(tmp_path, monkeypatch, capsys, shards):
    """The way from `full` and `local` to Orbax's own layout, which its stable API reads."""
    state = save(tmp_path, "full")
    argv = [
        "checkpoint",
        "reshard",
        str(tmp_path),
        str(tmp_path / "out"),
        "--kind=sharded",
        f"--shards={shards}",
    ]
    monkeypatch.setattr("sys.argv", argv)
    assert commands.main() == 0
    folder = tmp_path / "out" / str(STEP) / "state"
    with ocp.StandardCheckpointer() as orbax:
        got = orbax.restore(folder, abstract(state, explicit_mesh(4, 1)))
    assert_same_bits(got, state)
