"""Regions of arrays in files, read and written."""

import numpy as np
import pytest

from deepseek_jax.tensorfile import files, regions
from deepseek_jax.tensorfile.arrays import TensorSpec


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 5), (2, 3, 4, 5)])
def test_regions_of_files(tmp_path, monkeypatch, shape):
    """Any part of an array, read and written with blocks of any size, whatever gaps are skipped."""
    array = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    (tmp_path / "f").write_bytes(b"head" + array.tobytes())
    spec = TensorSpec(shape, np.dtype(np.int32))
    rng = np.random.default_rng(0)
    with open(tmp_path / "f", "rb") as f:
        read_at = regions.stream(f)
        for block, gap in (
            (1, 0),
            (16, 0),
            (16, 8),
            (64, 1 << 20),
            (1 << 20, 0),
            (1 << 20, 1 << 20),
        ):
            monkeypatch.setattr(regions, "BLOCK", block)
            parts = list(regions.blocks(shape, 4, block))
            assert b"".join(regions.raw(array[p]) for p in parts) == array.tobytes()
            for _ in range(20):
                cut = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
                index = tuple(slice(int(a), int(b)) for a, b in cut)
                assert np.array_equal(regions.read(read_at, 4, spec, index, gap), array[index])
                out = np.full(regions.size(index), -1, np.int32)
                for place, values in regions.read_blocks(read_at, 4, spec, index, block, gap):
                    assert values.nbytes <= max(block, 4)
                    out[place] = values
                assert np.array_equal(out, array[index])
                wanted = array.copy()
                wanted[index] = -wanted[index]
                (tmp_path / "g").write_bytes(b"head" + array.tobytes())
                with open(tmp_path / "g", "r+b") as g:
                    regions.write(files.write_at(g.fileno()), 4, spec, index, wanted[index])
                assert (tmp_path / "g").read_bytes() == b"head" + wanted.tobytes()
