"""Attention by fused kernels: interpreted on the CPU, against softmax attention in NumPy's float64. What a
GPU makes of them, `python -m benchmarks gpu_bench` shows.

Tolerance, of the largest number of an array: 1e-5 in float32 (rounding is 6e-8 a number, sums have up to 100
terms). bfloat16 rounds weights, their gradients and results by 4e-3 each: 2e-2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config, MeshConfig, ModelConfig
from deepseek_jax.model.attention import (
    causal,
    fused,
    fused_triton,
    implementations,
    visible_blocks,
)
from deepseek_jax.model.attention.fused import FusedAttention
from deepseek_jax.model.attention.visible_blocks import AFTER_ALL, BEFORE_ALL, Ids
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from tests.support import conversion, interpreted, invariance

SLOW = pytest.mark.slow
TRITON = FusedAttention("triton", interpret=True)
SCALE = 0.4
NAMES = ("output", "logsumexp", "dq", "dk", "dv")


@pytest.fixture
def small_tiles(monkeypatch):
    """16 rows: sequences of 40 have several tiles, and one that is not full."""
    monkeypatch.setattr(fused_triton, "QUERIES", 16)
    monkeypatch.setattr(fused_triton, "KEYS", 16)


class Case(NamedTuple):
    """Ids [B, Q] and [B, K], and the sizes of heads."""

    queries: Ids
    keys: Ids
    heads: int = 2
    key_heads: int = 2
    width: int = 16
    v_width: int = 16


def ids(*rows: list[tuple[int, int]], start: int = 0) -> Ids:
    """Rows of (segment, tokens); positions count through the row from `start`."""
    segment = np.array([np.repeat([s for s, _ in row], [n for _, n in row]) for row in rows])
    position = np.broadcast_to(start + np.arange(segment.shape[1]), segment.shape)
    return Ids(jnp.asarray(position, jnp.int32), jnp.asarray(segment, jnp.int32))


PACKED = ids([(1, 9), (2, 20), (3, 3), (0, 8)], [(1, 40)], [(1, 5), (2, 6)] * 3 + [(7, 7)])
CASES = {
    "documents, padding, ids that come again": Case(PACKED, PACKED),
    "grouped heads": Case(PACKED, PACKED, heads=4, key_heads=2),
    "MLA's widths": Case(PACKED, PACKED, width=48, v_width=32),
    # Positions 30 to 49 of a sequence whose keys are all there.
    "fewer queries": Case(ids([(1, 8), (2, 12)], start=30), ids([(1, 38), (2, 22)])),
    # A part of the keys: the first document's only, all of them before the queries; the second row
    # sees nothing at all.
    "fewer keys": Case(
        ids([(1, 10), (2, 20)], [(3, 5), (4, 25)], start=32), ids([(1, 32)], [(1, 20), (2, 12)])
    ),
    # The half of a row, and keys of the other half, of which none is visible.
    "the future": Case(ids([(1, 20)]), ids([(1, 20)], start=20)),
    # Each document counts for itself, and keys lie in another order.
    "positions of documents": Case(
        Ids(jnp.asarray([[*range(25), *range(15)]]), jnp.asarray([[1] * 25 + [2] * 15])),
        Ids(jnp.asarray([[*range(15), *range(25)[::-1]]]), jnp.asarray([[2] * 15 + [1] * 25])),
    ),
}


QUICK = ("fewer keys",)  # test_as_the_model_calls_it has documents, padding and grouped heads
EVERY = [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CASES]


def inputs(case: Case, dtype: Any) -> tuple[jax.Array, ...]:
    """q, k, v, and the gradients of output and logsumexp."""
    (b, q), k = case.queries.segment.shape, case.keys.segment.shape[1]
    rng = np.random.default_rng(0)
    sizes = (
        (b, q, case.heads, case.width),
        (b, k, case.key_heads, case.width),
        (b, k, case.key_heads, case.v_width),
        (b, q, case.heads, case.v_width),
    )
    arrays = tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)
    return *arrays, jnp.asarray(rng.standard_normal((b, case.heads, q)), jnp.float32)


def reference(case: Case, q, k, v, dout, dlse) -> tuple[np.ndarray, ...]:
    """NAMES, by the formulas of the softmax, of its logarithm and of their derivatives."""
    q, k, v, dout, dlse = (np.asarray(a, np.float64) for a in (q, k, v, dout, dlse))
    share = case.heads // case.key_heads
    k, v = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)
    queries, keys = (jax.tree.map(np.asarray, a) for a in (case.queries, case.keys))
    seen = (queries.segment[:, :, None] == keys.segment[:, None, :]) & (
        keys.position[:, None, :] <= queries.position[:, :, None]
    )
    score = np.einsum("bqnh,bknh->bnqk", q, k) * SCALE
    power = np.where(seen[:, None], np.exp(score), 0)
    sum_ = power.sum(-1, keepdims=True)
    weight = power / np.where(sum_ > 0, sum_, 1)
    dweight = np.einsum("bqnv,bknv->bnqk", dout, v)
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdims=True) + dlse[..., None])

    def shared(a):
        return a.reshape(*a.shape[:2], case.key_heads, share, -1).sum(axis=3)

    with np.errstate(divide="ignore"):
        lse = np.log(sum_[..., 0])
    return (
        np.einsum("bnqk,bknv->bqnv", weight, v),
        lse,
        np.einsum("bnqk,bknh->bqnh", dscore, k) * SCALE,
        shared(np.einsum("bnqk,bqnh->bknh", dscore, q) * SCALE),
        shared(np.einsum("bnqk,bqnv->bknv", weight, dout)),
    )


def compute(method: FusedAttention, case: Case, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """NAMES."""
    queries, keys = case.queries, case.keys

    def f(q, k, v, dout, dlse):
        results, back = jax.vjp(
            lambda q, k, v: fused.attention(method, q, k, v, queries, keys, SCALE), q, k, v
        )
        return (*results, *back((dout, dlse)))

    return jax.jit(f)(*arrays)


def check(method: FusedAttention, case: Case, dtype: Any, tolerance: float) -> None:
    arrays = inputs(case, dtype)
    found, wanted = compute(method, case, *arrays), reference(case, *arrays)
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        assert ours.dtype == (jnp.float32 if name == "logsumexp" else dtype)
        ours, is_number = np.asarray(ours.astype(jnp.float32)), np.isfinite(theirs)
        np.testing.assert_array_equal(np.isfinite(ours), is_number, err_msg=name)
        assert (ours[~is_number] == -np.inf).all()
        if theirs[is_number].any():
            conversion.assert_close(ours[is_number], theirs[is_number], tolerance, name)
        else:
            assert not ours[is_number].any(), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", EVERY)
def test_results_and_gradients(name):
    check(TRITON, CASES[name], jnp.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_bfloat16():
    case = CASES["grouped heads"]._replace(width=48)
    check(TRITON, case, jnp.bfloat16, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
def test_real_widths(widths):
    row = ids([(1, 100), (2, 30), (3, 70), (0, 20)])
    check(TRITON, Case(row, row, 2, 1, *widths), jnp.bfloat16, 2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_parts_of_the_keys():
    """What two devices that have half of the keys each compute, combined by logsumexp, and its gradients,
    which go through logsumexp too, are those of all keys."""
    case = CASES["documents, padding, ids that come again"]
    *arrays, dlse = inputs(case, jnp.float32)
    half = case.keys.segment.shape[1] // 2

    @jax.jit
    def by_halves(q, k, v, dout):
        def f(q, k, v):
            parts = []
            for part in (slice(half), slice(half, None)):
                keys = jax.tree.map(lambda a, part=part: a[:, part], case.keys)
                parts.append(
                    fused.attention(TRITON, q, k[:, part], v[:, part], case.queries, keys, SCALE)
                )
            lse = jnp.logaddexp(parts[0][1], parts[1][1])
            shares = [jnp.exp(a[1] - lse).swapaxes(1, 2)[..., None] for a in parts]
            return sum(a[0] * share for a, share in zip(parts, shares, strict=True))

        out, back = jax.vjp(f, q, k, v)
        return (out, *back(dout))

    wanted = reference(case, *arrays, np.zeros_like(dlse))
    for ours, theirs in zip(by_halves(*arrays), (wanted[0], *wanted[2:]), strict=True):
        conversion.assert_close(ours, theirs)


# --- blocks that are gone through ---
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW) if n == "MLA's widths" else n for n in CASES]
)
def test_ranges(name):
    """No visible pair is left out; what counts as whole is; ranges are of the least length where documents
    follow one another."""
    case = CASES[name]

    @jax.jit
    def of_ids(queries, keys):
        packed = (
            visible_blocks.packed(queries, 16, BEFORE_ALL),
            visible_blocks.packed(keys, 16, AFTER_ALL),
        )
        return packed, visible_blocks.ranges(*packed, 16, 8)

    packed, found = of_ids(case.queries, case.keys)
    queries, keys = map(np.asarray, packed)
    seen = (queries[:, 1, :, None] == keys[:, 1, None]) & (
        keys[:, 0, None] <= queries[:, 0, :, None]
    )
    b, q, k = seen.shape
    blocks = seen.reshape(b, q // 16, 16, k // 8, 8)
    visible, full = blocks.any(axis=(2, 4)), blocks.all(axis=(2, 4))
    for ranges, some, whole in (
        (found[0], visible, full),
        (found[1], visible.swapaxes(1, 2), full.swapaxes(1, 2)),
    ):
        first, end, whole_first, whole_end = np.moveaxis(np.asarray(ranges), -1, 0)[..., None]
        block = np.arange(some.shape[-1])
        inside = (block >= first) & (block < end)
        assert not (some & ~inside).any()
        is_whole = (block >= whole_first) & (block < whole_end)
        assert not (is_whole & ~(whole & inside)).any()
        assert ((first <= whole_first) & (whole_first <= whole_end) & (whole_end <= end)).all()
        if name not in ("documents, padding, ids that come again", "positions of documents"):
            least = np.where(some.any(-1), some.shape[-1] - some[..., ::-1].argmax(-1), 0)
            least = least - np.where(some.any(-1), some.argmax(-1), 0)
            np.testing.assert_array_equal((end - first)[..., 0], least)


def test_other_documents_are_skipped():
    """32 documents of 128 tokens in blocks of 128: one block each, where all earlier ones would be 528."""

    @jax.jit
    def of_row(row):
        packed = visible_blocks.packed(row, 128, BEFORE_ALL)
        return visible_blocks.ranges(packed, packed, 128, 128)

    for ranges in of_row(ids([(i, 128) for i in range(32)])):
        first, end, *_ = np.moveaxis(np.asarray(ranges), -1, 0)
        assert np.sum(end - first) == 32
    for ranges in of_row(ids([(1, 4096)])):
        first, end, whole_first, whole_end = np.moveaxis(np.asarray(ranges), -1, 0)
        assert np.sum(end - first) == 528
        assert np.sum(whole_end - whole_first) == 528 - 32  # the diagonal needs a mask


# --- in the model ---
def causal_inputs():
    case = CASES["grouped heads"]._replace(
        queries=Ids(*(jnp.tile(a, (3, 1))[:8] for a in PACKED)), v_width=32
    )
    return case._replace(keys=case.queries)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "mesh", [pytest.param(None, marks=SLOW), dict(fsdp=4, tensor=2)], ids=["1", "4x2"]
)
def test_as_the_model_calls_it(mesh):
    """causal_attention: NumPy's numbers, in the layout of the queries, without communication."""
    case = causal_inputs()
    *arrays, dlse = inputs(case, jnp.float32)
    wanted = reference(case, *arrays, np.zeros_like(dlse))

    def f(q, k, v, dout, segments):
        def call(q, k, v):
            return causal.causal_attention(q, k, v, segments, SCALE, "triton")

        out, back = jax.vjp(call, q, k, v)
        return (out, *back(dout))

    if mesh is None:
        found = jax.jit(f)(*arrays, case.queries.segment)
    else:
        model = ModelConfig(num_attention_heads=4, n_routed_experts=4)
        config = Config(model=model, mesh=MeshConfig(**mesh))
        layout = P(BATCH_AXES, None, "tensor", None)
        with jax.set_mesh(make_mesh(config)), interpreted.kernels():
            placed = [jax.device_put(np.asarray(a), layout) for a in arrays]
            segments = jax.device_put(np.asarray(case.queries.segment), P(BATCH_AXES))
            program = jax.jit(f).lower(*placed, segments).compile()
            found = program(*placed, segments)
        assert all(a.sharding.spec == layout for a in found)
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        assert not any(kind in program.as_text() for kind in kinds)
    for ours, theirs in zip(found, (wanted[0], *wanted[2:]), strict=True):
        conversion.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, dict(fsdp=4, tensor=2)], ids=["1", "4x2"])
def test_training(mesh, monkeypatch):
    """Scan over layers, rematerialisation, multi-token prediction: all numbers as in blocks."""
    config = invariance.variant(**mesh)
    one = invariance.one_device(steps=2)
    monkeypatch.setattr(implementations, "kernels", lambda *_: TRITON)
    invariance.program.cache_clear()
    with interpreted.kernels():
        run = invariance.train(config, 2)
    invariance.program.cache_clear()
    loss, gradient, name, counts = invariance.differences(run, one)
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


# --- Mosaic ---
@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "fewer queries"])
def test_mosaic(name):
    """Mosaic's kernels, interpreted with threads and shared memory, where JAX has that interpreter."""
    module = pytest.importorskip(fused.MODULES["mosaic"])
    if not hasattr(module.mosaic, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the interpreter")
    method = FusedAttention("mosaic", interpret=True)
    row = ids([(1, 100), (2, 130), (3, 20), (0, 50)])
    case = {
        "packed": Case(row, row, 2, 1, 128, 64),
        "fewer queries": Case(
            ids([(3, 64), (4, 26)], start=200), ids([(1, 128), (3, 140), (4, 50)]), 1, 1, 64, 64
        ),
    }[name]
    check(method, case, jnp.bfloat16, 2e-2)
