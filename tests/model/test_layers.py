"""Every part of the model against the float64 reference: results, and gradients of all inputs and weights.

Tolerance: 1e-5 of an array's scale, unless a test says otherwise. float32 rounds to 6e-8 of each
number and these sums have up to a few hundred terms in two or three layers of matrices: what is
measured is below 2e-6. A wrong term shows as 1e-3 or more.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deepseek_jax.config.options import ModelConfig, MoeConfig, RopeScaling
from deepseek_jax.experts import dispatch
from deepseek_jax.model import lookup, rope, router
from deepseek_jax.model.attention import causal
from deepseek_jax.model.attention.mla import MultiHeadLatentAttention
from deepseek_jax.model.decoder import DecoderLayer
from deepseek_jax.model.layers import MLP, Embedding, RMSNorm
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel import sharding
from tests.support import conversion
from tests.support import reference as ref

# All widths differ, so that mixing two of them up cannot go unseen.
MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=28,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=14,
    kv_lora_rank=11,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    first_k_dense_replace=1,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
)
LAYER_DENSE, LAYER_MOE = 0, 1
SLOW = pytest.mark.slow
SEGMENTS = np.array(
    [[1] * 13, [1] * 4 + [2] * 6 + [0] * 3]
)  # one document; two documents and padding
POSITIONS = ref.segment_positions(SEGMENTS)


def yarn(mscale=0.0, mscale_all_dim=0.0, factor=4.0):
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position_embeddings=32,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def evaluate(create, weights, config, prefix, call, x, cotangent):
    """Our module: (y, {name: gradient of sum(y * cotangent)}, "x" being the input)."""
    with conversion.on_mesh(config):
        module, params, bias = conversion.load(create, weights, config, prefix)

        def f(params, x, c):
            y = call(module(params, bias), x)
            return jnp.sum(y * c), y

        f = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
        (_, y), (dparams, dx) = f(params, conversion.put(x), conversion.put(cotangent))
        return np.asarray(y), conversion.names_of(dparams, prefix) | {"x": np.asarray(dx)}


def check(create, weights, prefix, call, reference, x, mask=None, model=MODEL):
    """Our module against `reference(x, weights)`, forward and backward; rows where `mask` is False
    only have to be finite."""
    mask = np.ones(x.shape[:-1], bool) if mask is None else mask
    cotangent = normal(*x.shape, seed=99) * mask[..., None]
    y, grads = evaluate(create, weights, conversion.config_of(model), prefix, call, x, cotangent)
    assert np.isfinite(y).all()
    conversion.assert_close(y[mask], reference(x, weights)[mask], what="output")
    weights = {name: weights[name] for name in grads if name != "x"} | {
        n: w for n, w in weights.items() if n.endswith("bias")
    }
    conversion.assert_gradients(
        lambda w: float(np.sum(reference(w["x"], w) * cotangent)), weights | {"x": x}, grads
    )


# --- small parts ---
@pytest.mark.parametrize("eps", [1e-6, 0.03])
def test_rms_norm(eps):
    x, w = (
        normal(2, 5, 16) * 3,
        {"weight": 0.5 + np.random.default_rng(1).random(16).astype(np.float32)},
    )

    def create():
        return RMSNorm(16, eps, nnx.Rngs(0))

    check(create, w, "", lambda norm, x: norm(x), lambda x, w: ref.rms_norm(x, w["weight"], eps), x)


def test_rms_norm_takes_statistics_in_float32():
    """bfloat16 in and out; one rounding at the end, so half a unit of its 8 bits: 2^-8 relative to
    each number."""
    config, x = conversion.config_of(MODEL), jnp.asarray(normal(4, 16) * 100, jnp.bfloat16)
    w = 0.5 + np.random.default_rng(1).random(16).astype(np.float32)
    with conversion.on_mesh(config):
        norm, params, bias = conversion.load(
            lambda: RMSNorm(16, 1e-6, nnx.Rngs(0)), {"weight": w}, config
        )
        y = norm(params, bias)(jax.device_put(x, jax.P()))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64), ref.rms_norm(np.asarray(x, np.float64), w, 1e-6), rtol=2**-8
    )


def test_mlp():
    weights = ref.layer_weights(conversion.random_weights(MODEL, 0), LAYER_DENSE)

    def create():
        return MLP(MODEL, MODEL.intermediate_size, nnx.Rngs(0))

    check(create, weights, "mlp.", lambda mlp, x: mlp(x), ref.mlp, normal(2, 5, 16))


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2}])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_embedding(on_cpu, mesh, monkeypatch):
    """As on a CPU, and as on a GPU, where the gradient's sums must have one order."""
    monkeypatch.setattr(lookup, "on_cpu", lambda: on_cpu)
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 7))
    table, c = normal(MODEL.vocab_size, 16), normal(2, 7, 16, seed=1)
    config = conversion.config_of(MODEL, **mesh)
    with conversion.on_mesh(config):
        embed, params, bias = conversion.load(
            lambda: Embedding(MODEL, nnx.Rngs(0)), {"weight": table}, config
        )

        def f(params, ids, c):
            y = embed(params, bias)(ids, jnp.float32)
            return jnp.sum(y * c), y

        (_, y), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(
            params, conversion.put(ids), conversion.put(c)
        )
    np.testing.assert_array_equal(y, table[ids])
    expected = np.zeros_like(table, np.float64)
    np.add.at(expected, ids, c)
    conversion.assert_close(conversion.names_of(grads)["weight"], expected)


@pytest.mark.parametrize(
    "rows, size",
    [(1, 1), *(pytest.param(*s, marks=SLOW) for s in ((7, 3), (256, 5))), (700, 3), (1000, 400)],
)
def test_summed_rows(rows, size):
    """Of one index, of indices that occur often, once and never; and no addition is left to a scatter, whose
    order on a GPU is any."""
    index = np.random.default_rng(rows).integers(0, size, rows) if rows > 1 else np.zeros(1, int)
    row, expected = normal(rows, 6), np.zeros((size, 6))
    np.add.at(expected, index, row)
    f = functools.partial(lookup.summed, size=size)
    conversion.assert_close(np.asarray(jax.jit(f)(row, index)), expected)
    assert "scatter-add" not in str(jax.make_jaxpr(f)(row, index))


# --- rotary ---

SCALINGS = {
    "default": RopeScaling(),
    "yarn": yarn(),
    "yarn equal": yarn(0.707, 0.707),
    "yarn both": yarn(1.3, 0.6),
    "yarn mscale": yarn(1.3),
    "yarn all_dim": yarn(0.0, 0.8),
    "yarn 40": yarn(1.0, 1.0, 40.0),
    # The ramp ends beyond the last pair.
    "yarn long": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=200_000),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_tables_and_softmax_scale(scaling):
    model = conversion.smaller(MODEL, rope_scaling=SCALINGS[scaling], qk_rope_head_dim=16)
    frequencies, scale = ref.rope_frequencies(model)
    np.testing.assert_allclose(rope.inverse_frequencies(model), frequencies, rtol=1e-14)
    assert abs(MultiHeadLatentAttention.softmax_scale(model) - ref.softmax_scale(model)) < 1e-15
    positions = np.array([[0, 1, 2, 31, 32, 127, 4095]])
    for actual, expected in zip(
        rope.rope_tables(model, jnp.asarray(positions)),
        ref.rope_tables(model, positions[0]),
        strict=True,
    ):
        # An angle of a radians is known to a * 2^-23 in float32 (frequency and product are
        # rounded), and cos as well as sin move by no more than that; 2^-22 for their own rounding.
        bound = scale * (positions[0][:, None] * frequencies * 2.0**-23 + 2.0**-22)
        assert (np.abs(np.asarray(actual[0], np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("interleave", [True, False])
def test_apply_rope(interleave):
    """Each pair stays in its places, and the rotation's gradient is the rotation back."""
    x, c = normal(2, 13, 3, 6), normal(2, 13, 3, 6, seed=1)
    tables = [ref.rope_tables(MODEL, p) for p in POSITIONS]
    cos, sin = (np.stack([t[i] for t in tables]).astype(np.float32) for i in (0, 1))

    @jax.jit
    def rotate(x, c, cos, sin):
        y, back = jax.vjp(lambda x: rope.apply_rope(x, cos, sin, interleave), x)
        return y, back(c)[0]

    y, back = map(np.asarray, rotate(x, c, cos, sin))
    for b in range(2):
        conversion.assert_close(y[b], ref.apply_rope(x[b], *tables[b], interleave))
        conversion.assert_close(
            back[b], ref.apply_rope(c[b], tables[b][0], -tables[b][1], interleave)
        )


# --- attention ---
ATTENTION = {
    "plain": MODEL,
    "no q_lora, halves, yarn": conversion.smaller(
        MODEL, q_lora_rank=None, rope_interleave=False, rope_scaling=yarn(0.707, 0.707)
    ),
    "yarn both": conversion.smaller(
        MODEL, rope_scaling=yarn(1.3, 0.6), rms_norm_eps=0.03
    ),  # the inner norms keep 1e-6
}


@pytest.mark.parametrize(
    "name, block",  # 13 positions: one block; blocks of 5, 5 and 3
    [
        (name, block)
        if (block == 512) == (name == "plain")
        else pytest.param(name, block, marks=SLOW)
        for name in ATTENTION
        for block in (512, 5)
    ],
)
def test_attention(name, block, monkeypatch):
    """Two sequences, one of them packed with two documents and padding."""
    monkeypatch.setattr(causal, "QUERY_BLOCK", block)
    model = ATTENTION[name]
    weights = ref.layer_weights(conversion.random_weights(model, 0), LAYER_MOE)

    def ours(mla, x):
        return mla(x, rope.rope_tables(model, conversion.put(POSITIONS)), conversion.put(SEGMENTS))

    def reference(x, w):
        return np.stack([ref.mla(x[b], w, model, POSITIONS[b], SEGMENTS[b]) for b in range(2)])

    def create():
        return MultiHeadLatentAttention(model, nnx.Rngs(0))

    check(create, weights, "self_attn.", ours, reference, normal(2, 13, 16), SEGMENTS > 0, model)


# --- router ---
V3 = conversion.smaller(MODEL, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2)
V2 = conversion.smaller(
    V3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
ROUTERS = {
    "v3": V3,
    "v3, one group": conversion.smaller(V3, n_group=1, topk_group=1),
    "v3, every group": conversion.smaller(V3, topk_group=4),
    "v3, not normalised": conversion.smaller(V3, norm_topk_prob=False),
    "v3, softmax": conversion.smaller(V3, scoring_func="softmax"),
    "v2": V2,
    "v2, one group kept": conversion.smaller(V2, topk_group=1),
    "v2-lite": conversion.smaller(
        V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0
    ),
    "v2, greedy ignores groups": conversion.smaller(V2, topk_method="greedy", norm_topk_prob=True),
}


@functools.cache
def jit_route(model):
    return jax.jit(functools.partial(router.route, config=model))


def bias_of(model, seed, shift=0.0):
    """A selection bias, or zeros for methods without one."""
    rng = np.random.default_rng(seed)
    return (
        (rng.standard_normal(model.n_routed_experts) * 0.2 + shift)
        * (model.topk_method == "noaux_tc")
    ).astype(np.float32)


def check_route(x, gate, bias, model):
    ours = jit_route(model)(jnp.asarray(x), jnp.asarray(gate.T), jnp.asarray(bias))
    scores, chosen, weights = ref.route(x, gate, bias, model)
    np.testing.assert_array_equal(ours.expert_TK, chosen)
    conversion.assert_close(ours.score_TE, scores)
    conversion.assert_close(ours.weight_TK, weights)
    conversion.assert_close(ours.logit_TE, ref.linear(x, gate))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["", "all biased scores negative"])
def test_router(name, shift):
    """With biased scores all below 0, experts of other groups stay out (minus infinity, not 0)."""
    model, gate = ROUTERS[name], normal(12, 16, seed=1) / 4
    x, bias = normal(80, 16, seed=2), bias_of(model, 3, shift)
    x = x[ref.routing_margin(x, gate, bias, model) > 1e-4][
        :48
    ]  # tokens whose choice no rounding changes
    assert len(x) == 48
    check_route(x, gate, bias, model)


@pytest.mark.parametrize("name", ROUTERS)
def test_router_takes_the_lower_index_of_equal_scores(name):
    """A gate of zeros makes exactly equal scores; the bias makes some of them larger, in exact
    binary fractions."""
    model, x, gate = ROUTERS[name], normal(2, 16), np.zeros((12, 16), np.float32)
    check_route(x, gate, np.zeros(12, np.float32), model)
    ours = jit_route(model)(jnp.asarray(x), jnp.asarray(gate.T), jnp.zeros(12)).expert_TK
    np.testing.assert_array_equal(ours, [[0, 1, 2]] * 2)
    for seed in range(4):
        bias = (
            np.random.default_rng(seed).integers(-1, 2, 12) / 4 * (model.topk_method == "noaux_tc")
        )
        check_route(x, gate, bias.astype(np.float32), model)


# --- experts ---
MESHES = {"1x1x1": dict(), "1x2x2": dict(fsdp=2, expert=2), "2x1x4": dict(data=2, expert=4)}
SEQUENCES, LENGTH = 8, 6


def torch_moe(weights, x_BSD, chosen_BSK, valid_BS, model):
    """The layer in torch float64 with every expert on every token: an independent automatic differentiation.

    Only the choice of experts is given. Returns (y, sequence_balance, score_sum, z_sum), as
    MoEStats defines them.
    """
    E, k = model.n_routed_experts, model.num_experts_per_tok

    def swiglu(x, name):
        gate, up = (
            x @ weights[f"mlp.{name}.gate_proj.weight"].T,
            x @ weights[f"mlp.{name}.up_proj.weight"].T,
        )
        return (torch.nn.functional.silu(gate) * up) @ weights[f"mlp.{name}.down_proj.weight"].T

    logits = x_BSD @ weights["mlp.gate.weight"].T
    scores = logits.sigmoid() if model.scoring_func == "sigmoid" else logits.softmax(-1)
    valid = torch.tensor(valid_BS, dtype=torch.float64)[..., None]
    picked = torch.nn.functional.one_hot(torch.tensor(chosen_BSK), E).sum(-2).double() * valid
    combine = scores * picked
    if model.norm_topk_prob:
        combine = combine / (combine.sum(-1, keepdim=True) + 1e-20)
    combine = combine * model.routed_scaling_factor
    y = sum(combine[..., e, None] * swiglu(x_BSD, f"experts.{e}") for e in range(E))
    if model.n_shared_experts:
        y = y + swiglu(x_BSD, "shared_experts")
    shares = scores / scores.sum(-1, keepdim=True) * valid
    length = valid.sum(1).clamp(min=1)
    balance = ((picked.sum(1) * E / (k * length)) * (shares.sum(1) / length)).sum()
    return y, balance, shares.sum((0, 1)), (logits.logsumexp(-1, keepdim=True) ** 2 * valid).sum()


def expected_moe(weights, x, bias, valid, model, c):
    """-> (outputs of torch_moe, {name: gradient of `with_cotangent`}, counts [E], chosen); the
    reference chooses the experts."""
    _, chosen, _ = ref.route(x.reshape(-1, x.shape[-1]), weights["mlp.gate.weight"], bias, model)
    chosen = chosen.reshape(*x.shape[:-1], -1)
    leaves = {
        name: torch.tensor(w, dtype=torch.float64, requires_grad=True)
        for name, w in (weights | {"x": x}).items()
    }
    out = torch_moe(leaves, leaves["x"], chosen, valid, model)
    with_cotangent(out, [torch.tensor(a, dtype=torch.float64) for a in c], torch.sum).backward()
    grads = {
        name: torch.zeros_like(t) if t.grad is None else t.grad
        for name, t in leaves.items()
        if not name.endswith("bias")
    }
    grads = {name: g.numpy() for name, g in grads.items()}
    return (
        [t.detach().numpy() for t in out],
        grads,
        ref.expert_counts(chosen, valid, model.n_routed_experts),
        chosen,
    )


def with_cotangent(out, c, total):
    """One number that depends on everything differentiable that the layer returns."""
    y, balance, score_sum, z_sum = out
    return total(y * c[0]) + 3.0 * balance + total(score_sum * c[1]) + 0.05 * z_sum


@functools.cache
def moe_on(model, mesh, capacity_factor):
    """-> (config, jitted (params, bias, x, valid, c) -> (outputs, stats, (dparams, dx)))."""
    config = conversion.config_of(
        model, moe=MoeConfig(capacity_factor=capacity_factor), **MESHES[mesh]
    )
    graphdef = nnx.split(nnx.eval_shape(lambda: MoE(model, config.moe, nnx.Rngs(0))))[0]

    def f(params, x, bias, valid, c):
        y, stats = nnx.merge(graphdef, params, bias)(x, valid)
        return with_cotangent(
            (y, stats.sequence_balance, stats.score_sum, stats.z_sum), c, jnp.sum
        ), (y, stats)

    return config, jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


def check_moe(model, mesh, capacity_factor, weights, x, bias, valid):
    """One batch through the layer on a mesh: results, statistics, rounds, gradients and where they lie."""
    config, run = moe_on(model, mesh, capacity_factor)
    c = normal(*x.shape, seed=5), normal(model.n_routed_experts, seed=6)
    weights = weights | (
        {"mlp.gate.e_score_correction_bias": bias} if model.topk_method == "noaux_tc" else {}
    )
    out, grads, counts, chosen = expected_moe(weights, x, bias, valid, model, c)
    y, ref_counts, _ = ref.moe(x[valid], weights, model)
    conversion.assert_close(out[0][valid], y, 1e-12)  # torch's layer is the reference's
    np.testing.assert_array_equal(counts, ref_counts)
    with conversion.on_mesh(config):
        _, params, biases = conversion.load(
            lambda: MoE(model, config.moe, nnx.Rngs(0)), weights, config, "mlp."
        )
        c = conversion.put(c[0]), jnp.asarray(c[1])
        (_, (y, stats)), (dparams, dx) = run(
            params, conversion.put(x), biases, conversion.put(valid), c
        )
    ours = dict(y=y, balance=stats.sequence_balance, score_sum=stats.score_sum, z_sum=stats.z_sum)
    for (name, actual), expected in zip(ours.items(), out, strict=True):
        conversion.assert_close(actual, expected, what=name)
    np.testing.assert_array_equal(stats.load.expert_counts, counts)
    # A device holds len(x) / devices whole sequences; it needs a round for every C assignments of
    # its fullest expert, or one where it has all experts.
    devices = math.prod(MESHES[mesh].values())
    tokens = x.shape[0] // devices * x.shape[1]
    capacity = dispatch.expert_capacity(
        tokens, model.num_experts_per_tok, model.n_routed_experts, capacity_factor
    )
    parts = zip(np.split(chosen, devices), np.split(valid, devices), strict=True)
    fullest = max(
        ref.expert_counts(part, mask, model.n_routed_experts).max() for part, mask in parts
    )
    assert int(stats.load.rounds) == (
        math.ceil(fullest / capacity) if MESHES[mesh].get("expert", 1) > 1 else fullest > 0
    )
    ours = conversion.names_of(dparams, "mlp.") | {"x": np.asarray(dx)}
    assert set(ours) == set(grads)
    for name in grads:  # an expert that got no token has a gradient of exactly 0
        conversion.assert_close(ours[name], grads[name], what=f"gradient of {name}")
    jax.tree.map(
        lambda g, p: np.testing.assert_equal(g.sharding.spec, p.sharding.spec), dparams, params
    )
    for leaf in jax.tree.leaves(stats):  # the same on every device
        assert all(np.array_equal(s.data, leaf) for s in leaf.addressable_shards)
    return int(stats.load.rounds)


@functools.cache
def moe_case(model, seed=0):
    weights = ref.layer_weights(conversion.random_weights(model, seed), LAYER_MOE)
    weights = {n: w for n, w in weights.items() if n.startswith("mlp.") and not n.endswith("bias")}
    x, bias = normal(2000, 16, seed=seed + 1), bias_of(model, seed + 2)
    x = x[ref.routing_margin(x, weights["mlp.gate.weight"], bias, model) > 1e-4][
        : SEQUENCES * LENGTH
    ]
    return weights, x.reshape(SEQUENCES, LENGTH, 16), bias


@pytest.mark.parametrize(
    "mesh, capacity_factor",
    [
        case if case in (("1x2x2", 8.0), ("2x1x4", 0.1)) else pytest.param(*case, marks=SLOW)
        for case in itertools.product(MESHES, (0.1, 1.25, 8.0))
    ],
)
def test_experts(mesh, capacity_factor):
    """The same results for every mesh and capacity: even and skewed routing, padding, whole
    sequences of padding."""
    weights, x, bias = moe_case(MODEL)
    every = np.ones((SEQUENCES, LENGTH), bool)
    check_moe(MODEL, mesh, capacity_factor, weights, x, bias, every)
    padded = every.copy()
    padded[1, 4:] = padded[4, 1:] = padded[6] = False
    check_moe(MODEL, mesh, capacity_factor, weights, x, bias, padded)
    # A group of two experts whose bias beats every score: all tokens go to those two.
    skewed = np.where(np.isin(np.arange(8), (2, 3)), np.float32(9), bias)
    rounds = check_moe(MODEL, mesh, capacity_factor, weights, x, skewed, every)
    # All of a device's tokens on one expert: 4 times the mean load.
    assert (rounds > 1) == (capacity_factor < 4 and MESHES[mesh].get("expert", 1) > 1)
    assert check_moe(MODEL, mesh, capacity_factor, weights, x, bias, ~every) == 0


EXPERTS = {
    "v2": (
        conversion.smaller(
            MODEL, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
        ),
        "1x2x2",
    ),
    "every expert chosen": (
        conversion.smaller(
            MODEL, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1
        ),
        "2x1x4",
    ),
    # Normalised, one expert's weight would be the constant 1 and the router's gradient rounding
    # noise around 0.
    "one expert": (
        conversion.smaller(
            MODEL,
            n_routed_experts=1,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
        ),
        "1x1x1",
    ),
    "no shared experts": (conversion.smaller(MODEL, n_shared_experts=0), "1x2x2"),
}


# test_dispatch.py has a layer without shared experts, and every expert chosen.
QUICK = ("v2", "one expert")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=SLOW) for n in EXPERTS]
)
def test_other_experts(name):
    model, mesh = EXPERTS[name]
    weights, x, bias = moe_case(model)
    valid = np.ones((SEQUENCES, LENGTH), bool)
    valid[2, 3:] = False
    check_moe(model, mesh, 1.25, weights, x, bias, valid)


def test_expert_capacity():
    assert dispatch.expert_capacity(48, 2, 8, 1.25) == 15
    assert dispatch.expert_capacity(48, 2, 8, 0.001) == 1
    assert dispatch.expert_capacity(48, 2, 8, 100.0) == 48  # an expert gets a token once at most


# --- blocks and the model ---
@pytest.mark.parametrize(
    "layer", [pytest.param(LAYER_DENSE, marks=SLOW), LAYER_MOE], ids=["dense", "moe"]
)
def test_decoder_layer(layer):
    dense = layer == LAYER_DENSE
    weights = ref.layer_weights(conversion.random_weights(MODEL, 0), layer)

    def ours(block, x):
        return block(
            x, rope.rope_tables(MODEL, conversion.put(POSITIONS)), conversion.put(SEGMENTS)
        )[0]

    def reference(x, w):
        return np.stack(
            [
                ref.decoder_layer(x[b], w, MODEL, dense, POSITIONS[b], SEGMENTS[b])[0]
                for b in range(2)
            ]
        )

    def create():
        return DecoderLayer(MODEL, MoeConfig(), not dense, nnx.Rngs(0))

    check(create, weights, "", ours, reference, normal(2, 13, 16), SEGMENTS > 0)


@pytest.mark.slow
def test_multi_token_prediction():
    """Two depths on packed sequences: hidden states, logits, counts, and gradients of all weights
    from all outputs at once."""
    model = conversion.smaller(MODEL, num_nextn_predict_layers=2)
    weights = conversion.random_weights(model, 0)
    ids = np.random.default_rng(3).integers(0, model.vocab_size, SEGMENTS.shape)
    expected = ref.batch(ids, weights, model, POSITIONS, SEGMENTS)
    masks = [SEGMENTS > 0] + [m.valid for m in expected.mtp]
    assert [int(m.sum()) for m in masks] == [
        23,
        20,
        17,
    ]  # three documents, each loses its last token at every depth
    c = [normal(*SEGMENTS.shape, 16, seed=i) * mask[..., None] for i, mask in enumerate(masks)]
    config = conversion.config_of(model)
    with conversion.on_mesh(config):
        batch = {k: conversion.put(a) for k, a in conversion.batch_of(ids, SEGMENTS).items()}
        params, bias = conversion.to_state(weights, model)
        params, bias = (
            conversion.place(params, config),
            conversion.place(bias, config, sharding.COMPUTE_RULES),
        )
        make = conversion.model_of(config)

        def f(params, bias, batch, c):
            net = make(params, bias)
            out = net(batch["tokens"], batch["segment_ids"], batch["positions"], batch["targets"])
            hidden = [out.hidden_BSD, *out.mtp_hidden_BSD]
            total = sum(jnp.sum(h * ci) for h, ci in zip(hidden, c, strict=True))
            return total, (hidden, [net.logits(h) for h in hidden], out.stats)

        f = jax.jit(jax.value_and_grad(f, has_aux=True))
        (_, (hidden, logits, stats)), grads = f(params, bias, batch, [conversion.put(a) for a in c])
    outputs = [expected, *expected.mtp]
    for depth, mask in enumerate(masks):
        assert np.isfinite(np.asarray(hidden[depth])).all()
        conversion.assert_close(
            np.asarray(hidden[depth])[mask],
            outputs[depth].hidden[mask],
            what=f"hidden of depth {depth}",
        )
        conversion.assert_close(
            np.asarray(logits[depth])[mask],
            outputs[depth].logits[mask],
            what=f"logits of depth {depth}",
        )
    routing = [*expected.routing, *(m.routing for m in expected.mtp)]
    counts = [
        ref.expert_counts(r.chosen, mask, model.n_routed_experts)
        for r, mask in zip(routing, masks, strict=True)
    ]
    np.testing.assert_array_equal(stats.load.expert_counts, counts)

    def reference(w):
        out = ref.batch(ids, w, model, POSITIONS, SEGMENTS)
        return float(
            sum(
                np.sum(h * ci)
                for h, ci in zip([out.hidden, *(m.hidden for m in out.mtp)], c, strict=True)
            )
        )

    ours = conversion.to_hf(grads, model)
    del ours["lm_head.weight"]  # the hidden states do not depend on it
    # Experts of one layer together: a third of the time. 2e-5, as these gradients come back through
    # three MoE layers of large weights (measured: 5e-6).
    conversion.assert_gradients(
        reference, weights, ours, 2e-5, group=lambda name: re.sub(r"experts\.\d+", "experts", name)
    )
