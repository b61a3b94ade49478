"""LoRA: what is adapted, what learns, what the base is held in; the same on every mesh. That the numbers are
PEFT's: tests/hf/test_peft.py."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import objectives
from deepseek_jax.config import lora_targets
from deepseek_jax.config.options import Config, LoraConfig, ModelConfig, MoeConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.model import lora, noise
from deepseek_jax.model.count import count
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import quantized, sharding, weights
from deepseek_jax.parallel.mesh import make_mesh, per_device
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import put_batch
from tests.support import conversion, invariance

# Widths in blocks of 64, as nf4 wants them; a dense layer, an MoE layer with shared experts.
MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    scoring_func="softmax",
    topk_method="greedy",
    initializer_range=0.1,
)
LORA = LoraConfig(r=4, alpha=6.0, base_dtype="float32")


def variant(lora_options=LORA, **mesh):
    return dataclasses.replace(invariance.variant(**mesh), model=MODEL, lora=lora_options)


def one_mesh():
    return make_mesh(variant(), jax.devices()[:1])


def flat(tree):
    return {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(tree)}


def abstract(lora_options, model=MODEL):
    return flat(abstract_model(dataclasses.replace(variant(lora_options), model=model))[1])


# ------------------------------------------------------------------------------ what is adapted


def test_rank_zero_changes_nothing():
    params = abstract(LoraConfig())
    assert not any(lora.is_factor(path.split("/")) for path in params)
    config = variant(LoraConfig())
    layout = state.make_layout(config, make_mesh(config, jax.devices()[:1]))
    assert not layout.abstract.frozen and layout.abstract.params == layout.model.abstract.params


def test_all_linear_maps_but_router_and_head():
    """Every weight of the model with two sides: counted by hand from the shapes of the model without LoRA."""
    plain = abstract(LoraConfig())
    found = {p: w.shape for p, w in abstract(LORA).items() if lora.is_factor(p.split("/"))}
    wanted = {}
    for path, w in plain.items():
        before, _, last = path.rpartition("/")
        if w.ndim < 2:
            continue
        *stacked, i, o = w.shape
        if last == "kernel" and not before.endswith("/gate") and before != "lm_head":
            wanted |= {f"{before}/lora_A": (*stacked, i, 4), f"{before}/lora_B": (*stacked, 4, o)}
        elif last == "down_proj":
            wanted |= {f"{before}/down_lora_A": (*stacked, i, 4)}
            wanted |= {f"{before}/down_lora_B": (*stacked, 4, o)}
        elif last == "gate_up_proj":
            layers, e, d, _, f = w.shape
            wanted |= {f"{before}/gate_up_lora_A": (layers, e, d, 2, 4)}
            wanted |= {f"{before}/gate_up_lora_B": (layers, e, 2, 4, f)}
    assert found == wanted


@pytest.mark.parametrize(
    "names, count",
    [
        ("kv_b_proj", 2 * 2),
        (
            "gate_proj,up_proj",
            2 * 2 + 2 * 2 + 2,
        ),  # of the dense layer, of shared experts, of experts
        ("experts", 2 * 2),
        ("experts.down_proj", 2),
        ("shared_experts.down_proj", 2),
        ("mlp.down_proj", 2),
    ],
)
def test_targets_by_name(names, count):
    params = abstract(dataclasses.replace(LORA, target_modules=names))
    assert sum(lora.is_factor(path.split("/")) for path in params) == count


def test_names_are_those_of_the_model():
    """linear_maps knows the names without the model; for both kinds of attention they are the model's."""
    grouped = dataclasses.replace(MODEL, num_key_value_heads=2)
    ranked = dataclasses.replace(MODEL, q_lora_rank=64)
    for model in (MODEL, grouped, ranked):
        found = set()
        for path in abstract(LoraConfig(), model):
            _, _, rest = path.partition("/")
            if rest.endswith("/kernel") and not rest.endswith("gate/kernel"):
                found.add(rest.removesuffix("/kernel").replace("/", "."))
        experts = {f"mlp.experts.{name}" for name in lora_targets.MLP}
        assert set(lora_targets.linear_maps(model)) == found | experts


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(target_modules="q_porj"), "'q_porj' matches nothing.*self_attn.q_proj"),
        (dict(target_modules="lm_head"), "lm_head is not adapted.*modules_to_save=lm_head"),
        (dict(target_modules="gate"), "'gate' matches nothing"),
        (dict(target_modules=","), "names nothing"),
        (
            dict(target_modules="gate_proj"),
            "names mlp.experts.gate_proj without mlp.experts.up_proj",
        ),
        (dict(modules_to_save="norm"), "'norm' is not one of embed_tokens, lm_head"),
        (dict(r=0), "config.lora.alpha=6.0 has no effect"),
        (dict(dropout=0.1), "config.lora.dropout=0.1 and config.objective=pretrain"),
        (
            dict(dropout=0.1, target_modules="experts"),
            "dropout=0.1 .*=experts: routed experts have none",
        ),
        (dict(base_dtype="int4"), "config.lora.base_dtype='int4' is not known"),
    ],
)
def test_refused(options, said):
    with pytest.raises(UserError, match=said) as e:
        validate(variant(dataclasses.replace(LORA, **options)))
    assert "\n" not in str(e.value)


def test_refused_with_others():
    biased = dataclasses.replace(
        variant(),
        model=dataclasses.replace(MODEL, topk_method="noaux_tc", scoring_func="sigmoid"),
        moe=MoeConfig(),
    )
    with pytest.raises(UserError, match="config.moe.bias_update_rate=0.001 and config.lora.r=4"):
        validate(biased)
    tied = dataclasses.replace(MODEL, tie_word_embeddings=True)
    saved = dataclasses.replace(LORA, modules_to_save="lm_head")
    with pytest.raises(UserError, match="modules_to_save=embed_tokens"):
        validate(dataclasses.replace(variant(saved), model=tied))
    narrow = dataclasses.replace(MODEL, kv_lora_rank=48)
    blocks = dataclasses.replace(LORA, base_dtype="nf4")
    with pytest.raises(UserError, match="config.model.kv_lora_rank=48 is no multiple"):
        validate(dataclasses.replace(variant(blocks), model=narrow))
    with pytest.raises(UserError, match="would divide config.model.hidden_size=64 within one"):
        make_mesh(variant(blocks, fsdp=2), jax.devices()[:2])
    odd = dataclasses.replace(MODEL, moe_intermediate_size=36)
    with pytest.raises(UserError, match="moe_intermediate_size=36 is not divisible by the 8"):
        make_mesh(dataclasses.replace(variant(fsdp=8), model=odd), jax.devices())


# ------------------------------------------------------------------------------ what learns


def test_initial_factors():
    """A as PEFT's kaiming_uniform_(a=sqrt(5)), U(-1/sqrt(in), 1/sqrt(in)); B zero."""

    def create():
        return lora.factors_of(nnx.state(Transformer(variant(), nnx.Rngs(0)), nnx.Param))

    with jax.set_mesh(one_mesh()):
        start = flat(jax.device_get(jax.jit(create)()))
    for path, w in start.items():
        if path.endswith("lora_B"):
            assert not w.any(), path
            continue
        inputs = w.shape[-3 if "gate_up" in path else -2]
        assert np.abs(w).max() <= inputs**-0.5, path
        # of 1,000 numbers and more; the standard error of a root mean square is below 2%
        if w.size > 1000:
            assert abs(np.sqrt(np.mean(w**2)) - (3 * inputs) ** -0.5) < 0.1 * inputs**-0.5, path
    stacks = [start[f"{stack}/self_attn/o_proj/lora_A"] for stack in ("layers", "dense_layers")]
    assert not np.array_equal(*stacks)


def test_what_the_base_is_held_in():
    """Matrices in base_dtype; norms, the router and what learns float32; the head not below bfloat16."""
    for base_dtype in ("float32", "bfloat16", "int8", "nf4"):
        options = dataclasses.replace(LORA, base_dtype=base_dtype, modules_to_save="embed_tokens")
        held = {}
        for path, v in nnx.to_flat_state(
            state.make_layout(variant(options), one_mesh()).model.abstract.params
        ):
            held["/".join(map(str, path))] = v.get_value()
        for path, w in held.items():
            name = path.rpartition("/")[2]
            if "norm" in path or "/gate/" in path or "lora_" in name or "embed_tokens" in path:
                assert w.dtype == jnp.float32, path
            elif base_dtype in quantized.KINDS and "lm_head" not in path:
                assert isinstance(w, quantized.KINDS[base_dtype]), path
            else:
                assert w.dtype == (jnp.float32 if base_dtype == "float32" else jnp.bfloat16), path


SMALL = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0)
INT8 = dataclasses.replace(LORA, base_dtype="int8", modules_to_save="embed_tokens")


def trained(lora_options, model=SMALL, **mesh):
    config = variant(lora_options, **{"remat": "none"} | mesh)
    return invariance.train(dataclasses.replace(config, model=model), 2)


@functools.cache
def one_device():
    return trained(INT8)


def assert_the_base_stays(run, options):
    before = invariance.initial_state(SMALL, options)
    for a, b in zip(jax.tree.leaves(run.state.frozen), jax.tree.leaves(before.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    after, start = flat(run.state.params), flat(before.params)
    for path, w in after.items():
        assert not np.array_equal(w, start[path]), path
    assert set(after) == {name for name, _ in run.gradients}
    assert "embed_tokens/weight" in after and "lm_head/kernel" not in after
    assert np.isfinite(run.losses).all() and run.losses[0] != run.losses[1]


@pytest.mark.slow
def test_the_base_stays():
    """Steps with weight decay: the base is bit for bit what it was, the rest moves, and nothing of the
    optimizer's state is of the base."""
    assert_the_base_stays(one_device(), INT8)


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_other_bases_stay(base_dtype):
    options = dataclasses.replace(INT8, base_dtype=base_dtype)
    assert_the_base_stays(trained(options, remat="full"), options)


@pytest.mark.parametrize(
    "mesh",
    [
        dict(fsdp=4, expert=2, capacity_factor=0.5),  # more than one round
        pytest.param(
            dict(
                fsdp=2,
                expert=2,
                tensor=2,
                dispatch="ring",
                strategy="shard_grad_op",
                accumulation=2,
                remat="full",
            ),
        ),
    ],
)
@pytest.mark.slow
def test_meshes(mesh):
    """Losses and gradients of one device, to rounding; the same choices of experts."""
    loss, gradient, name, counts = invariance.differences(trained(INT8, **mesh), one_device())
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


@pytest.mark.slow
def test_stages():
    """Layers over stages, the dense one in front of them, with a base of 4 bits."""
    model = dataclasses.replace(
        MODEL,
        num_hidden_layers=3,
        hidden_size=128,
        num_attention_heads=8,
        moe_intermediate_size=128,
    )
    options = dataclasses.replace(INT8, base_dtype="nf4")
    mesh = dict(data=2, stage=2, tensor=2, dispatch="all_gather", strategy="zero1", accumulation=2)
    run = trained(options, model, **mesh)
    loss, gradient, name, counts = invariance.differences(run, trained(options, model))
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


def test_few_bits_on_a_mesh():
    """A weight is the same to the bit on devices that hold parts of it, in both ways that layers take it."""
    kind, w = "nf4", matrix((2, 256, 2, 64))
    axes = ("experts", "expert_embed", "pair", "expert_mlp")
    config = variant(fsdp=2, expert=2, tensor=2)
    quantize = jax.jit(quantized.quantize, static_argnums=(0, 2))
    dequantized = jax.jit(lambda q: quantized.dequantized(q.parts, jnp.float32))
    whole, kernel = quantize(kind, w, -3), quantize(kind, w[0, :, 0], -2)
    wanted = np.asarray(dequantized(whole))
    with jax.set_mesh(make_mesh(config, jax.devices())):
        held = nnx.State(
            {
                "experts": nnx.Param(whole, out_sharding=axes, eager_sharding=False),
                "kernel": nnx.Param(kernel, out_sharding=("embed", "mlp"), eager_sharding=False),
            }
        )
        specs = sharding.specs(held, sharding.storage_rules(config)[0])
        placed = jax.tree.map(jax.device_put, held, specs)
        largest = jax.tree.leaves(placed["experts"])[0]
        assert largest.addressable_shards[0].data.size * 8 == largest.size

        @jax.jit
        def use(placed):
            arrays, specs = weights.stored_arrays(placed["experts"])

            def one_device(*arrays):
                return weights.gather_on_device(arrays, specs, jnp.float32)

            out = jax.P(("data", "fsdp", "expert"), None, None, "tensor")
            gathered = per_device(one_device, tuple(specs), out)(*arrays)
            return gathered, weights.gather_for_use(placed["kernel"], jnp.float32)

        gathered, used = use(placed)
    by_fsdp = np.asarray(gathered).reshape(2, 2, *w.shape[1:])  # each has this device's expert
    np.testing.assert_array_equal(by_fsdp[:, :, :].reshape(2, *w.shape), np.stack([wanted] * 2))
    np.testing.assert_array_equal(used, dequantized(kernel))


@pytest.mark.slow
def test_gradients_of_the_base_are_not_made():
    """FLOPs of the lowered step: less than those of full training, by about a third of the products."""
    flops = {}
    for name, options in {"full": LoraConfig(), "lora": dataclasses.replace(LORA, r=1)}.items():
        config = dataclasses.replace(variant(options), model=SMALL)
        mesh = one_mesh()
        with jax.set_mesh(mesh):
            layout = state.make_layout(config, mesh)
            train_step = jax.jit(step.make_train_step(config, layout, objectives.make(config)))
            batch = put_batch(invariance.rows(0), config.micro_batch, mesh)
            cost = train_step.lower(layout.abstract_sharded(), batch).cost_analysis()
        flops[name] = cost["flops"]
    assert flops["lora"] < 0.85 * flops["full"], flops


# ------------------------------------------------------------------------------ dropout


def test_dropout_follows_from_row_layer_map_and_place():
    """Shares, scale, and that neither mesh nor order nor neighbours change what is dropped."""
    rate, shape = 0.25, (8, 16, 64)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = np.arange(8, dtype=np.int32) + 100

    def dropped(x, rows, layer=3, site=1, **mesh):
        with conversion.on_mesh(conversion.config_of(MODEL, **mesh)):

            @jax.jit
            def run(x, rows):
                with noise.of_layer(noise.Place(0, rows, jnp.int32(layer))):
                    return noise.dropped(x, rate, site)

            return np.asarray(run(conversion.put(x), conversion.put(rows)))

    out = dropped(x, rows)
    kept = out != 0
    np.testing.assert_allclose(out[kept], x[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    np.testing.assert_array_equal(dropped(x, rows, fsdp=4, expert=2), out)
    np.testing.assert_array_equal(dropped(x[::-1], rows[::-1])[::-1], out)
    for other in (dropped(x, rows + 8), dropped(x, rows, layer=2), dropped(x, rows, site=0)):
        assert abs(((other != 0) == kept).mean() - (0.75**2 + 0.25**2)) < 0.05
    np.testing.assert_array_equal(dropped(x, np.full_like(rows, -1)), x)  # held out
    assert noise.dropped(x, rate, 1) is x  # outside of training


# ------------------------------------------------------------------------------ few bits


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.05


def held(kind, w, inputs):
    @jax.jit
    def through(w):
        out = quantized.quantize(kind, w, inputs)
        assert out.shape == w.shape and out.ndim == w.ndim
        return quantized.dequantized(out.parts, jnp.float32)

    return np.asarray(through(w), np.float64)


@pytest.mark.parametrize(
    "shape, inputs", [((128, 24), -2), ((3, 128, 24), -2), ((3, 128, 2, 24), -3)]
)
def test_int8(shape, inputs):
    """Every number within half a step of its output's, by float64; the largest of an output exactly."""
    w = matrix(shape)
    w[..., 0] = 0  # an output of zeros
    largest = np.abs(w.astype(np.float64)).max(axis=inputs, keepdims=True)
    error = np.abs(held("int8", w, inputs) - w)
    assert (error <= largest / 127 / 2 * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(
    "shape, inputs", [((128, 24), -2), ((3, 128, 24), -2), ((3, 128, 2, 24), -3)]
)
def test_nf4(shape, inputs):
    """A second implementation, in float64: blocks along the inputs, the nearest number, scales in 8 bits."""
    w = matrix(shape)
    exact = np.moveaxis(w.astype(np.float64), inputs, -1)
    blocks = exact.reshape(*exact.shape[:-1], -1, 64)
    largest = np.abs(blocks).max(-1)
    mean = largest.mean(-1, keepdims=True)
    step = np.abs(largest - mean).max(-1, keepdims=True) / 127
    scale = np.round((largest - mean) / step) * step + mean
    book = np.array(quantized.NF4)
    nearest = np.abs(blocks[..., None] / largest[..., None, None] - book).argmin(-1)
    wanted = (book[nearest] * scale[..., None]).reshape(exact.shape)
    ours = np.moveaxis(held("nf4", w, inputs), inputs, -1)
    # a number in the middle between two of NF4 may go to either in float32
    differ = np.abs(ours - wanted) > 1e-6 * np.abs(w).max()
    assert differ.mean() < 1e-3
    gap = np.diff(book).max() / 2
    bound = largest * gap + np.abs(scale - largest)
    assert (np.abs(ours - exact).reshape(blocks.shape) <= bound[..., None] * (1 + 1e-5)).all()
    assert (np.abs(scale - largest) <= step / 2 * (1 + 1e-9)).all()


def test_nf4_numbers():
    """The paper's construction in float64: quantiles of a normal distribution, 8 above zero and 7 below,
    between the probabilities 1 - offset and offset, divided by the largest."""
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    book = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(quantized.NF4, book, atol=2e-7)  # the paper prints float32


def test_bits():
    """Bytes of a large matrix: 4.1 and 8 bits for each number."""
    w = jax.ShapeDtypeStruct((2048, 1408), jnp.float32)
    for kind, bits in {"int8": 8.016, "nf4": 4.156}.items():
        parts = quantized.abstract(kind, w, ("embed", "mlp")).parts
        size = sum(a.size * a.dtype.itemsize for a in parts) * 8 / w.size
        assert abs(size - bits) < 0.01, (kind, size)


def test_counts():
    """The share that learns is said; FLOPs per token are 4 of a base weight and 6 of a factor."""
    config = variant()
    layout = state.make_layout(config, make_mesh(config, jax.devices()[:1]))
    table = layout.multipliers.table()
    sizes = {path: w.size for path, w in abstract(LORA).items()}
    factors = {p: n for p, n in sizes.items() if lora.is_factor(p.split("/"))}
    share = sum(factors.values()) / sum(sizes.values())
    assert f"({share:.1%})" in table[-1] and "r=4" in table[1]
    plain = count(MODEL, abstract_model(variant(LoraConfig()))[1], 0)
    ours = count(MODEL, abstract_model(config)[1], 0)
    assert ours[:3] == plain[:3]
    # two of four experts, of each token
    active = sum(n // 2 if "/experts/" in p else n for p, n in factors.items())
    wanted = plain.flops_per_token * 4 / 6 + 6 * active
    assert ours.flops_per_token == pytest.approx(wanted, rel=1e-12)


def test_defaults_are_of_no_lora():
    assert Config().lora == LoraConfig() and not Config().lora.r
