"""Checkpoints: exact on every mesh, whole or absent, and refused with a reason when they do not fit."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.errors import UserError
from tests.support import ROOT
from tests.support.checkpoints import SPECS, abstract, assert_same_bits, explicit_mesh, put, values

REPOSITORY = ROOT


def save_one(directory: os.PathLike, step: int = 3) -> dict:
    mesh, state = explicit_mesh(2, 4), values()
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(str(directory))
        checkpointer.save(step, put(state, mesh), {"seed": 5})
        checkpointer.close()
    return state


def test_bits_survive_a_change_of_mesh_twice(tmp_path):
    state, extra = values(), {"seed": 1, "names": ["a", "ü"], "nested": {"x": 0.1, "none": None}}
    meshes = [explicit_mesh(8, 1), explicit_mesh(2, 4), explicit_mesh(1, 1)]
    with jax.set_mesh(meshes[0]):
        first = Checkpointer(str(tmp_path / "0"), options=CheckpointConfig(keep=2))
        first.save(1, put(state, meshes[0]), extra)
        first.close()
    for i, mesh in enumerate(meshes[1:]):
        with jax.set_mesh(mesh):
            got, got_extra = Checkpointer(
                str(tmp_path / str(i)), options=CheckpointConfig(keep=2)
            ).restore(abstract(state, mesh))
            assert_same_bits(got, state)
            assert got_extra == extra
            specs = jax.tree.leaves(SPECS, is_leaf=lambda s: isinstance(s, P))
            for leaf, spec in zip(jax.tree.leaves(got), specs, strict=True):
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
            again = Checkpointer(str(tmp_path / str(i + 1)), options=CheckpointConfig(keep=2))
            again.save(1, got, got_extra)
            again.close()


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    mesh, state = explicit_mesh(8, 1), values()
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(str(tmp_path), options=CheckpointConfig(keep=3))
        step = jax.jit(lambda t: jax.tree.map(lambda a: a * 0, t), donate_argnums=0)
        live = put(state, mesh)
        for number in range(1, 4):
            checkpointer.save(number, live, {})
            step(live)  # overwrites the buffers that a thread may still be writing to disk
            live = put(state, mesh)
        checkpointer.wait()
        for number in range(1, 4):
            assert_same_bits(checkpointer.restore(abstract(state, mesh), number)[0], state)
        checkpointer.close()


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5])])
def test_keeps_the_newest(tmp_path, keep, left):
    mesh = explicit_mesh(2, 4)
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(str(tmp_path), options=CheckpointConfig(keep=keep))
        assert checkpointer.latest_step() is None and checkpointer.steps() == []
        for step in range(1, 6):
            checkpointer.save(step, put(values(step), mesh), {"at": step})
        checkpointer.wait()
        assert checkpointer.steps() == left and checkpointer.latest_step() == 5
        assert sorted(int(name) for name in os.listdir(tmp_path)) == left
        assert int(checkpointer.restore(abstract(values(), mesh))[0]["step"]) == 7 + 5
        assert [checkpointer.read_extra(step)["at"] for step in left] == left
        checkpointer.close()
    assert Checkpointer(str(tmp_path), options=CheckpointConfig(keep=keep)).steps() == left


def test_a_step_is_never_written_over(tmp_path):
    save_one(tmp_path, 3)
    mesh = explicit_mesh(2, 4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="3 already exists"):
        Checkpointer(str(tmp_path)).save(3, put(values(), mesh), {})


def test_reads_a_part_only(tmp_path):
    state = save_one(tmp_path)
    mesh = explicit_mesh(1, 1)
    wanted = {"params": abstract(state, mesh)["params"]}
    with jax.set_mesh(mesh):
        reader = Checkpointer(str(tmp_path), read_only=True)
        assert_same_bits(reader.restore_params(wanted), {"params": state["params"]})
        del wanted["params"]["embed"]
        assert_same_bits(
            reader.restore_params(wanted),
            {"params": {k: v for k, v in state["params"].items() if k != "embed"}},
        )


def _edit(tree: dict, path: str, value) -> dict:
    *parents, name = path.split("/")
    node = tree
    for p in parents:
        node = node[p]
    if value is None:
        del node[name]
    else:
        node[name] = jax.ShapeDtypeStruct(
            value[0], value[1], sharding=NamedSharding(explicit_mesh(2, 4), P())
        )
    return tree


@pytest.mark.parametrize(
    "path, value, parts",
    [
        (
            "params/embed/weight",
            ((24, 32), jnp.float32),
            ["float32[24, 16] there", "float32[24, 32] here"],
        ),
        (
            "params/embed/weight",
            ((24, 16), jnp.bfloat16),
            ["float32[24, 16] there", "bfloat16[24, 16] here"],
        ),
        ("params/norm", ((5, 1), jnp.float32), ["float32[5] there", "float32[5, 1] here"]),
        ("params/extra_layer", ((4,), jnp.float32), ["absent there", "float32[4] here"]),
        ("opt_state/0/count", None, ["int32[] there", "absent here"]),
        ("opt_state/0/mu", ((2,), jnp.float32), ["absent there", "float32[2] here"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path, path, value, parts, monkeypatch):
    state = save_one(tmp_path)
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler,
        "restore",
        lambda *_, **__: pytest.fail("data was read before the check"),
    )
    mesh = explicit_mesh(2, 4)
    wanted = _edit(abstract(state, mesh), path, value)
    with jax.set_mesh(mesh), pytest.raises(UserError) as refusal:
        Checkpointer(str(tmp_path)).restore(wanted)
    message = str(refusal.value)
    assert path in message and all(part in message for part in parts) and "\n" not in message
    if value is not None and path.startswith("params"):
        with jax.set_mesh(mesh), pytest.raises(UserError, match=path):
            Checkpointer(str(tmp_path)).restore_params({"params": wanted["params"]})


def test_a_missing_checkpoint_is_said(tmp_path):
    wanted = abstract(values(), explicit_mesh(2, 4))
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpointer(str(tmp_path)).restore(wanted)
    save_one(tmp_path)
    params = {"params": wanted["params"]}
    for read in (
        lambda c: c.restore(wanted, 9),
        lambda c: c.restore_params(params, 9),
        lambda c: c.read_extra(9),
    ):
        with pytest.raises(UserError, match="no checkpoint of step 9.* 3"):
            read(Checkpointer(str(tmp_path)))


@pytest.mark.parametrize("damage", ["data", "metadata", "extra"])
def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, damage):
    state = save_one(tmp_path, 2)
    save_one(tmp_path, 3)
    folder = tmp_path / "3"
    files = {
        "data": list((folder / "state").glob("**/d/*")),
        "metadata": [folder / "state" / "_METADATA"],
        "extra": [folder / "extra" / "metadata"],
    }[damage]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    mesh, said = explicit_mesh(2, 4), []
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match="3 is damaged"):
            Checkpointer(str(tmp_path)).restore(abstract(state, mesh), 3)
        reader = Checkpointer(str(tmp_path), read_only=True, warn=said.append)
        assert_same_bits(reader.restore(abstract(state, mesh))[0], state)
        assert "passed over" in said.pop() and sorted(os.listdir(tmp_path)) == ["2", "3"]
        assert_same_bits(
            Checkpointer(str(tmp_path), warn=said.append).restore(abstract(state, mesh))[0], state
        )
    assert (
        any(f.relative_to(folder).as_posix() in said[0] for f in files)
        and "3.damaged" in said[0]
        and "\n" not in said[0]
    )
    assert sorted(os.listdir(tmp_path)) == ["2", "3.damaged"]


def test_a_folder_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for directory, read_only in [
        ("file", False),
        ("file/checkpoints", False),
        ("file", True),
        ("absent", True),
    ]:
        with pytest.raises(UserError) as refusal:
            Checkpointer(
                str(tmp_path / directory), options=CheckpointConfig(keep=1), read_only=read_only
            )
        assert str(tmp_path / directory) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "absent").exists()


def test_a_folder_without_permission_is_said(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(
        tempfile, "TemporaryFile", refuse
    )  # root, who runs tests in containers, may write everywhere
    monkeypatch.setattr(
        os, "makedirs", lambda path, exist_ok: None if path.endswith("closed") else refuse()
    )
    for directory in ("closed", "closed/checkpoints"):
        with pytest.raises(UserError, match="cannot be written"):
            Checkpointer(str(tmp_path / directory), options=CheckpointConfig(keep=1))


KILLED_WHILE_SAVING = """
    import os, signal, sys, time
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from deepseek_jax.checkpoint.checkpoint import Checkpointer
    directory = sys.argv[1]
    checkpointer = Checkpointer(directory)
    checkpointer.save(1, {"a": jnp.zeros((4, 4))}, {})
    checkpointer.wait()
    big = {"a": jnp.asarray(np.random.default_rng(0).random(2**24, np.float32))}
    jax.block_until_ready(big)
    checkpointer.save(2, big, {})
    while not any("tmp" in name for name in os.listdir(directory)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_save_leaves_the_one_before(tmp_path):
    """Also: nothing is printed, and the leftover is gone after the next save of the same step."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_SAVING), str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == -signal.SIGKILL and run.stdout == "" and run.stderr == ""
    assert any("tmp" in name for name in os.listdir(tmp_path)), "the save was over before the kill"
    mesh = explicit_mesh(1, 1)
    with jax.set_mesh(mesh):
        reader = Checkpointer(str(tmp_path), read_only=True)
        assert reader.steps() == [1] and any("tmp" in name for name in os.listdir(tmp_path))
        checkpointer = Checkpointer(str(tmp_path), options=CheckpointConfig(keep=1))
        assert checkpointer.latest_step() == 1
        wanted = {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=NamedSharding(mesh, P()))}
        assert float(checkpointer.restore(wanted)[0]["a"].sum()) == 0
        checkpointer.save(2, {"a": jnp.ones((4, 4))}, {})
        checkpointer.close()
        assert os.listdir(tmp_path) == ["2"]
        assert (
            float(
                Checkpointer(str(tmp_path), options=CheckpointConfig(keep=1))
                .restore(wanted)[0]["a"]
                .sum()
            )
            == 16
        )


def test_orbax_is_quiet_and_other_voices_are_not(tmp_path):
    program = """
        import sys, warnings
        import jax
        jax.config.update("jax_platforms", "cpu")
        import jax.numpy as jnp
        from absl import logging
        from deepseek_jax.checkpoint.checkpoint import Checkpointer
        logging.set_verbosity(logging.INFO)
        for read_only in (False, True):
            checkpointer = Checkpointer(sys.argv[1], read_only)
            if not read_only:
                checkpointer.save(1, {"a": jnp.ones(3)}, {})
            s = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            checkpointer.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=s)})
            checkpointer.close()
        logging.warning("spoken")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and run.stderr.rstrip().endswith("spoken"), run.stderr
