"""Grouped products by kernels: interpreted on the CPU, against NumPy in float64, against the rounds, and in a
whole training step. What a GPU makes of them, `python -m benchmarks gpu_bench` shows.

Tolerances: test_dispatch.py.
"""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config, MoeConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.experts import block_rows, dispatch, grouped_matmul, implementations
from deepseek_jax.experts.block_rows import BLOCK, BlockRows, Blocks
from deepseek_jax.experts.grouped_matmul import GroupedMatmul
from deepseek_jax.experts.low_rank import ExpertWeights, Pair
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh, per_device
from tests.experts import test_dispatch as plain
from tests.model import test_lora
from tests.support import conversion, interpreted, invariance

pytestmark = pytest.mark.usefixtures("interpreted_kernels")
SLOW = pytest.mark.slow
TRITON = GroupedMatmul("triton", interpret=True)


@pytest.fixture
def interpreted_kernels():
    with interpreted.kernels():
        yield


# --- rows in blocks ---
@pytest.mark.parametrize(
    "tokens, experts, k",
    [(300, 5, 2), *(pytest.param(*c, marks=SLOW) for c in ((1, 3, 1), (40, 64, 6), (700, 1, 1)))],
)
def test_every_assignment_has_a_row_in_a_block_of_its_expert(tokens, experts, k):
    rng = np.random.default_rng(tokens)
    expert_TK = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    expert_TK = np.where(rng.random(expert_TK.shape) < 0.2, experts, expert_TK)
    rows = jax.jit(block_rows.sort_rows, static_argnums=1)(jnp.asarray(expert_TK), experts)
    row_TK, assignment_J, (expert_N, first_G1) = jax.tree.map(np.asarray, rows)
    size, nowhere = len(assignment_J), expert_TK.size
    assert size == len(expert_N) * BLOCK
    needed = [-(-np.sum(expert_TK == g) // BLOCK) for g in range(experts)]
    np.testing.assert_array_equal(first_G1, np.cumsum([0, *needed]))
    wanted = np.repeat(np.arange(experts), needed)
    np.testing.assert_array_equal(expert_N[: len(wanted)], wanted)
    assert (expert_N[len(wanted) :] == experts).all()
    expected = np.full(size, nowhere)
    for assignment, (row, expert) in enumerate(
        zip(row_TK.reshape(-1), expert_TK.reshape(-1), strict=True)
    ):
        assert (row == size) == (expert == experts)
        if expert < experts:
            assert expert_N[row // BLOCK] == expert
            expected[row] = assignment
    np.testing.assert_array_equal(assignment_J, expected)
    for g in range(experts):  # in token order
        assert (np.diff(row_TK.reshape(-1)[expert_TK.reshape(-1) == g]) == 1).all()


def test_rows_of_what_arrived():
    """Filled places of every expert, device after device; all are found, each once, none else."""
    rng = np.random.default_rng(0)
    devices, experts, capacity = 3, 4, 150
    here_XG = rng.integers(0, capacity + 1, (devices, experts)) * (rng.random(experts) < 0.8)
    rows = jax.jit(block_rows.rows_of_places, static_argnums=1)(jnp.asarray(here_XG), capacity)
    row_S, place_J, (expert_N, first_G1) = jax.tree.map(np.asarray, rows)
    places = devices * experts * capacity
    found = []
    for g in range(experts):
        row = first_G1[g] * BLOCK
        for x in range(devices):
            for c in range(here_XG[x, g]):
                place = (x * experts + g) * capacity + c
                assert row_S[place] == row and place_J[row] == place
                found.append(place)
                row += 1
        assert (expert_N[first_G1[g] : first_G1[g + 1]] == g).all()
    empty = np.setdiff1d(np.arange(places), found)
    assert (row_S[empty] == len(place_J)).all() and np.sum(place_J < places) == len(found)


# --- products ---
def products_of(method: GroupedMatmul, dtype, counts, inner, outer):
    """(found, wanted) of the three products: rows by matrices, by transposed ones, weight gradient."""
    experts = len(counts)
    needed = -(-np.asarray(counts) // BLOCK)
    first_G1 = np.cumsum([0, *needed])
    expert_N = np.repeat(np.arange(experts + 1), [*needed, 2])  # two blocks are nobody's
    rng = np.random.default_rng(0)

    def normal(*sizes):
        return np.asarray(jnp.asarray(rng.standard_normal(sizes), dtype).astype(jnp.float32))

    is_row_J1 = np.concatenate(
        [np.arange(n * BLOCK) < c for n, c in zip(needed, counts, strict=True)]
    )[:, None]
    is_row_J1 = np.pad(is_row_J1, ((0, 2 * BLOCK), (0, 0)))
    left_JI, right_JO = normal(len(is_row_J1), inner), normal(len(is_row_J1), outer)
    left_JI, right_JO = left_JI * is_row_J1, right_JO * is_row_J1
    weight_GIO = normal(experts, inner, outer)
    nowhere = jnp.zeros(0, jnp.int32)
    blocks = Blocks(jnp.asarray(expert_N, jnp.int32), jnp.asarray(first_G1, jnp.int32))

    @jax.jit
    def run(left, right, weight):
        products = method.products(BlockRows(nowhere, nowhere, blocks))
        return (
            products.multiply(left, weight),
            products.multiply(right, weight, transpose=True),
            products.outer(left, right),
        )

    found = run(*(jnp.asarray(a, dtype) for a in (left_JI, right_JO, weight_GIO)))
    used = first_G1[-1] * BLOCK
    left_JI, right_JO, weight_GIO = (
        a.astype(np.float64) for a in (left_JI[:used], right_JO[:used], weight_GIO)
    )
    of_J = np.repeat(expert_N, BLOCK)[:used]
    wanted = [
        np.stack([row @ weight_GIO[g] for row, g in zip(left_JI, of_J, strict=True)]),
        np.stack([row @ weight_GIO[g].T for row, g in zip(right_JO, of_J, strict=True)]),
        np.stack([left_JI[of_J == g].T @ right_JO[of_J == g] for g in range(experts)]),
    ]
    assert found[2].dtype == jnp.float32 and found[0].dtype == found[1].dtype == dtype
    return [
        np.asarray(a.astype(jnp.float32))[: len(w)] for a, w in zip(found, wanted, strict=True)
    ], wanted


@pytest.mark.parametrize("kernels", [pytest.param("reference", marks=SLOW), "triton"])
@pytest.mark.parametrize(
    "dtype, inner, outer",
    [
        ("float32", 5, 7),  # padded
        pytest.param("float32", 32, 48, marks=SLOW),
        pytest.param("bfloat16", 256, 192, marks=SLOW),
    ],
)
def test_products(kernels, dtype, inner, outer):
    """An expert without rows, one with a single row, one with two blocks."""
    method = GroupedMatmul(kernels, interpret=True)
    found, wanted = products_of(method, dtype, (100, 0, 1, 129), inner, outer)
    for ours, theirs in zip(found, wanted, strict=True):
        conversion.assert_close(ours, theirs, 1e-5 if dtype == "float32" else 2.0**-8)


@pytest.mark.slow
def test_mosaic_products():
    """Mosaic's kernels, interpreted with threads and shared memory, where JAX has that interpreter."""
    module = pytest.importorskip(grouped_matmul.MODULES["mosaic"])
    if not hasattr(module.mosaic, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the interpreter")
    method = GroupedMatmul("mosaic", interpret=True)
    for inner, outer in ((64, 128), (128, 64)):
        found, wanted = products_of(method, "bfloat16", (100, 0, 129), inner, outer)
        for ours, theirs in zip(found, wanted, strict=True):
            conversion.assert_close(ours, theirs, 2.0**-8)


# --- experts ---
QUICK = (0,)
SEEDS = [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in range(plain.CASES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_shapes(seed):
    """The loop over tokens in float64, and, of the slow ones, the rounds: outputs, gradients, counts."""
    shape, chosen = plain.draw(seed)
    by_kernels = dataclasses.replace(shape, implementation="triton")
    plain.check(by_kernels, chosen, seed)
    if seed in QUICK:
        return
    given = plain.numbers(shape, seed)
    args = (*given[:2], plain.keep(shape, chosen, given[1]), *given[2:])
    ours, _ = plain.run(by_kernels, *args)
    rounds, _ = plain.run(dataclasses.replace(shape, implementation="rounds"), *args)
    tolerance = 1e-5 if shape.dtype == "float32" else 0.03
    for name, a, b in zip(plain.NAMES, ours, rounds, strict=True):
        conversion.assert_close(a, b.astype(np.float64), tolerance, what=name)


@pytest.mark.slow
@pytest.mark.parametrize("capacity_factor", [0.1, 1.0, 1.25, 8.0])
@pytest.mark.parametrize("method", plain.METHODS)
def test_never_drops_whatever_the_routing(method, capacity_factor):
    shape = plain.Shape(
        method, capacity_factor=capacity_factor, fsdp=2, expert=4, implementation="triton"
    )
    for chosen in plain.attacks(shape).values():
        assert not plain.check(shape, chosen).dropped_counts.any()


@pytest.mark.slow
def test_one_device():
    """More than a block an expert, all tokens to two experts, experts without a token, padding only."""
    shape = plain.Shape("all_to_all", tokens=300, d=3, f=2, implementation="triton")
    for chosen in plain.attacks(shape).values():
        assert int(plain.check(shape, chosen).rounds) == int((chosen < shape.experts).any())


@pytest.mark.slow
@pytest.mark.parametrize("expert", [1, 2])
def test_low_rank_factors(expert):
    """Factors of all three maps: outputs and all gradients as the rounds have them. Their ranks are narrower
    than a kernel's least width."""
    shape = plain.Shape("all_to_all", tokens=40, d=16, f=12, expert=expert, capacity_factor=0.5)
    x, weight, gate_up, down, c = plain.numbers(shape, 0)
    rng = np.random.default_rng(1)
    e, d, f, r = shape.experts, shape.d, shape.f, 3
    sizes = ((e, d, 2, r), (e, 2, r, f), (e, f, r), (e, r, d))
    factors = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    chosen = plain.spread(shape)

    def of_device(implementation):
        def f(x, weight, chosen, gate_up, down, *factors):
            vary = functools.partial(jax.lax.pcast, axis_name="tensor", to="varying")
            experts = jax.tree.map(
                lambda a: jax.lax.pcast(a, ("data", "fsdp", "tensor"), to="varying"),
                ExpertWeights(gate_up, down, Pair(*factors[:2]), Pair(*factors[2:])),
            )
            tokens = dispatch.Tokens(vary(x), vary(weight), chosen)
            y, _ = dispatch.dispatch("all_to_all", tokens, experts, 0.5, implementation)
            return jax.lax.psum(y, "tensor")

        return f

    given = (x, weight, gate_up, down, *factors)
    found = []
    with jax.set_mesh(shape.mesh):
        by_expert, batch = P("expert"), P(BATCH_AXES)
        specs = (batch, batch, batch, *[by_expert] * 6)
        choices = jax.device_put(jnp.asarray(chosen, jnp.int32), batch)
        placed_c = jax.device_put(c, batch)
        placed = [jax.device_put(a, batch if i < 2 else by_expert) for i, a in enumerate(given)]
        for implementation in ("triton", "rounds"):
            layer = per_device(of_device(implementation), specs, batch)

            def loss(x, weight, *experts, layer=layer):
                y = layer(x, weight, choices, *experts)
                return jnp.sum(y * placed_c), y

            gradient = jax.value_and_grad(loss, argnums=tuple(range(8)), has_aux=True)
            (_, y), grads = jax.jit(gradient)(*placed)
            found.append([np.asarray(a) for a in (y, *grads)])
    for ours, theirs in zip(*found, strict=True):
        conversion.assert_close(ours, theirs.astype(np.float64), 1e-5)


# --- a whole training step ---
def everywhere(monkeypatch):
    """Kernels, interpreted, wherever experts are computed, whatever the options say."""
    monkeypatch.setattr(implementations, "kernels", lambda asked, dtype: TRITON)
    invariance.program.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{}, dict(fsdp=2, expert=2, tensor=2, capacity_factor=0.5)], ids=["1", "2x2x2"]
)
def test_training(mesh, monkeypatch):
    """Scan over layers, rematerialisation, multi-token prediction: all numbers and choices as without."""
    config = invariance.variant(**mesh)
    one = invariance.one_device(steps=2)
    everywhere(monkeypatch)
    loss, gradient, name, counts = invariance.differences(invariance.train(config, 2), one)
    invariance.program.cache_clear()
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, dict(fsdp=2, expert=2)], ids=["1", "2x2"])
def test_lora_over_int8(mesh, monkeypatch):
    """A frozen base in 8 bits, with factors of every expert."""
    one = test_lora.one_device()
    everywhere(monkeypatch)
    run = test_lora.trained(test_lora.INT8, **mesh)
    invariance.program.cache_clear()
    loss, gradient, name, counts = invariance.differences(run, one)
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)
    test_lora.assert_the_base_stays(run, test_lora.INT8)


# --- what is chosen, and what is refused ---
def test_what_a_kind_of_gpu_takes():
    assert [implementations.candidates(n) for n in (8, 9, 10)] == [
        ("triton",),
        ("mosaic", "triton"),
        ("triton",),
    ]
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20")
    assert all(implementations.HOPPER_NAME.search(name) for name in names)
    others = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA L40S", "Tesla V100-SXM2-16GB")
    assert not any(implementations.HOPPER_NAME.search(name) for name in others)
    assert implementations.missing("mosaic", "bfloat16", 9) is None
    assert implementations.missing("triton", "float32", 8) is None
    assert "wgmma" in implementations.missing("mosaic", "bfloat16", 10)
    assert "16 bits" in implementations.missing("mosaic", "float32", 9)
    assert "capability 8" in implementations.missing("triton", "bfloat16", 7)


def test_kernels_are_tried():
    """Their three products against NumPy; wrong ones are found."""
    right = GroupedMatmul.products

    def products(self, rows):
        made = right(self, rows)
        return made._replace(outer=lambda *rows: made.outer(*rows) * 1.1)

    method = GroupedMatmul("reference")
    assert implementations.try_kernels(method, "bfloat16") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupedMatmul, "products", products)
        said = implementations.try_kernels(method, "bfloat16")
    assert said is not None and "weight gradient is wrong by 0.1" in said


def test_rounds_where_no_kernels_work(monkeypatch, capsys):
    """One line says why, once; kernels that were asked for by name are refused."""
    monkeypatch.setattr(implementations, "on_cpu", lambda: False)
    monkeypatch.setattr(implementations, "missing", lambda name, *_: f"no {name} today")
    implementations._best.cache_clear()
    for _ in range(2):
        assert implementations.kernels("auto", jnp.bfloat16) is None
    said = capsys.readouterr().err
    implementations._best.cache_clear()
    assert said.count("\n") == 1 and "triton: no triton today" in said and "rounds" in said
    with pytest.raises(UserError, match="experts_implementation=mosaic: no mosaic today. Set"):
        implementations.kernels("mosaic", jnp.bfloat16)


def test_options():
    for name in ("auto", "mosaic", "triton", "rounds"):
        validate(Config(moe=MoeConfig(experts_implementation=name)))
    with pytest.raises(UserError, match="experts_implementation='grouped' is not known"):
        validate(Config(moe=MoeConfig(experts_implementation="grouped")))
    for name in ("mosaic", "triton"):
        config = Config(moe=MoeConfig(experts_implementation=name))
        wanted = f"config.moe.experts_implementation={name} needs NVIDIA GPUs, and these are cpu"
        with pytest.raises(UserError, match=re.escape(wanted)):
            make_mesh(config, jax.devices()[:1])


def test_jax_still_has_the_triton_backend():
    """JAX 0.11 and 0.12 announce its end. When this fails, older GPUs than Hopper, newer ones and float32
    have no kernels: write others, or let them go and say so in docs/dispatch.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in grouped_matmul.MODULES:
            assert implementations.missing(name, "bfloat16", 9) is None
