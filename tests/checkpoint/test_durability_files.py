"""Files of checkpoints of every kind, damaged in every way: nothing wrong is restored in silence."""

import errno
import functools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from benchmarks.durability import corruption
from deepseek_jax.checkpoint import checkpoint, folder, full, manifest, sharded
from deepseek_jax.config.options import CheckpointConfig, Config, DataConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import files, regions
from deepseek_jax.tensorfile.arrays import flatten
from tests.support.checkpoints import (
    KINDS,
    MESH,
    abstract,
    assert_same_bits,
    explicit_mesh,
    files_in,
    opened,
    put,
    read,
    values,
    where,
    write,
)

# Kinds.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_restores_on_every_mesh_whatever_the_options_say(tmp_path, kind):
    write(tmp_path, kind)
    for mesh, other in (((2, 4), kind), ((8, 1), kind), ((1, 1), "sharded"), ((1, 8), "full")):
        state, at = read(tmp_path, other, mesh, local_dir=str(tmp_path / "local"))
        assert at == 2
        assert_same_bits(state, values(2))
    assert manifest.read(where(tmp_path, kind)).kind == kind
    mesh = explicit_mesh(*MESH)
    with jax.set_mesh(mesh):
        some = {"params": abstract(values(), mesh)["params"]}
        reader = opened(tmp_path, kind, read_only=True)
        assert_same_bits(reader.restore_params(some, 1), {"params": values(1)["params"]})
        with pytest.raises(UserError, match="no checkpoint of step 7.*1, 2"):
            reader.read_extra(7)


def test_full_is_what_safetensors_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FILE_BYTES", 3000)
    monkeypatch.setattr(regions, "BLOCK", 100)
    write(tmp_path, "full", (1,))
    top = where(tmp_path, "full", 1) / "state"
    index = json.loads((top / full.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    found = {}
    for file in set(index["weight_map"].values()):
        found |= {
            k: v
            for k, v in safetensors.numpy.load_file(top / file).items()
            if index["weight_map"][k] == file
        }
    wanted = checkpoint.flatten(values(1))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (
            found[name].dtype == array.dtype
            and found[name].shape == array.shape
            and found[name].tobytes() == array.tobytes()
        )
    assert_same_bits(read(tmp_path, "full")[0], values(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays(tmp_path, kind):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0, 6: 5.0, 7: 6.0}
    write(tmp_path, kind, range(1, 8), losses=losses, keep=2, keep_best=1, keep_every=5)
    assert sorted(p.name for p in where(tmp_path, kind).parent.iterdir() if p.is_dir()) == [
        "2",
        "5",
        "6",
        "7",
    ]


def test_what_stays_counts_each_once():
    keepers = folder.keepers
    assert keepers([1, 2, 3], {}, 0, 0, 0) == {1, 2, 3}
    assert keepers([1, 2, 3], {1: 2.0, 2: 2.0}, 1, 1, 0) == {2, 3}  # of equal losses the newer
    assert keepers([10, 20, 30, 40], {40: 0.1}, 1, 1, 20) == {20, 40}


def test_nothing_is_deleted_before_the_next_is_durable(tmp_path, monkeypatch):
    write(tmp_path, "full", (1,), keep=1)
    said = []
    with monkeypatch.context() as m:
        m.setattr(
            manifest,
            "write",
            lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
        )
        write(tmp_path, "full", (2,), said, keep=1)
    assert "Input/output error" in said[0] and os.listdir(tmp_path / "checkpoints") == ["1"]


# Torn and rotten files.


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A function of a kind: the folder of its checkpoints, of which copies are damaged, and their states."""

    @functools.cache
    def saved(kind: str) -> tuple[str, dict[int, dict]]:
        folder = str(tmp_path_factory.mktemp("template") / kind)
        return folder, corruption.save(folder, kind)

    return saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", corruption.FAULTS)
def test_every_fault_in_every_file_is_found(template, tmp_path, kind, fault):
    saved, want = template(kind)
    counts = dict.fromkeys(corruption.COUNTS, 0)
    top = pathlib.Path(corruption.steps_folder(saved, kind)) / str(corruption.STEPS[-1])
    for file in files_in(top):
        corruption.attempt(
            saved,
            kind,
            fault,
            file,
            want,
            np.random.default_rng(1),
            str(tmp_path / "try"),
            counts,
        )
    tried = counts["tried"]
    assert tried >= len(files_in(top)) - 1 and counts == {
        "tried": tried,
        "detected": tried,
        "survived": tried,
        "steps_lost": 1,
        "wrong": 0,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_bad_file_is_named_and_kept(tmp_path, kind):
    write(tmp_path, kind, (1,))
    top = where(tmp_path, kind)
    for turn in range(2):  # again, when there is one kept aside already
        write(tmp_path, kind, (2,))
        files = manifest.read(top).files
        file = max(files, key=lambda name: files[name][0])
        raw = bytearray((top / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (top / file).write_bytes(raw)
        said = []
        state, at = read(tmp_path, kind, said=said)
        assert (
            at == 1
            and len(said) == 1
            and "\n" not in said[0]
            and file in said[0]
            and f"kept aside as {top.name}.damaged" in said[0]
        )
        assert_same_bits(state, values(1))
        assert (top.parent / f"2.damaged{'.1' * turn}" / file).read_bytes() == raw
    shutil.rmtree(where(tmp_path, kind, 1))
    with pytest.raises(
        UserError, match="damaged checkpoints only"
    ):  # and not: begin at step 0, over what is left
        read(tmp_path, kind)


def old_checkpoint(path: pathlib.Path, step: int) -> None:
    """As earlier versions wrote them."""
    mesh = explicit_mesh(*MESH)
    with jax.set_mesh(mesh):
        manager = ocp.CheckpointManager(
            path,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(save_root_metadata=False, create=True),
        )
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(put(values(step), mesh)),
                extra=ocp.args.JsonSave({"at": step}),
            ),
        )
        manager.close()


def test_checkpoints_of_earlier_versions(tmp_path):
    for step in (1, 2):
        old_checkpoint(tmp_path / "checkpoints", step)
    said = []
    state, at = read(tmp_path, "sharded", said=said)
    assert at == 2 and len(said) == 1 and "without checksums" in said[0]
    assert_same_bits(state, values(2))
    for file in (tmp_path / "checkpoints" / "2" / "state").rglob(
        "d/*"
    ):  # what Orbax notices itself still falls back
        os.truncate(file, file.stat().st_size // 2)
    said = []
    state, at = read(tmp_path, "sharded", said=said)
    assert at == 1 and any("kept aside as 2.damaged" in line for line in said)
    assert_same_bits(state, values(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_format_is_one_line(tmp_path, kind, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(manifest, "FORMAT", 2)
        write(tmp_path, kind)
    for read_only in (False, True):
        with pytest.raises(
            UserError, match="2 has format 2, and this version reads up to 1. Update"
        ):
            opened(tmp_path, kind, read_only=read_only).newest_good()
    assert where(tmp_path, kind).is_dir()


@pytest.mark.parametrize(
    "given, words",
    [
        (CheckpointConfig(kind="orbax"), "sharded, full, local"),
        (CheckpointConfig(kind="local"), "config.checkpoint.local_dir=''"),
        (CheckpointConfig(kind="local", local_dir="gs://bucket/x"), "is remote"),
        (CheckpointConfig(keep=0, keep_best=1), "keep=0, which keeps all"),
        (CheckpointConfig(keep=0, keep_every=100), "keep=0, which keeps all"),
        (CheckpointConfig(every_minutes=-1.0), "every_minutes"),
        (CheckpointConfig(every_minutes=float("inf")), "every_minutes"),
    ],
)
def test_options_that_cannot_act_are_refused(given, words):
    with pytest.raises(UserError) as refusal:
        validate(Config(checkpoint=given))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_best_needs_held_out_text():
    with pytest.raises(UserError, match="keep_best=1 needs held-out text"):
        validate(
            Config(checkpoint=CheckpointConfig(keep_best=1), data=DataConfig(eval_fraction=0.0))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_in_parts(tmp_path, kind, monkeypatch):
    """What `parts` names is every number once, and no part makes its reader hold more than the limit."""
    monkeypatch.setattr(sharded, "CHUNK_BYTES", 256)
    write(tmp_path, kind, (1,))
    source = opened(tmp_path, kind, read_only=True).source()
    for name, wanted in flatten(values(1)).items():
        found, times = np.zeros_like(wanted), np.zeros(np.shape(wanted), int)
        for index in source.parts(name):
            part = source.read(name, index)
            assert kind != "sharded" or part.nbytes <= 256
            found[index], times[index] = part, times[index] + 1
        assert (times == 1).all() and np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), (
            name
        )
