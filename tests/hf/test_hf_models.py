"""Hugging Face checkpoints in and out, against transformers: every family, in float32 on the CPU."""

import contextlib
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from deepseek_jax import hf
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration, exporter, names
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.model import moe
from tests.support import conversion
from tests.support import hf_families as families
from tests.support import hf_variants as deepseek

# Of the largest logit, or of the gradient's norm: rounding of float32 in sums of another order. Measured:
# 1.2e-6 and 4e-6.
RTOL = 1e-5


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """variant -> (transformers model, folder with its checkpoint, config.json as on the hub)."""

    @functools.cache
    def make(variant):
        folder = tmp_path_factory.mktemp(variant)
        return families.save(variant, folder), str(folder)

    return make


def hub_arrays(model, params, bias):
    """{hub name: array} of a state, by the name tables."""
    out = {}
    for state in (params, bias):
        for leaf, a in zip(
            names.leaves(state, model.family, model.config),
            map(np.asarray, jax.tree.leaves(state)),
            strict=True,
        ):
            whole = tuple(slice(0, n) for n in leaf.shape)
            out |= {p.name: names.view(a, leaf, p.at) for p in names.tensor_regions(leaf, whole)}
    return out


@contextlib.contextmanager
def chosen_experts(monkeypatch):
    """Collects what every call of the router chose, in order, sorted by expert."""
    seen, route = [], moe.route

    def noting(*args):
        routing = route(*args)
        jax.debug.callback(
            lambda e: seen.append(np.sort(e, axis=-1)), routing.expert_TK, ordered=False
        )
        return routing

    with monkeypatch.context() as m:
        m.setattr(moe, "route", noting)
        yield seen


ON_A_MESH = "glm4_moe-qknorm-group"
WITHOUT_GRADIENTS = (
    "glm4_moe",
    "qwen3_moe",
    "qwen3_moe-nonorm",
    "qwen3",
    "youtu",
    "dots1",
)  # compiling takes long; others have all their parts
SLOW = (
    "mistral",
    "qwen3",  # in test_hf_small_widths.py
    "seed_oss",
    "solar_open",
    "mixtral",
    "glm4_moe",
    "glm4_moe-qknorm-group",
    "qwen3_moe-nonorm",
)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in families.VARIANTS],
)
def test_logits_experts_loss_and_every_gradient(variant, folder_of, monkeypatch):
    theirs, folder = folder_of(variant)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor")) if variant == ON_A_MESH else None
    ids = families.pick_ids(theirs, batch=4 if mesh else 2)
    choices, logits, loss, grads = families.run(theirs, ids)
    model = hf.load(folder, mesh=mesh)
    batch = {k: a.astype(np.int32) for k, a in conversion.batch_of(ids).items()}
    with jax.set_mesh(model.mesh), chosen_experts(monkeypatch) as seen:

        @jax.jit
        def run(params, bias, batch):
            def loss_of(params):
                net = conversion.Recorder(model.layout.merge(params, bias))
                loss = conversion.loss_of(net, batch, model.full_config)
                return loss, net.logits(net.out.hidden_BSD)

            if variant in WITHOUT_GRADIENTS:
                return *loss_of(params), {}
            (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            return loss, logits, grads

        batch = {k: conversion.put(a) for k, a in batch.items()}
        our_loss, our_logits, our_grads = jax.block_until_ready(
            run(model.params, model.bias, batch)
        )
        jax.effects_barrier()
    assert np.abs(our_logits - logits).max() < 1e-4
    conversion.assert_close(our_logits, logits, RTOL, "logits")
    assert abs(float(our_loss) - loss) < RTOL * loss
    for i, layer in enumerate(
        () if mesh else choices
    ):  # forward, layer by layer, before backward makes them again
        np.testing.assert_array_equal(seen[i], choices[layer], err_msg=f"experts of layer {layer}")
    if variant in WITHOUT_GRADIENTS:
        return
    ours = hub_arrays(model, our_grads, model.bias)
    assert set(grads) == set(ours) - {n for n in ours if n.endswith("e_score_correction_bias")}
    for name, g in grads.items():
        conversion.assert_close(ours[name], g, 1e-4, f"gradient of {name}")
        norm = np.linalg.norm(g)
        assert abs(np.linalg.norm(ours[name]) - norm) <= 1e-3 * norm, name


def assert_same_options(found, expected):
    differ = {f for f in expected.__dataclass_fields__ if getattr(expected, f) != getattr(found, f)}
    assert all(not configuration.computes(expected, f) for f in differ), differ


@pytest.mark.parametrize("variant", deepseek.VARIANTS)
def test_deepseek_options(variant):
    expected = ModelConfig(**deepseek.SHAPES | deepseek.VARIANTS[variant][1])
    assert_same_options(configuration.to_model(deepseek.hub_config(variant)), expected)


# The others' weights have names and shapes of these.
OF_ALL_SHAPES = ("deepseek_v2-lite", "deepseek_v3", "deepseek_v3-tied", "deepseek_v3-mtp")


@pytest.mark.parametrize(
    "variant",
    [
        v if v in OF_ALL_SHAPES else pytest.param(v, marks=pytest.mark.slow)
        for v in deepseek.VARIANTS
    ],
)
def test_deepseek_weights_and_options(variant, folder_of):
    """test_transformers.py shows that these weights and options give transformers' numbers."""
    theirs, folder = folder_of(variant)
    _, expected, weights = deepseek.build(variant)
    model = hf.load(folder)
    assert_same_options(model.config, expected)
    params, bias = conversion.to_state(weights, expected)
    for ours, theirs_ in ((model.params, params), (model.bias, bias)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs_), strict=True):
            np.testing.assert_array_equal(a, b)


# Of a family that has another variant here.
AGAIN = ("glm4_moe", "qwen3_moe-nonorm", "moonlight", "deepseek_v3-tied")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=pytest.mark.slow) if v in AGAIN else v
        for v in (*families.VARIANTS, "deepseek_v2-lite", "deepseek_v3-yarn", *AGAIN[2:])
    ],
)
def test_transformers_loads_what_is_saved(variant, folder_of, tmp_path):
    theirs, folder = folder_of(variant)
    hf.save(hf.load(folder), str(tmp_path / "out"))
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    ids = torch.as_tensor(
        families.pick_ids(theirs)
        if variant in families.VARIANTS
        else deepseek.pick_ids(theirs, candidates=8)
    )
    with torch.no_grad():
        assert torch.equal(
            back.eval()(input_ids=ids, use_cache=False).logits,
            theirs(input_ids=ids, use_cache=False).logits,
        )
    before, after = (
        safetensors.torch.load_file(f"{d}/model.safetensors") for d in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_config_in_either_style_means_the_same_model(folder_of, tmp_path):
    """transformers 5 writes rope_parameters, dtype and its own names of experts; the hub has older keys."""
    for variant in families.VARIANTS:
        theirs, _ = folder_of(variant)
        theirs.config.save_pretrained(tmp_path)
        new = json.loads((tmp_path / "config.json").read_text())
        old = families.hub_config(variant)
        assert ("rope_parameters" in new) and ("rope_theta" in old)
        assert configuration.to_model(new) == configuration.to_model(old), variant


def test_a_model_finds_its_family():
    for variant in families.VARIANTS:
        config = families.hub_config(variant)
        model = configuration.to_model(config)
        found = configuration.find_family(model)
        again = configuration.to_model(configuration.from_model(model, found))
        assert all(
            getattr(again, f) == getattr(model, f) or not configuration.computes(model, f)
            for f in model.__dataclass_fields__
        )
    assert (
        configuration.find_family(configuration.to_model(deepseek.hub_config("deepseek_v3-mtp")))
        == "deepseek_v3"
    )
    with pytest.raises(UserError, match="no family of Hugging Face"):
        configuration.find_family(
            conversion.smaller(
                configuration.to_model(deepseek.hub_config("deepseek_v3")), scoring_func="softmax"
            )
        )


def test_a_mesh_has_the_same_weights(folder_of):
    """test_logits... shows the same of logits and gradients."""
    _, folder = folder_of(ON_A_MESH)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    spread, alone = hf.load(folder, mesh=mesh), hf.load(folder)
    for a, b in zip(
        jax.tree.leaves((spread.params, spread.bias)),
        jax.tree.leaves((alone.params, alone.bias)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert spread.params["layers"]["mlp"]["experts"]["down_proj"].get_value().sharding.shard_shape(
        (2, 8, 28, 48)
    ) == (2, 2, 14, 48)  # experts over expert and fsdp, the width over tensor


def test_calling_a_model(folder_of):
    """Any number of rows, on any mesh; what is no batch of ids is refused."""
    theirs, folder = folder_of("llama")
    ids = families.pick_ids(theirs, batch=3)
    with torch.no_grad():
        expected = theirs(input_ids=torch.as_tensor(ids), use_cache=False).logits.numpy()
    model = hf.load(folder, mesh=jax.make_mesh((2,), ("fsdp",)))
    logits = model(ids.tolist())
    assert logits.dtype == jnp.float32
    conversion.assert_close(logits, expected, RTOL, "logits")
    for wrong in ([1, 2], [[0.5]], [[-1]], [[96]], [[0] * 129]):
        with pytest.raises(UserError):
            model(wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_round_trip_is_exact_in_the_stored_dtype(dtype, folder_of, tmp_path):
    """Files with an index, from a mesh that divides rows, columns and experts; MTP layers with copies."""
    _, folder = folder_of("deepseek_v3-mtp")
    wanted = {
        n: t if n.endswith("e_score_correction_bias") else t.to(getattr(torch, dtype))
        for n, t in safetensors.torch.load_file(f"{folder}/model.safetensors").items()
    }
    for layer in (3, 4):
        wanted |= {
            f"model.layers.{layer}.embed_tokens.weight": wanted[
                "model.embed_tokens.weight"
            ].clone(),
            f"model.layers.{layer}.shared_head.head.weight": wanted["lm_head.weight"].clone(),
        }
    source = tmp_path / "source"
    source.mkdir()
    safetensors.torch.save_file(wanted, source / "model.safetensors")
    (source / "config.json").write_text(open(f"{folder}/config.json").read())
    model = hf.load(str(source), mesh=jax.make_mesh((2, 4), ("fsdp", "expert")))
    arrays = {
        names.path_of(p): a
        for state in (model.params, model.bias)
        for p, a in jax.tree_util.tree_leaves_with_path(state)
    }
    leaves = [
        leaf
        for state in (model.params, model.bias)
        for leaf in names.leaves(state, model.family, model.config)
    ]
    what = exporter.Export(
        model.config,
        model.family,
        leaves,
        lambda leaf: arrays[leaf.path],
        Companions(model.source),
        model.notes,
        file_bytes=60_000,
    )
    exporter.export(str(tmp_path / "out"), what)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert len(set(index.values())) > 3 and set(index) == set(wanted)
    for file in set(index.values()):
        for name, t in safetensors.torch.load_file(tmp_path / "out" / file).items():
            assert (
                index[name] == file
                and t.dtype == wanted[name].dtype
                and torch.equal(t, wanted[name])
            ), name
    again = hf.load(str(tmp_path / "out"))
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fused_experts(folder_of, tmp_path):
    """All experts in one tensor, as transformers has them in memory."""
    for variant in ("mixtral", "qwen3_moe"):
        theirs, folder = folder_of(variant)
        fused = tmp_path / variant
        fused.mkdir()
        safetensors.torch.save_file(
            {n: t.contiguous() for n, t in theirs.state_dict().items()}, fused / "model.safetensors"
        )
        assert any(n.endswith("experts.gate_up_proj") for n in theirs.state_dict())
        (fused / "config.json").write_text(json.dumps(families.hub_config(variant)))
        mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
        for a, b in zip(
            jax.tree.leaves(hf.load(str(fused), mesh=mesh).params),
            jax.tree.leaves(hf.load(folder).params),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def quantise(w, block=128):
    """(float8_e4m3fn, float32 scale of each block) of a float32 matrix, as DeepSeek-V3's release."""
    high, wide = (-(-n // block) for n in w.shape)
    padded = torch.zeros(high * block, wide * block)
    padded[: w.shape[0], : w.shape[1]] = w
    blocks = padded.view(high, block, wide, block)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    q = (
        (blocks / scale[:, None, :, None])
        .view(high * block, wide * block)[: w.shape[0], : w.shape[1]]
        .to(torch.float8_e4m3fn)
    )
    return q.contiguous(), scale


def test_block_quantised_fp8(folder_of, tmp_path):
    """Blocks of 16 where matrices have 28, 48, 80 and more rows: edge blocks on every side, cut by shards."""
    _, folder = folder_of("deepseek_v3")
    block, stored, expected = 16, {}, {}
    for name, t in safetensors.torch.load_file(f"{folder}/model.safetensors").items():
        if t.ndim == 2 and re_projection(name):
            q, scale = quantise(t, block)
            stored |= {name: q, name + "_scale_inv": scale}
            expected[name] = (
                q.float()
                * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[
                    : t.shape[0], : t.shape[1]
                ]
            )
        else:
            stored[name] = expected[name] = t
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    config = json.loads(open(f"{folder}/config.json").read())
    config["quantization_config"] = dict(
        activation_scheme="dynamic",
        fmt="e4m3",
        quant_method="fp8",
        weight_block_size=[block, block],
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    for mesh in (None, jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))):
        model = hf.load(str(tmp_path), mesh=mesh)
        for name, a in hub_arrays(model, model.params, model.bias).items():
            np.testing.assert_array_equal(a, expected[name].numpy(), err_msg=name)


def re_projection(name):
    return name.endswith(("proj.weight", "proj_with_mqa.weight"))


def test_dtype_of_the_loaded_weights(folder_of):
    _, folder = folder_of("qwen3_moe")
    params = hf.load(folder, dtype="bfloat16").params["layers"]
    assert params["mlp"]["experts"]["down_proj"].get_value().dtype == jnp.bfloat16
    assert (
        params["mlp"]["gate"]["kernel"].get_value().dtype
        == params["input_layernorm"]["weight"].get_value().dtype
        == jnp.float32
    )
    with pytest.raises(UserError, match="dtype"):
        hf.load(folder, dtype="int8")
    with pytest.raises(UserError, match="exists already"):
        hf.save(hf.load(folder), os.path.dirname(folder))
