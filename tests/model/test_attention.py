"""Attention in blocks against softmax attention in NumPy's float64: results and gradients, whatever
the sizes of the work.

Tolerance: 1e-5 of an array's scale in float32 (rounding is 6e-8 a number, sums have up to 40 terms;
measured below 1e-6). bfloat16 rounds to 4e-3 each of weights, score gradients and results: 2e-2.
"""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config, MeshConfig, ModelConfig
from deepseek_jax.model.attention import blockwise, causal, cudnn
from deepseek_jax.model.remat import rematerialise
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from tests.support import conversion

B, S, N, H, V, SCALE = 4, 37, 4, 6, 10, 0.4
SEGMENTS = np.array(
    [[1] * S, [1] * 9 + [2] * 20 + [0] * 8, [1, 2] * 18 + [1], [3] * 36 + [1]]
)  # the third: ids need not be contiguous


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((B, S, N, w)) * 2 for w in (H, H, V, V))
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v, dout))


def reference(q, k, v, dout):
    """(out, dq, dk, dv), by the formulas of the softmax and of its derivative."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    seen = np.tril(np.ones((S, S), bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
    score = np.where(seen[:, None], np.einsum("bqnh,bknh->bnqk", q, k) * SCALE, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    dweight = np.einsum("bqnv,bknv->bnqk", dout, v)
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdims=True)) * SCALE
    return (
        np.einsum("bnqk,bknv->bqnv", weight, v),
        np.einsum("bnqk,bknh->bqnh", dscore, k),
        np.einsum("bnqk,bqnh->bknh", dscore, q),
        np.einsum("bnqk,bqnv->bknv", weight, dout),
    )


def ours():
    """(q, k, v, dout, segments) -> (out, dq, dk, dv): a new function each time, as JAX traces the same one
    once, whatever the sizes of the work have become since."""

    def f(q, k, v, dout, segments):
        out, back = jax.vjp(
            lambda q, k, v: causal.causal_attention(q, k, v, segments, SCALE), q, k, v
        )
        return (out, *back(dout))

    return f


SIZES = {
    "one block": (S, 2**20),
    "five levels of one block, four heads of one sequence": (8, 8 * S * 4),
    "levels of two blocks and a rest, all at once": (3, 2**20),
    "levels of two blocks, two sequences": (3, 3 * S * 8),
    "two heads at a time": (16, 16 * S * 3),  # room for three, and three does not divide four
    "one head at a time, less than one fits": (2, 1),
}


# test_on_a_mesh has levels of two blocks, one head at a time.
QUICK = ("one block", "two heads at a time")


@pytest.mark.parametrize(
    "sizes", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SIZES]
)
def test_results_and_gradients(sizes, monkeypatch):
    monkeypatch.setattr(causal, "_sizes", lambda length: blockwise.Sizes(*SIZES[sizes]))
    arrays = inputs()
    actual = jax.jit(ours())(*arrays, jnp.asarray(SEGMENTS))
    for name, a, expected in zip(
        ("out", "dq", "dk", "dv"), actual, reference(*arrays), strict=True
    ):
        conversion.assert_close(a, expected, what=name)


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(causal, "_sizes", lambda length: blockwise.Sizes(16, 16 * S * 4))
    arrays = inputs(jnp.bfloat16)
    actual = jax.jit(ours())(*arrays, jnp.asarray(SEGMENTS))
    for name, a, expected in zip(
        ("out", "dq", "dk", "dv"), actual, reference(*arrays), strict=True
    ):
        assert a.dtype == jnp.bfloat16
        conversion.assert_close(a, expected, 2e-2, name)


def test_on_a_mesh(monkeypatch):
    """Sequences over data, fsdp and expert, heads over tensor: the same numbers, in the same
    layout, without communication."""
    monkeypatch.setattr(causal, "_sizes", lambda length: blockwise.Sizes(3, 3 * S))
    config = Config(
        model=ModelConfig(num_attention_heads=N, n_routed_experts=4),
        mesh=MeshConfig(fsdp=2, expert=2, tensor=2),
    )
    with jax.set_mesh(make_mesh(config)):
        layout = P(BATCH_AXES, None, "tensor", None)
        arrays = [jax.device_put(np.asarray(a), layout) for a in inputs()]
        program = jax.jit(ours()).lower(*arrays, jax.device_put(SEGMENTS, P(BATCH_AXES))).compile()
        actual = program(*arrays, jax.device_put(SEGMENTS, P(BATCH_AXES)))
    assert not any(
        name in program.as_text()
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    )
    for a, expected in zip(actual, reference(*inputs()), strict=True):
        assert a.sharding.spec == layout
        conversion.assert_close(a, expected)


@pytest.mark.parametrize("remat, times", [("none", 2), ("full", 3), ("save:attention", 2)])
def test_rematerialised(remat, times):
    """What is saved under the name "attention" is enough: forward does not run again."""
    q, k, v, _ = inputs()
    f = rematerialise(
        lambda q, k, v: jnp.sum(
            jnp.sin(causal.causal_attention(q, k, v, jnp.asarray(SEGMENTS), SCALE))
        ),
        remat,
    )
    program = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2))).lower(q, k, v).as_text()
    assert program.count("stablehlo.exponential") == times


# Each level is code of its own; the memory that a block takes does not depend on their number.
@pytest.mark.parametrize("levels", [2, pytest.param(blockwise.LEVELS, marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_length(levels, monkeypatch):
    """Bytes of temporaries, twice as long: at most 1.1 x twice as many. Whole scores would be four
    times as many."""
    monkeypatch.setattr(blockwise, "LEVELS", levels)

    def temporaries(length):
        def shape(*s):
            return jax.ShapeDtypeStruct(s, jnp.float32)

        q, v = shape(1, length, 2, 8), shape(1, length, 2, 6)

        def f(q, k, v, dout, segments):
            return jax.vjp(lambda *a: causal.causal_attention(*a, segments, SCALE), q, k, v)[1](
                dout
            )

        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(f).lower(q, q, v, v, segments).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert long <= 1.1 * 2 * short
    assert long < 8192 * 8192 * 4 / 4  # a quarter of one head's scores


def refused(*_):
    raise RuntimeError("No valid engine configs\nand more")


@pytest.mark.parametrize(
    "version, capability, probe, said",
    [
        (None, (9, 0), None, "JAX finds no cuDNN"),
        (90701, (9, 0), None, "it needs cuDNN 9.10 or newer, and this is 9.7"),
        (91002, (8, 9), None, "compute capability 9.0 or newer, and this one has 8.9"),
        (91002, (10, 0), refused, "a first call fails (RuntimeError: No valid engine configs)"),
        (91002, (9, 0), lambda *_: None, None),
    ],
)
def test_where_cudnn_cannot(version, capability, probe, said, monkeypatch, capsys):
    """Version, chip and a first call are asked for on a GPU; where one is wrong, attention is the blocks',
    after one line."""
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn.jax_private, "cudnn_version", lambda: version)
    monkeypatch.setattr(cudnn, "_capability", lambda: capability)
    monkeypatch.setattr(cudnn, "_probe", probe)
    cudnn.missing.cache_clear(), cudnn.usable.cache_clear()
    try:
        reason = cudnn.missing(H, V)
        assert said is None and reason is None or said in reason and "\n" not in reason
        if said:
            monkeypatch.setattr(cudnn, "forward", None)  # is not asked
            q, k, v, dout = inputs(jnp.bfloat16)

            def f(method):
                return causal.causal_attention(q, k, v, jnp.ones((B, S), jnp.int32), SCALE, method)

            assert str(jax.make_jaxpr(f, static_argnums=0)("cudnn")) == str(
                jax.make_jaxpr(f, static_argnums=0)("blocks")
            ).replace("blocks", "cudnn")
            for _ in range(2):
                jax.eval_shape(lambda: f("cudnn"))
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and said in err and "in blocks instead" in err
    finally:
        cudnn.missing.cache_clear(), cudnn.usable.cache_clear()


def test_the_version_of_cudnn(monkeypatch):
    """Asked as JAX asks for it, by the name that its CUDA plugins have; None without a plugin."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    for plugin, version in (
        (None, None),
        (types.SimpleNamespace(cudnn_get_version=lambda: 91501), 91501),
    ):
        monkeypatch.setattr(fused, "cuda_versions", plugin)
        assert cudnn.jax_private.cudnn_version() == version


def test_cudnn_of_devices_that_are_not_here():
    """Compiled for elsewhere only JAX's primitives are looked for; this JAX has them."""
    assert cudnn.missing(H, V) is None and cudnn._capability() == (0, 0)
