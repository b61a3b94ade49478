"""Disks that fill or fail while a checkpoint is written: training goes on, and what was saved stays."""

import errno
import os
import subprocess
import time

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint import checkpoint, folder, integrity, kinds, manifest
from deepseek_jax.checkpoint.checkpoint import SaveFailed
from tests.support.checkpoints import (
    KINDS,
    assert_same_bits,
    explicit_mesh,
    opened,
    put,
    read,
    values,
    where,
    write,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def fails(*_args, **_kwargs):
    raise FULL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["data", "merge", "extra", "manifest", "commit"])
def test_a_full_disk_stops_no_training(tmp_path, kind, place, monkeypatch):
    """Wherever in a save it fills: one line, no leftover, the one before stays, the next save is made."""
    write(tmp_path, kind, (1,))
    mesh, said = explicit_mesh(2, 4), []
    with jax.set_mesh(mesh):
        c = opened(tmp_path, kind, said)
        with monkeypatch.context() as m:
            if place == "data":
                m.setattr(
                    type(kinds.KINDS[kind]), "start", fails if kind == "full" else lambda *a: fails
                )
            elif place == "merge":
                m.setattr(type(kinds.KINDS[kind]), "merge", fails)
            else:
                m.setattr(
                    *{
                        "extra": (integrity, "write_extra"),
                        "manifest": (manifest, "write"),
                        "commit": (os, "rename"),
                    }[place],
                    fails,
                )
            c.save(2, put(values(2), mesh), {"at": 2})
            c.wait()
        assert said == [
            "no checkpoint of step 2: No space left on device; that of step 1 stays, "
            "training goes on and tries again"
        ]
        assert [p.name for p in where(tmp_path, kind).parent.iterdir() if p.is_dir()] == ["1"]
        assert c.newest_good() == 1
        c.save(2, put(values(2), mesh), {"at": 2})
        c.close()
    state, at = read(tmp_path, kind)
    assert at == 2 and len(said) == 1
    assert_same_bits(state, values(2))


def test_a_retry_is_due_before_the_next_interval(tmp_path, monkeypatch):
    mesh, said = explicit_mesh(2, 4), []
    with jax.set_mesh(mesh):
        c = opened(tmp_path, "full", said)
        with monkeypatch.context() as m:
            m.setattr(manifest, "write", fails)
            c.save(10, put(values(), mesh), {})
            c.wait()
        assert [c.due(s, 10) for s in (11, 19, 20)] == [False, False, True]
        monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)
        assert c.due(11, 10)
        c.save(11, put(values(), mesh), {})
        c.wait()
        assert not c.due(12, 10) and not c.due(12, 0)
        c._saved_at = time.monotonic() - 61
        assert c.due(12, 0, every_minutes=1.0) and not c.due(12, 0, every_minutes=1.1)
        c.close()


@pytest.mark.parametrize("good", [0, 2])
def test_the_last_checkpoint_is_tried_again(tmp_path, good, monkeypatch):
    """`good`: which try succeeds; 0: none."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    mesh, said, tries = explicit_mesh(2, 4), [], []
    honest = manifest.write

    def sometimes(*args):
        tries.append(1)
        honest(*args) if len(tries) == good else fails()

    monkeypatch.setattr(manifest, "write", sometimes)
    with jax.set_mesh(mesh):
        c = opened(tmp_path, "sharded", said)
        if good:
            c.save(5, put(values(), mesh), {}, final=True)
            assert c.newest_good() == 5 and len(said) == 1
        else:
            with pytest.raises(
                SaveFailed,
                match="5, the last, could not be written in 5 tries .No space left on device.. "
                "Nothing is saved; ",
            ) as e:
                c.save(5, put(values(), mesh), {}, final=True)
            assert len(tries) == 5 and "\n" not in str(e.value)
        c.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_really_full(tmp_path, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        mesh, said = explicit_mesh(8, 1), []
        rng = np.random.default_rng(0)
        spec = jax.NamedSharding(mesh, jax.P("fsdp"))

        def big():
            megabyte = rng.standard_normal((256, 1024)).astype(np.float32)
            return {"a": jax.device_put(megabyte, spec)}

        with jax.set_mesh(mesh):
            c = opened(disk, kind, said)
            kept = big()
            c.save(1, kept, {"at": 1})
            c.wait()
            assert not said
            c.save(2, {f"{i}": big()["a"] for i in range(3)}, {"at": 2})
            c.wait()
            assert (
                len(said) == 1 and "no checkpoint of step 2: No space left on device" in said[0]
            ), said
            assert [p.name for p in where(disk, kind).parent.iterdir() if p.is_dir()] == ["1"]
            c.save(3, big(), {"at": 3})  # there is room again: nothing was left behind
            c.wait()
            assert c.newest_good() == 3 and len(said) == 1
            found, _ = c.restore(
                jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec), kept),
                1,
            )
            assert np.array_equal(found["a"], kept["a"])
            c.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_late_writer_leaves_no_draft(tmp_path, monkeypatch):
    """A thread that still writes makes a file between the listing of a folder and its deletion."""
    checkpoints, late = folder.Folder(str(tmp_path), read_only=False), ["a", "b"]
    checkpoints.begin(2)
    (tmp_path / "2.tmp" / "state").mkdir()
    rmdir = os.rmdir

    def written_to(path, *args, **options):
        if late and os.path.basename(path) == "state":
            (tmp_path / "2.tmp" / "state" / late.pop()).touch()
        rmdir(path, *args, **options)

    monkeypatch.setattr(os, "rmdir", written_to)
    checkpoints.discard(2)
    assert not late and not os.listdir(tmp_path)
