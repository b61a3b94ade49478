"""Heads of safetensors files: what safetensors writes is read, what was made to do harm is refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax.tensorfile import files, header
from deepseek_jax.tensorfile.arrays import TensorSpec, spec_of
from deepseek_jax.tensorfile.bounded_json import BadFile
from tests.support.tensorfiles import head, tensor


@pytest.mark.parametrize(
    "what, raw",
    {
        "is empty": b"",
        "is shorter than its length": b"\x05\0\0",
        "head longer than the file": head({}, length=1 << 20),
        "head of 2^64 bytes": head({}, length=2**64 - 1),
        "not JSON": head(b"{nonsense}"),
        "not UTF-8": head(b'{"\xff": 1}'),
        "deep": head(b"[" * 100000),
        "a list": head(b"[]"),
        "a tensor twice": head(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), 8),
        "metadata that is no text": head({"__metadata__": {"a": 1}}),
        "another dtype": head({"a": tensor(dtype="O8")}, 8),
        "a dtype of another size": head({"a": tensor(dtype="F64")}, 8),
        "a list for a dtype": head({"a": tensor(dtype=["F32"])}, 8),
        "a negative shape": head({"a": tensor((-2,))}, 8),
        "a shape of floats": head({"a": tensor((2.0,))}, 8),
        "a shape of booleans": head({"a": tensor((True, 2))}, 8),
        "a shape that wraps around 64 bits": head({"a": tensor((2**32, 2**32), (0, 0))}),
        "a number beyond 64 bits": head(
            b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 5000), 4
        ),
        "a zero beside huge numbers": head({"a": tensor((0, 2**62, 2**62), (0, 0))}),
        "too many dimensions": head({"a": tensor((1,) * 40, (0, 4))}, 4),
        "more than the file holds": head({"a": tensor((2**40,), (0, 2**42))}, 8),
        "backwards": head({"a": tensor((2,), (8, 0))}, 8),
        "overlapping": head({"a": tensor(), "b": tensor((2,), (4, 12))}, 12),
        "a gap": head({"a": tensor(), "b": tensor((2,), (12, 20))}, 20),
        "bytes after the end": head({"a": tensor()}, 9),
        "an unknown key": head({"a": tensor(extra=1)}, 8),
        "a missing key": head({"a": {"dtype": "F32", "shape": [2]}}, 8),
    }.items(),
)
def test_safetensors_heads(tmp_path, what, raw):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(BadFile) as refusal:
        header.read(tmp_path / "x.safetensors")
    assert (
        "x.safetensors" in str(refusal.value)
        and "\n" not in str(refusal.value)
        and len(str(refusal.value)) < 400
    )


def test_what_safetensors_writes_is_read(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 5), np.int64),
        "scalar": np.float64(1.5),
        "b": np.asarray([True, False]),
        "ü": np.zeros(3, np.float16),
    }
    safetensors.numpy.save_file(
        {k: np.asarray(v) for k, v in arrays.items()}, tmp_path / "x.safetensors", {"format": "np"}
    )
    found = header.read(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert found.keys() == arrays.keys()
    for name, read in found.items():
        want = np.asarray(arrays[name])
        assert read.spec.shape == want.shape and read.spec.dtype == want.dtype
        assert raw[read.offset : read.offset + want.nbytes] == want.tobytes()


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 5), np.int64),
        "scalar": np.asarray(1.5),
    }
    division = {"x.safetensors": {name: spec_of(array) for name, array in arrays.items()}}
    files.write(tmp_path, division, lambda name: [arrays[name]])
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    files.begin(str(tmp_path), {"y.safetensors": division["x.safetensors"]})
    made = (tmp_path / "y.safetensors").read_bytes()
    assert len(made) == (tmp_path / "x.safetensors").stat().st_size
    assert files.places({"y.safetensors": division["x.safetensors"]}) == header.read(
        tmp_path / "y.safetensors"
    )


def test_division_over_files():
    """A file holds as many bytes as it may; a larger tensor has one of its own."""
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 0}
    specs = {name: TensorSpec((size,), np.dtype(np.uint8)) for name, size in sizes.items()}
    division = files.divide(specs, lambda number, count: f"{number}-{count}", 7)
    assert {file: list(part) for file, part in division.items()} == {
        "1-3": ["a", "b"],
        "2-3": ["c"],
        "3-3": ["d", "e"],
    }
    index = json.loads(files.index(division))
    assert index["metadata"] == {"total_size": 17} and index["weight_map"]["c"] == "2-3"
