"""Checkpoints that somebody made to do harm: refused in one line, with no write elsewhere and little memory.

And the commands.
"""

import json
import pathlib
import resource
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

from benchmarks.durability import fuzz
from deepseek_jax.checkpoint import __main__ as command
from deepseek_jax.checkpoint import full, local, manifest
from deepseek_jax.checkpoint.manifest import Manifest
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.bounded_json import BadFile
from tests.support.checkpoints import KINDS, assert_same_bits, read, values, where, write
from tests.support.tensorfiles import head, tensor

BAD_NAMES = (
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/../../x.safetensors",
    "a\\x.safetensors",
    "",
    ".",
    "a//x.safetensors",
    "gs://b/x.safetensors",
    "x\0.safetensors",
    "x\n.safetensors",
    "y" * 300 + ".safetensors",
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere(tmp_path, name):
    (tmp_path / full.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadFile, match="which is not a"):
        full.FullTensors(tmp_path)
    m = Manifest("full", 1, {name: (1, "00000000")}, {})
    (tmp_path / manifest.NAME).write_bytes(m.to_bytes())
    with pytest.raises(BadFile, match="not a file inside the checkpoint"):
        manifest.read(tmp_path)


def reseal(top: pathlib.Path) -> None:
    """A manifest that fits what was made of the files."""
    m = manifest.read(top)
    names = [
        p.relative_to(top).as_posix()
        for p in top.rglob("*")
        if p.is_file() and p.name != manifest.NAME
    ]
    (top / manifest.NAME).unlink()
    manifest.write(top, m._replace(files=manifest.checksums(top, names)))


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_not_followed(tmp_path, kind):
    write(tmp_path, kind)
    top = where(tmp_path, kind)
    file = next(p for p in (top / "state").iterdir() if p.is_file())
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    said = []
    assert read(tmp_path, kind, said=said)[1] == 1
    assert file.name in said[0] and "neither a file nor a folder" in said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_named_is_not_read(tmp_path, kind):
    write(tmp_path, kind)
    (where(tmp_path, kind) / "state" / "planted").write_text("x")
    said = []
    assert (
        read(tmp_path, kind, said=said)[1] == 1 and "state/planted: not in the manifest" in said[0]
    )


def _chunks(top: pathlib.Path) -> None:
    """An array whose chunk is 16 TB, described by TensorStore itself."""
    import tensorstore as ts

    ts.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{top}/state/",
                "path": "params.embed.weight/",
            },
            "metadata": {
                "shape": [24, 16],
                "chunks": [2**21, 2**21],
                "compressor": None,
                "dtype": "<f4",
            },
        },
        create=True,
        delete_existing=True,
    ).result()


def _rewrite(file: str, change) -> object:
    def apply(top: pathlib.Path) -> None:
        value = json.loads((top / file).read_text())
        change(value)
        (top / file).write_text(json.dumps(value))

    return apply


CRAFTED = {
    "sharded": [
        _chunks,
        _rewrite(
            "state/_METADATA",
            lambda v: v["tree_metadata"].update(
                {
                    "x": {
                        "key_metadata": [{"key": "../x", "key_type": 2}],
                        "value_metadata": {"value_type": "jax.Array"},
                    }
                }
            ),
        ),
        _rewrite(
            "state/_METADATA",
            lambda v: v["tree_metadata"]["('step',)"]["value_metadata"].update(value_type="string"),
        ),
        _rewrite("state/_METADATA", lambda v: v.update(tree_metadata=[])),
        lambda top: (top / "extra" / "metadata").write_text('{"a": 1, "a": 2}'),
        lambda top: (top / "state" / "_METADATA").write_text('{"a":' * 100000),
    ],
    "full": [
        _rewrite(
            f"state/{full.INDEX}", lambda v: v["weight_map"].update(step="../../../x.safetensors")
        ),
        _rewrite(f"state/{full.INDEX}", lambda v: v["weight_map"].pop("step")),
        lambda top: (top / "state" / "state-00001-of-00001.safetensors").write_bytes(
            head({"step": tensor((2**50,), (0, 2**52))}, 8)
        ),
    ],
    "local": [
        _rewrite(f"state/{local.INDEX}", lambda v: v["step"].update(shape=[2**45])),
        _rewrite(f"state/{local.INDEX}", lambda v: v["params/norm"]["pieces"].append([[0, 6]])),
        _rewrite(f"state/{local.INDEX}", lambda v: v["params/norm"]["pieces"].append([[0, 5]])),
        _rewrite(f"state/{local.INDEX}", lambda v: v["params/norm"]["pieces"].clear()),
        _rewrite(f"state/{local.INDEX}", lambda v: v["params/norm"].update(dtype="U8")),
    ],
}


@pytest.mark.parametrize(
    "kind, number", [(kind, i) for kind in KINDS for i in range(len(CRAFTED[kind]))]
)
def test_crafted_checkpoints(tmp_path, kind, number):
    """With a manifest that fits them."""
    write(tmp_path, kind, (2,))
    top = where(tmp_path, kind)
    CRAFTED[kind][number](top)
    reseal(top)
    (tmp_path / "x.safetensors").write_bytes(head({"step": tensor((), (0, 4), "I32")}, 4))
    before = sorted(p for p in tmp_path.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refusal:
        read(tmp_path, kind)
    assert "\n" not in str(refusal.value) and str(top) in str(refusal.value)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000, (
        "kB more than before"
    )


def test_random_mutations():
    """A second of `make fuzz`."""
    executions, failures = fuzz.run(seconds=1.0, seed=0)
    assert executions > 10 and not failures, failures


# Commands.


def call(capsys, *argv: str) -> tuple[int, str, str]:
    sys.argv = ["checkpoint", *map(str, argv)]
    code = exit_code("checkpoint", command.main)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("kind", KINDS)
def test_commands(tmp_path, kind, capsys):
    write(tmp_path, kind, losses={2: 1.25})
    top = where(tmp_path, kind)
    everything = top.parents[1] if kind == "local" else tmp_path
    code, out, _ = call(capsys, "ls", everything, "--json")
    rows = json.loads(out)
    assert (
        code == 0
        and [r["step"] for r in rows] == [1, 2]
        and {r["kind"] for r in rows} == {kind}
        and {r["state"] for r in rows} == {"whole"}
    )
    assert rows[1]["eval_loss"] == 1.25 and rows[1]["mesh"] == "fsdp 2 x expert 4"
    code, out, _ = call(capsys, "show", top)
    assert (
        code == 0 and "params/embed/weight" in out and "float32[24, 16]" in out and "'at': 2" in out
    )
    assert call(capsys, "verify", everything) == (0, "1: good\n2: good\n", "")

    code, _, _ = call(capsys, "export", everything, tmp_path / "out", "--step=2", "--only=params")
    found = safetensors.numpy.load_file(tmp_path / "out" / "state-00001-of-00001.safetensors")
    assert (
        code == 0
        and found["params/embed/weight"].tobytes()
        == values(2)["params"]["embed"]["weight"].tobytes()
        and "step" not in found
    )
    assert call(capsys, "export", everything, tmp_path / "out")[0] == 2  # it is there already

    for other in ("full", "sharded"):
        shards = ["--shards=4"] if other == "sharded" else []
        assert (
            call(
                capsys,
                "reshard",
                everything,
                tmp_path / other / "checkpoints",
                f"--kind={other}",
                *shards,
            )[0]
            == 0
        )
        state, at = read(tmp_path / other, "sharded")
        assert at == 2
        assert_same_bits(state, values(2))
        code, out, _ = call(capsys, "diff", everything, tmp_path / other)
        assert code == 0 and "7 arrays are the same" in out
    code, out, _ = call(capsys, "diff", everything, tmp_path / "full", "--step=1", "--json")
    different = {r["name"]: r for r in json.loads(out)["different"]}
    assert (
        code == 1
        and different["step"]["max_abs_difference"] == 1.0
        and json.loads(out)["same"] == 2
    )
    gap = np.abs(
        values(1)["params"]["experts"]["down_proj"] - values(2)["params"]["experts"]["down_proj"]
    )
    assert np.isclose(
        different["params/experts/down_proj"]["max_abs_difference"], gap.max(), rtol=1e-6
    )

    (top / "extra" / "metadata").write_text("{}")
    code, out, _ = call(capsys, "verify", everything)
    assert code == 1 and "2: damaged" in out and "extra/metadata" in out and "1: good" in out
    assert call(capsys, "ls", everything)[0] == 1
    for argv in (
        ["show", everything],
        ["diff", everything, everything],
        ["export", everything, tmp_path / "new"],
    ):
        code, out, err = call(capsys, *argv)
        assert (
            code == 2
            and len(err.splitlines()) == 1
            and "extra/metadata" in err
            and not (tmp_path / "new").exists()
        )


def test_mistakes_in_commands(tmp_path, capsys):
    write(tmp_path, "full")
    for argv in (
        ["ls", tmp_path / "none"],
        ["ls", tmp_path / "checkpoints" / "1" / "state"],
        ["show", tmp_path, "--step=9"],
        ["export", tmp_path, tmp_path / "out", "--only=nothing"],
        ["reshard", tmp_path, tmp_path / "out", "--kind=full", "--shards=2"],
        ["reshard", tmp_path, tmp_path / "checkpoints", "--kind=full"],
    ):
        code, out, err = call(capsys, *argv)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()
