"""Experts in FP8 against NumPy: rounding bit for bit by ml_dtypes, every product and the whole layer by
float64 sums of rounded numbers.

Products of two numbers in FP8 are exact in float32, so that what differs are float32 sums of a few terms,
1e-6 of an array's scale. In a whole layer a number that is rounded after a product may be so near to the
middle of two numbers in FP8 that the order of a sum decides to which it goes: a few in a million, and none of
them with these seeds where they were chosen. One turns a row or a column of a result by up to 1/8 of one
term; so 95% of the numbers must agree to 1e-5 (test_dispatch.py), and all to 0.05.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import (
    Config,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.experts import cpu_grouped_matmul, fp8, grouped_matmul, implementations
from deepseek_jax.experts import places as places_module
from deepseek_jax.experts.block_rows import BLOCK, BlockRows, Blocks
from deepseek_jax.experts.fp8 import FORWARD, GRADIENT, Fp8, InFp8
from deepseek_jax.experts.grouped_matmul import GroupedMatmul
from deepseek_jax.experts.swiglu import Products
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES
from deepseek_jax.plan import exchange, report
from tests.experts import test_dispatch as plain
from tests.support import conversion, interpreted, invariance, small_runs
from tests.support import reference as ref

SLOW = pytest.mark.slow
OF_NUMPY = {FORWARD: (ml_dtypes.float8_e4m3fn, 448.0), GRADIENT: (ml_dtypes.float8_e5m2, 57344.0)}
ROW = Fp8(native=False)


# --- in NumPy ---
def rounded(a, kind, axis: int) -> np.ndarray:
    """float64: numbers along `axis` share the least power of two by which they fit."""
    dtype, top = OF_NUMPY[kind]
    largest = np.max(np.abs(np.asarray(a, np.float64)), axis=axis, keepdims=True)
    scale = np.ones_like(largest)
    for place in np.argwhere(largest > 0):
        power = -126
        while largest[tuple(place)] > top * 2.0**power:
            power += 1
        scale[tuple(place)] = 2.0**power
    return (np.asarray(a, np.float64) / scale).astype(dtype).astype(np.float64) * scale


def loop(shape: plain.Shape, x_BD, weight_BK, expert_BK, gate_up, down, c_BD):
    """As plain.loop, expert by expert, every product of rounded numbers."""
    y, dx = np.zeros_like(x_BD, np.float64), np.zeros_like(x_BD, np.float64)
    dweight = np.zeros_like(weight_BK, np.float64)
    dgate_up, ddown = np.zeros_like(gate_up, np.float64), np.zeros_like(down, np.float64)
    for e in range(shape.experts):
        t, k = np.nonzero(expert_BK == e)
        if not len(t):
            continue
        x, c, w = (a.astype(np.float64) for a in (x_BD[t], c_BD[t], weight_BK[t, k][:, None]))
        both = gate_up[e].reshape(shape.d, -1)
        gate, up = np.split(rounded(x, FORWARD, 1) @ rounded(both, FORWARD, 0), 2, axis=1)
        sigmoid = ref.sigmoid(gate)
        act = gate * sigmoid * up
        out = rounded(act, FORWARD, 1) @ rounded(down[e], FORWARD, 0)
        np.add.at(y, t, w * out)
        dact = rounded(c, GRADIENT, 1) @ rounded(down[e], FORWARD, 1).T
        dweight[t, k] = np.sum(dact * act, axis=1)
        dact = dact * w
        dgate, dup = dact * up * sigmoid * (1 + gate * (1 - sigmoid)), dact * gate * sigmoid
        dboth = np.concatenate([dgate, dup], axis=1)
        ddown[e] = rounded(act * w, FORWARD, 0).T @ rounded(c, GRADIENT, 0)
        dgate_up[e] = (rounded(x, FORWARD, 0).T @ rounded(dboth, GRADIENT, 0)).reshape(
            dgate_up[e].shape
        )
        np.add.at(dx, t, rounded(dboth, GRADIENT, 1) @ rounded(both, FORWARD, 1).T)
    return y, dx, dweight, dgate_up, ddown


def check(shape: plain.Shape, chosen, seed: int = 0) -> list[np.ndarray]:
    """Outputs and gradients of a batch, against the loop."""
    given = plain.numbers(shape, seed)
    args = (*given[:2], chosen, *given[2:])
    wanted = loop(shape, *args)
    found, _ = plain.run(shape, *args)
    for name, ours, theirs in zip(plain.NAMES, found, wanted, strict=True):
        assert_nearly_all(ours, theirs, name)
    return found


def assert_nearly_all(ours, theirs, name: str) -> None:
    error = np.abs(np.asarray(ours, np.float64) - theirs) / np.max(np.abs(theirs))
    assert np.mean(error < 1e-5) > 0.95 and error.max() < 0.05, (name, np.sort(error.ravel())[-9:])


# --- rounding ---
def numbers_of_all_sizes() -> np.ndarray:
    """Rows that span 60 powers of two and rows that span few; zeros, the least and the largest numbers."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 64)) * 2.0 ** rng.integers(-30, 30, (40, 64))
    a[10:30] = rng.standard_normal((20, 64)) * 2.0 ** rng.integers(-60, 60, (20, 1))
    a[0] = 0
    a[1] = 448 * np.linspace(-1, 1, 64)
    a[2] = 449 * np.linspace(-1, 1, 64)
    a[3] = 57344 * np.linspace(-1, 1, 64)
    a[4, :2] = 3e38, -1e-30
    return a.astype(np.float32)


@pytest.mark.parametrize("kind", [FORWARD, GRADIENT])
@pytest.mark.parametrize("axis", [0, 1])
def test_rounds_as_numpy_does(kind, axis):
    """Bit for bit, compiled: XLA leaves out no conversion."""
    a = numbers_of_all_sizes()

    @jax.jit
    def run(a):
        found = fp8.quantize(a, kind, axis)
        return found.numbers(jnp.float32), found.scale, found.values.astype(jnp.float32)

    found, scale, values = map(np.asarray, run(a))
    with np.errstate(under="ignore"):
        np.testing.assert_array_equal(found, rounded(a, kind, axis).astype(np.float32))
    _, top = OF_NUMPY[kind]
    assert np.abs(values).max() <= top
    mantissa, _ = np.frexp(scale)
    assert (mantissa == 0.5).all()


@functools.partial(jax.jit, static_argnums=1)
def rows_in(a, kind):
    """-> the rounded numbers in float32 and in bfloat16."""
    found = fp8.quantize(a, kind, 1)
    return found.numbers(jnp.float32), found.numbers(jnp.bfloat16)


@pytest.mark.parametrize("kind", [FORWARD, GRADIENT])
def test_twice_is_once_and_exact_in_bfloat16(kind):
    once, narrow = map(np.asarray, rows_in(numbers_of_all_sizes()[5:30], kind))
    np.testing.assert_array_equal(rows_in(once, kind)[0], once)
    np.testing.assert_array_equal(narrow[5:].astype(np.float32), once[5:])


def test_rows_that_travel():
    a = numbers_of_all_sizes().astype(jnp.bfloat16)
    sent = jax.jit(fp8.encode)(a)
    assert sent.dtype == jnp.uint8 and sent.shape == (40, 64 + fp8.SCALE_BYTES)
    decode = jax.jit(fp8.decode, static_argnums=1)
    found, wanted = decode(sent, jnp.bfloat16), rows_in(a, FORWARD)[1]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
    assert not np.asarray(decode(np.zeros(sent.shape, np.uint8), jnp.float32)).any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_no_number_stays_none(bad):
    """A step whose numbers overflow must show it. Other rows do not notice."""
    a = np.ones((2, 8), np.float32)
    a[0, 3] = bad
    for kind in (FORWARD, GRADIENT):
        found = np.asarray(rows_in(a, kind)[0])
        assert not np.isfinite(found[0, 3]) and (found[1] == 1).all()


# --- products ---
def sorted_by_expert(method: str, counts):
    """(Products in FP8, [J] expert of each row, -1 for none) of rows in one of the layouts."""
    experts = len(counts)
    if method == "cpu":
        chosen = np.repeat(np.arange(experts), counts)[:, None]
        packed = cpu_grouped_matmul.sort_rows(jnp.asarray(chosen, jnp.int32), experts, 8)
        of_J = np.concatenate([chosen[:, 0], np.full(8, -1)])
        return InFp8(cpu_grouped_matmul.CpuGroupedMatmul(8), ROW).products(packed), of_J
    needed = -(-np.asarray(counts) // BLOCK)
    first = jnp.asarray(np.cumsum([0, *needed]), jnp.int32)
    of_N = np.repeat(np.arange(experts + 1), [*needed, 1])
    nowhere = jnp.zeros(0, jnp.int32)
    rows = BlockRows(nowhere, nowhere, Blocks(jnp.asarray(of_N, jnp.int32), first))
    filled = [np.arange(n * BLOCK) < c for n, c in zip([*needed, 1], [*counts, 0], strict=True)]
    of_J = np.where(np.concatenate(filled), np.repeat(of_N, BLOCK), -1)
    return InFp8(GroupedMatmul(method), ROW).products(rows), of_J


@pytest.mark.parametrize("method", ["reference", pytest.param("cpu", marks=SLOW)])
def test_products(method):
    """An expert without rows, one with a single row; columns of an expert share their scale with no other."""
    counts, inner, outer = (100, 0, 1, 30), 12, 20
    products, of_J = sorted_by_expert(method, counts)
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(-40, 40, len(counts) + 1)[of_J][:, None] * (of_J >= 0)[:, None]
    left_JI, right_JO = (
        (rng.standard_normal((len(of_J), width)) * size).astype(np.float32)
        for width in (inner, outer)
    )
    weight_GIO = rng.standard_normal((len(counts), inner, outer)).astype(np.float32)

    @jax.jit
    def run(left, right, weight):
        return (
            products.multiply(left, weight),
            products.multiply(right, weight, transpose=True),
            products.outer(left, right),
        )

    forward, transposed, outer_GIO = map(np.asarray, run(left_JI, right_JO, weight_GIO))
    for g in range(len(counts)):
        mine = of_J == g
        left, right, weight = left_JI[mine], right_JO[mine], weight_GIO[g]
        if not len(left):
            assert not outer_GIO[g].any()
            continue
        for found, wanted in (
            (forward[mine], rounded(left, FORWARD, 1) @ rounded(weight, FORWARD, 0)),
            (transposed[mine], rounded(right, GRADIENT, 1) @ rounded(weight, FORWARD, 1).T),
            (outer_GIO[g], rounded(left, FORWARD, 0).T @ rounded(right, GRADIENT, 0)),
        ):
            conversion.assert_close(found, wanted, 1e-6)


@pytest.mark.slow
def test_mosaic_products():
    """Its kernels, interpreted with threads and shared memory, where JAX has that interpreter."""
    module = pytest.importorskip(grouped_matmul.MODULES["mosaic"])
    if not hasattr(module.mosaic, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the interpreter")
    if jax.__version_info__ < implementations.MIXED_FP8:
        pytest.skip(f"jax {jax.__version__} does not multiply e4m3 by e5m2")
    method = GroupedMatmul("mosaic", interpret=True)
    with interpreted.kernels():
        assert implementations.try_kernels(method, "float8_e4m3fn") is None


# --- the layer ---
@SLOW  # gradients of what travels in fp8, in the fast set, are of the same products
@pytest.mark.parametrize("implementation", ["auto", "rounds"])
def test_the_layer(implementation):
    """One device: grouped products, and rounds of which there are several. Outputs and all gradients point
    where those without FP8 point, to a cosine of 0.99."""
    shape = plain.Shape(
        "all_to_all",
        tokens=24,
        d=16,
        f=12,
        capacity_factor=0.5,
        implementation=implementation,
        fp8="row",
    )
    chosen = plain.spread(shape)
    found = check(shape, chosen)
    x, weight, *rest = plain.numbers(shape, 0)
    exact = plain.loop(shape, x, weight, chosen, *rest)
    for name, a, b in zip(plain.NAMES, found, exact, strict=True):
        assert cosine(a, b) > 0.99, f"{name}: {cosine(a, b)}"


def cosine(a, b) -> float:
    a, b = (np.asarray(g, np.float64).ravel() for g in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize("expert", [1, 2])
def test_kernels(expert):
    """Blocks of rows, with an exchange and without; kernels of 16 and 32 bits, interpreted."""
    shape = plain.Shape("all_to_all", tokens=30, d=16, f=12, expert=expert, fp8="row")
    shape = dataclasses.replace(shape, implementation="triton", fp8_tokens=True)
    with interpreted.kernels():
        check(shape, plain.spread(shape))


def divided(method: str) -> plain.Shape:
    """An expert axis and a tensor axis."""
    return plain.Shape(
        method, d=16, f=12, fsdp=2, expert=2, tensor=2, capacity_factor=0.5, fp8="row"
    )


def test_tokens_in_fp8():
    """Tokens that travel in FP8, several rounds: outputs bit for bit those of tokens that do not."""
    shape = divided("all_to_all")
    chosen = plain.spread(shape)
    sent = dataclasses.replace(shape, fp8_tokens=True)
    found = check(sent, chosen)
    x, weight, gate_up, down, c = plain.numbers(shape, 0)
    with jax.set_mesh(shape.mesh):
        args = x, weight, chosen.astype(np.int32), gate_up, down, c
        specs = *plain.specs(shape), P(BATCH_AXES)
        args = [jax.device_put(a, spec) for a, spec in zip(args, specs, strict=True)]
        _, (y, _) = jax.jit(plain.objective(shape))(*args)
    np.testing.assert_array_equal(found[0], y)


@pytest.mark.slow
@pytest.mark.parametrize("method", plain.METHODS)
def test_gradients_of_tokens_in_fp8(method):
    """Outputs the same bit for bit.

    Where the tensor axis divides an expert's width, each part of a row has a scale of its own, and columns
    have one on each device: other bits only in numbers that are small beside their row or column."""
    shape = divided(method)
    chosen = plain.spread(shape)
    sent = dataclasses.replace(shape, fp8_tokens=True)
    found = check(sent, chosen)
    whole = check(shape, chosen)
    np.testing.assert_array_equal(found[0], whole[0])
    for name, ours, theirs in zip(plain.NAMES, found, whole, strict=True):
        assert_nearly_all(ours, theirs.astype(np.float64), name)


def test_bytes_that_travel():
    """Tokens as uint8, half of bfloat16; results and gradients as ever."""
    for method, moves in (("all_to_all", "all_to_all"), ("all_gather", "all_gather")):
        sizes = {}
        for sent in (False, True):
            shape = plain.Shape(
                method, d=16, expert=4, fp8="row", fp8_tokens=sent, dtype="bfloat16"
            )
            with jax.set_mesh(shape.mesh):
                f = jax.jit(plain.objective(shape))
                text = f.lower(*plain.abstract_args(shape)).as_text()
            found = re.findall(rf'"?stablehlo\.{moves}"?\(.*?-> tensor<([\dx]+)x(\w+)>', text)
            sizes[sent] = [kind for size, kind in found if size.endswith(("x16", "x20"))]
        assert "ui8" not in sizes[False] and "ui8" in sizes[True], sizes


def test_products_that_take_fp8():
    """Those of rounds on a GPU, by XLA on the CPU: the same numbers as products of float32."""
    experts, places, inner, outer = 3, 8, 16, 12
    of_rounds = (
        functools.partial(places_module._outer, experts),
        functools.partial(places_module._largest, experts),
        functools.partial(jnp.repeat, repeats=places, axis=0),
    )
    multiply = places_module._multiply
    raw = Products(multiply, of_rounds[0], multiply, of_rounds[0], *of_rounds[1:])
    rng = np.random.default_rng(0)
    left, right, weight = (
        rng.standard_normal(size).astype(np.float32)
        for size in ((experts * places, inner), (experts * places, outer), (experts, inner, outer))
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(native, left, right, weight):
        products = Fp8(native).products(raw)
        transposed = products.multiply(right, weight, transpose=True)
        return products.multiply(left, weight), transposed, products.outer(left, right)

    for ours, theirs in zip(*(run(n, left, right, weight) for n in (True, False)), strict=True):
        conversion.assert_close(np.asarray(ours), np.asarray(theirs, np.float64), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_products_that_take_fp8(dtype, monkeypatch):
    """Forward and backward multiply e4m3 by e4m3 and e5m2, and nothing else."""
    shape = plain.Shape(
        "all_to_all", tokens=24, d=16, f=12, implementation="rounds", fp8="row", dtype=dtype
    )
    given = plain.numbers(shape, 0)
    args = (*given[:2], plain.spread(shape), *given[2:])
    emulated, _ = plain.run(shape, *args)
    monkeypatch.setattr(implementations, "has_fp8", lambda: True)
    plain.compiled.cache_clear()
    native, _ = plain.run(shape, *args)
    with jax.set_mesh(shape.mesh):
        f = jax.jit(jax.grad(plain.objective(shape), argnums=(0, 1, 3, 4), has_aux=True))
        text = f.lower(*[a.update(dtype=t) for a, t in in_dtype(shape)]).as_text()
    plain.compiled.cache_clear()
    for name, ours, theirs in zip(plain.NAMES, native, emulated, strict=True):
        tolerance = 1e-6 if dtype == "float32" else 2.0**-7
        conversion.assert_close(
            ours.astype(np.float64), theirs.astype(np.float64), tolerance, what=name
        )
    products = re.findall(
        r"stablehlo\.dot_general.*tensor<[\dx]*x(f8\w+)>, tensor<[\dx]*x(f8\w+)>", text
    )
    assert set(products) == {
        ("f8E4M3FN", "f8E4M3FN"),
        ("f8E5M2", "f8E4M3FN"),
        ("f8E4M3FN", "f8E5M2"),
    }


def in_dtype(shape: plain.Shape):
    kinds = (shape.dtype, "float32", "int32", shape.dtype, shape.dtype, "float32")
    return zip(plain.abstract_args(shape), map(jnp.dtype, kinds), strict=True)


# --- training ---
def with_fp8(config: Config, fp8_dispatch: bool = False) -> Config:
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, fp8="row"),
        moe=dataclasses.replace(config.moe, fp8_dispatch=fp8_dispatch),
    )


@functools.cache
def one_device() -> invariance.Run:
    return invariance.train(with_fp8(invariance.variant()), 2)


@pytest.mark.slow
def test_losses_are_near(monkeypatch):
    """Two steps of a random model as a run creates it, whose routers choose otherwise for 1% of the
    assignments: 0.25%."""
    monkeypatch.setattr(invariance, "initial_state", invariance.created_state)
    found = invariance.train(with_fp8(invariance.variant()), 2)
    exact = invariance.one_device(steps=2)
    for ours, theirs in zip(found.losses, exact.losses, strict=True):
        assert abs(ours - theirs) < 0.0025 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("fp8_dispatch", [False, True])
@pytest.mark.parametrize(
    "mesh",
    [
        dict(fsdp=4, expert=2),
        dict(fsdp=2, expert=2, tensor=2),
        dict(stage=2, fsdp=2, expert=2, dispatch="all_gather"),
        dict(expert=4, dispatch="ring", accumulation=2),
    ],
    ids=str,
)
def test_the_mesh_changes_little(mesh, fp8_dispatch):
    """Losses and gradients of one device. Sums in another order turn some numbers that are rounded: one of
    many terms by 1/16 (e4m3) or 1/8 (e5m2)."""
    run = invariance.train(with_fp8(invariance.variant(**mesh), fp8_dispatch), 2)
    loss, gradient, name, _ = invariance.differences(run, one_device())
    assert loss < 1e-4 and gradient < 0.02, (loss, gradient, name)


@pytest.mark.slow
def test_goes_on_bit_for_bit():
    t = small_runs.Trainer(with_fp8(small_runs.config_of(mesh=MeshConfig(fsdp=2, expert=2)), True))
    whole, _ = t.run(t.start(), 4)
    half, _ = t.run(t.start(), 2)
    half = jax.device_put(jax.device_get(half), t.layout.shardings)
    assert small_runs.same(t.run(half, 2, first=2)[0], whole)


# --- options ---
def test_options():
    row = dict(fp8="row")
    validate(Config(train=TrainConfig(**row), moe=MoeConfig(fp8_dispatch=True)))
    for config, said in (
        (Config(moe=MoeConfig(fp8_dispatch=True)), "moe.fp8_dispatch=True has no effect"),
        (Config(train=TrainConfig(**row, dtype="float16")), "config.train.dtype=float16"),
        (
            Config(
                train=TrainConfig(**row),
                model=ModelConfig(first_k_dense_replace=2, num_hidden_layers=2),
            ),
            "config.train.fp8=row has no effect on a model without routed experts",
        ),
        (
            Config(train=TrainConfig(**row), lora=LoraConfig(r=4, base_dtype="nf4")),
            "config.lora.base_dtype=nf4",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            validate(config)
        assert "\n" not in str(error.value) and "Set " in str(error.value)


def test_what_is_said(monkeypatch):
    """By the summary of a run: which numbers are FP8, and that a CPU does not multiply them. By plan: too."""
    config = with_fp8(small_runs.config_of(), fp8_dispatch=True)
    shape = {axis: 1 for axis in AXES} | {"expert": 2}
    mesh = types.SimpleNamespace(shape=shape, devices=np.array(jax.devices()[:2]))
    first, slower = implementations.fp8_notes(config, mesh)
    assert "row: e4m3, gradients e5m2" in first and "on their way" in first
    assert "cpu devices do not multiply FP8" in slower and "slower than" in slower
    monkeypatch.setattr(implementations, "has_fp8", lambda: True)
    assert implementations.fp8_notes(config, mesh) == [first]
    assert implementations.fp8_notes(small_runs.config_of(), mesh) == []
    assert report._fp8("row") == " with experts in FP8 (row)" and report._fp8("none") == ""
    bfloat16 = dataclasses.replace(config.train, dtype="bfloat16")
    config = dataclasses.replace(config, train=bfloat16)
    sent, whole = (
        exchange.buffers(dataclasses.replace(config, moe=MoeConfig(fp8_dispatch=f)), shape)
        for f in (True, False)
    )
    width = config.model.hidden_size
    saved = whole.exchanged_rows * (2 * width - (width + fp8.SCALE_BYTES))
    assert whole.bytes - sent.bytes == saved


def test_what_a_gpu_takes(monkeypatch):
    """FP8 from Ada on; kernels on Hopper with jax 0.11; else rounds, whose products XLA makes."""
    monkeypatch.setattr(implementations, "on_cpu", lambda: False)
    for capability, native in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(implementations, "_capability", lambda c=capability: c)
        assert implementations.has_fp8() == native
    monkeypatch.setattr(implementations.jax, "__version_info__", (0, 10, 2))
    implementations.missing.cache_clear()
    said = implementations.missing("mosaic", "float8_e4m3fn", 9)
    assert said is not None and "e4m3 by e5m2 needs jax 0.11" in said
    said = implementations.missing("triton", "float8_e4m3fn", 9)
    assert said is not None and "train.fp8" in said
    implementations.missing.cache_clear()
