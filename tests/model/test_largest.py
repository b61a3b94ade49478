"""The largest of many numbers: against a stable sort of NumPy, equal numbers, infinities and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.largest import block_length, largest


@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 1), (40, 40), (40, 3), (2048, 64), (2049, 16), (2047, 1), (5003, 7), (700, 300)],
)
@pytest.mark.parametrize("kind", ["normal", "whole numbers", "equal", "infinite", "sorted"])
def test_they_are_those_of_a_stable_sort(size, count, kind):
    rng = np.random.default_rng(size + count)
    a = rng.normal(size=(5, size)).astype(np.float32)
    if kind == "whole numbers":  # many equal ones, in all blocks
        a = np.round(a) + 0.0  # without -0.0, which lax.top_k has below 0.0
    elif kind == "equal":
        a[:] = -1e30
        a[1] = 0.0
    elif kind == "infinite":  # what fills up the last block is no better than these
        a[rng.random(a.shape) < 0.9] = -np.inf
        a[0] = -np.inf
    elif kind == "sorted":  # all largest in the last blocks
        a.sort(axis=1)
    values, places = jax.jit(largest, static_argnums=1)(jnp.asarray(a), count)
    expected = np.argsort(-a, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(a, expected, axis=1))
    assert places.dtype == jnp.int32


def test_blocks_are_used_where_they_are_shorter():
    assert [block_length(v, 64) for v in (64, 100, 2048, 32000, 151936)] == [1, 1, 1, 16, 64]
