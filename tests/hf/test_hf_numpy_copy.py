"""Transposes and casts of blocks, against NumPy's own assignment."""

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.hf import numpy_copy

DTYPES = [np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 48), (48, 1), (31, 65), (200, 130)])
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_every_orientation(shape, source, target):
    rows, columns = shape
    whole = np.random.default_rng(0).standard_normal((rows + 3, columns + 5)).astype(source)
    part = whole[1 : rows + 1, 2 : columns + 2]
    vector = np.asarray(whole[0, :columns])
    for values in (
        np.ascontiguousarray(part),
        part,
        np.asfortranarray(part),
        whole.T[2 : columns + 2, 1 : rows + 1].T,
        vector[None],
    ):
        expected = values.astype(target)
        got = numpy_copy.out_of(values, target)
        assert got.dtype == target and got.flags.c_contiguous
        np.testing.assert_array_equal(got, expected)
        for out in (
            np.zeros(values.shape, target),
            np.zeros(values.shape[::-1], target).T,
            np.zeros((columns, 2, len(values)), target)[:, 1].T,
        ):
            numpy_copy.into(out, values)
            np.testing.assert_array_equal(out, expected)


def test_empty_is_aligned():
    for n in (1, 7, 1000):
        a = numpy_copy.empty((n, 3), np.dtype(np.float32))
        assert a.shape == (n, 3) and a.ctypes.data % 64 == 0 and a.flags.c_contiguous
