"""The files of a cached teacher: what is written is read; what is damaged, missing or another's is said."""

import dataclasses
import os
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from deepseek_jax.distill import commands, maker, manifest, reader, shards
from deepseek_jax.distill.maker import Worker
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.bounded_json import BadFile
from tests.support import ROOT, cache_kills

LENGTH, TOP = 24, 5


def manifest_of(**given) -> Manifest:
    known: dict[str, Any] = {
        "top": TOP,
        "temperatures": (1.0, 2.0),
        "vocab_size": 300,
        "teacher": "ab" * 32,
        "dtype": "float32",
        "program": {"rows_per_call": 2, "mesh": {"fsdp": 2}, "platform": "cpu"},
        "options": {"seed": 0, "train.sequence_length": LENGTH},
        "contents": {"tokenizer": "bytes", "sources": []},
        "train_rows": 9,
        "eval_rows": 2,
        "rows_per_shard": 4,
        "command": "make it",
    }
    return Manifest(**(known | given))


def records(count: int, m: Manifest, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = count, m.length, m.top
    return {
        "teacher_ids": rng.integers(0, m.vocab_size, shape).astype(np.int32),
        "teacher_values": rng.normal(size=shape).astype(np.float16),
        "teacher_lse": rng.normal(size=(*shape[:2], len(m.temperatures))).astype(np.float32),
    }


def write_shard(folder: str, shard: int, m: Manifest) -> dict[str, np.ndarray]:
    made = records(len(m.rows_of(shard)), m, shard)
    with shards.Writer(folder, shard, m) as writer:
        writer.write(shards.encoded(made, m))
        writer.finish()
    return made


@pytest.fixture
def cache(tmp_path):
    """(folder, manifest, records of all rows)."""
    folder, m = str(tmp_path / "cache"), manifest_of()
    assert manifest.write(folder, m) == m
    made = [write_shard(folder, i, m) for i in range(m.shards)]
    return folder, m, {k: np.concatenate([r[k] for r in made]) for k in made[0]}


@pytest.mark.parametrize(
    ("vocab_size", "top", "temperatures", "size"),
    [(65536, 64, (1.0, 2.0), 264), (65537, 64, (1.0, 2.0), 328), (151936, 16, (1.0,), 84)],
)
def test_bytes_of_a_record(vocab_size, top, temperatures, size):
    """Every id of the vocabulary fits, and comes back."""
    m = manifest_of(vocab_size=vocab_size, top=top, temperatures=temperatures)
    assert m.token_bytes == size
    made = records(2, m)
    made["teacher_ids"][0, 0, :2] = 0, vocab_size - 1
    raw = shards.encoded(made, m)
    assert raw.shape == (2, LENGTH, size) and raw.dtype == np.uint8
    for row in range(2):
        found = shards.decoded(raw[row], m, top)
        for a, name in zip(found, ("ids", "values", "lse"), strict=True):
            np.testing.assert_array_equal(a, made[f"teacher_{name}"][row])
            assert a.dtype == made[f"teacher_{name}"].dtype


def test_what_is_written_is_read(cache):
    """Rows in any order, padding, fewer words, one temperature twice."""
    folder, m, made = cache
    assert not shards.missing(folder, m)
    teacher = reader.CachedTeacher(folder, m, 3, (2.0, 1.0))
    order = np.array([10, 0, -1, 7, 0], np.int32)
    rows = {"tokens": np.zeros((5, LENGTH), np.int32), "record": order}
    found = teacher.add_to(rows)
    assert found.keys() == {"tokens", *made}
    for name, a in made.items():
        wanted = a[order][..., ::-1] if name == "teacher_lse" else a[order][..., :3]
        wanted[2] = 0
        np.testing.assert_array_equal(found[name], wanted)
    with pytest.raises(UserError, match="has 11 rows, and no row 11"):
        teacher.row(11)


def test_verify_names_what_is_wrong(cache, capsys):
    """Each flipped bit, a file that is cut short, one that is missing, and a damaged checksum."""
    folder, m, _ = cache
    assert commands.verify(folder)[0] == 0
    path = os.path.join(folder, "shard-00001.bin")
    whole = open(path, "rb").read()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 5).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        open(path, "wb").write(flipped)
        code, result, lines = commands.verify(folder)
        assert code == 1 and [b["file"] for b in result["bad"]] == ["shard-00001.bin"]
        assert "remove shard-00001.*" in lines[-1] and m.command in lines[-1]
        row = 4 + at // m.row_bytes
        with pytest.raises(UserError, match=r"shard-00001\.bin is damaged \(row \d"):
            reader.CachedTeacher(folder, m, TOP, (1.0, 2.0)).row(row)
    open(path, "wb").write(whole[:-1])
    assert commands.verify(folder)[1]["bad"] == [
        {"file": "shard-00001.bin", "what": f"{len(whole) - 1} bytes, was {len(whole)}"}
    ]
    assert shards.missing(folder, m) == [1]
    with pytest.raises(UserError, match=r"shard-00001\.bin is damaged \(\d+ bytes"):
        reader.CachedTeacher(folder, m, TOP, (1.0, 2.0)).row(4)
    open(path, "wb").write(whole)
    sums = os.path.join(folder, "shard-00002.json")
    text = open(sums).read()
    open(sums, "w").write(text.replace('"rows":[', '"rows":[1'))
    assert commands.verify(folder)[1]["bad"][0]["file"] == "shard-00002.json"
    os.remove(sums)
    code, result, lines = commands.verify(folder)
    assert (code, result["state"], result["missing"]) == (1, "not complete", 1)
    assert commands.show(folder)[1]["complete"] == 2


def test_a_damaged_manifest_is_refused(cache):
    folder, _, _ = cache
    path = os.path.join(folder, "manifest.json")
    raw = bytearray(open(path, "rb").read())
    raw[raw.index(b'"top":5') + 6] = ord("6")
    open(path, "wb").write(raw)
    with pytest.raises(UserError, match="its own checksum is wrong"):
        manifest.read(folder, "DIR")
    with pytest.raises(UserError, match=r"no manifest\.json of a cached teacher"):
        manifest.read(os.path.dirname(folder), "DIR")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperatures", 1.0),
        ("temperatures", [1.0, "2"]),
        ("temperatures", [0.0]),
        ("top", "5"),
        ("top", 301),
        ("train_rows", -1),
        ("options", []),
        ("options", {"seed": 0}),
        ("program", {"rows_per_call": 2, "platform": "cpu"}),
        ("program", {"rows_per_call": 2, "platform": "cpu", "mesh": {"fsdp": "2"}}),
        ("contents", {"tokenizer": None, "sources": []}),
        ("contents", {"tokenizer": "bytes"}),
        ("teacher", None),
    ],
    ids=str,
)
def test_a_manifest_of_other_values_is_refused(name, value):
    """Its checksum is right: somebody has written it, or another program."""
    m = manifest_of()
    assert manifest.parse(m.to_bytes()) == m
    with pytest.raises(BadFile, match="than a cache has|are none of a cache"):
        manifest.parse(dataclasses.replace(m, **{name: value}).to_bytes())


def test_a_file_that_goes_while_the_folder_is_read(cache):
    """As another worker's does when it gets its name: the list has a file that is not there any more."""
    folder, m, _ = cache
    os.symlink("gone", os.path.join(folder, "shard-00009.bin.tmp"))
    assert not shards.missing(folder, m)


def test_another_cache_is_not_overwritten(cache, tmp_path):
    folder, m, _ = cache
    other = dataclasses.replace(m, options=m.options | {"seed": 1}, command="another")
    assert manifest.write(folder, other) == m
    assert m.difference(other) == "options.seed=1 differs from 0"
    assert not m.difference(dataclasses.replace(m, command="another"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("a year of work")
    with pytest.raises(UserError, match="holds 'thesis.txt' and is no cache"):
        manifest.write(str(mine), m)


def test_what_a_killed_one_left_is_overwritten(tmp_path):
    folder, m = str(tmp_path / "cache"), manifest_of()
    manifest.write(folder, m)
    killed = shards.Writer(folder, 0, m).__enter__()
    killed.write(shards.encoded(records(2, m, 7), m))
    killed._file.flush()
    with pytest.raises(shards.InUse), shards.Writer(folder, 0, m):
        pass  # it lives: its lock is held
    killed._file.close()  # the kernel does so
    assert shards.missing(folder, m) == [0, 1, 2]
    made = write_shard(folder, 0, m)
    found = reader.CachedTeacher(folder, m, TOP, (1.0, 2.0)).row(0)
    np.testing.assert_array_equal(found[0], made["teacher_ids"][0])
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard-00000.bin", "shard-00000.json"]


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    folder, m = str(tmp_path / "cache"), manifest_of(train_rows=10**6)
    manifest.write(folder, m)
    monkeypatch.setattr(
        maker.shutil, "disk_usage", lambda path: type("", (), {"free": 2 * 10**8})()
    )
    with pytest.raises(UserError, match=r"need 672 MB more, and 200 MB are free"):
        maker.check_room(folder, m)


def test_reading_does_not_enter_memory(tmp_path):
    """A cache of 256 MB, of which every row is read: no page of it stays in this process."""
    m = manifest_of(
        top=64,
        options={"train.sequence_length": 1024, "seed": 0},
        train_rows=960,
        eval_rows=0,
        rows_per_shard=240,
    )
    folder = str(tmp_path / "cache")
    manifest.write(folder, m)
    row = shards.encoded(records(1, m), m)
    for i in range(m.shards):
        with shards.Writer(folder, i, m) as writer:
            for _ in m.rows_of(i):
                writer.write(row)
            writer.finish()
    assert m.total_bytes > 2.5e8
    teacher = reader.CachedTeacher(folder, m, 64, (1.0, 2.0))
    teacher.row(0)
    before, most = _resident(), 0
    for i in range(m.rows):
        teacher.row(i)
        most = max(most, _resident())
    assert most - before < 2e7


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_goes_on(kills, tmp_path):
    """Bytes and names are those of a cache that nobody disturbed, whatever workers were killed."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    cache_kills.make(str(calm), Worker())
    args = [sys.executable, "-m", "tests.support.cache_kills", str(killed), str(kills), "1"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > kills / 3
    assert files(calm) == files(killed) and len(files(calm)) == 1 + 2 * cache_kills.MANIFEST.shards


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
