"""Adapters in PEFT's files: what we write PEFT loads, with the same logits, gradients and merged weights;
what PEFT writes, in any form, we load."""

import copy
import dataclasses
import json
import types

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from deepseek_jax import hf
from deepseek_jax.config.options import LoraConfig, OptimizerConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import adapter, names, reader
from deepseek_jax.hf import peft as files
from deepseek_jax.model import lora
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.tensorfile import regions
from deepseek_jax.train.optimizer import make_optimizer
from tests.support import adapters, conversion, hf_families, hf_variants

RTOL = 1e-5  # float32 sums in another order, of the largest number of an array
R, ALPHA = 4, 6.0


@pytest.fixture(
    scope="module", params=[pytest.param("qwen3_moe", marks=pytest.mark.slow), "deepseek_v3"]
)
def case(request, tmp_path_factory):
    """A checkpoint, an adapter of it that we wrote, and the model of PEFT with both."""
    import peft

    folder = tmp_path_factory.mktemp(request.param)
    hf_families.save(request.param, folder)
    source, model, family = reader.open_source(str(folder))
    source.close()
    config = adapters.adapted(model, r=R, alpha=ALPHA)
    arrays = adapters.random_factors(config)
    ours = adapter.of_run(arrays, config.lora, model, family, str(folder))
    written = folder / "adapter"
    written.mkdir()
    files.write(str(written), ours, model)
    theirs = peft.PeftModel.from_pretrained(base_of(folder), written, is_trainable=True)
    ids = pick_ids(request.param)
    return types.SimpleNamespace(**locals())


def base_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def pick_ids(variant):
    if variant in hf_families.VARIANTS:
        return hf_families.pick_ids(hf_families.build(variant))
    return hf_variants.pick_ids(hf_variants.build(variant)[0], candidates=32)


def merged(folder, model, family, given):
    """{hub name: float32 array} of a checkpoint with an adapter, by our reader."""
    source, _, _ = reader.open_source(str(folder))
    out = {}
    _, params, _ = abstract_model(conversion.config_of(model))
    for leaf in names.leaves(params, family, model):
        whole = regions.whole(leaf.shape)
        a = reader.read_part(source, leaf, whole, np.dtype(np.float32), given)
        for piece in names.tensor_regions(leaf, whole):
            out[piece.name] = np.array(names.view(a, leaf, piece.at))
    source.close()
    return out


def hub_of(theirs):
    """{hub name: float32 array} of a transformers model."""
    named = [(n, p.detach().numpy()) for n, p in theirs.named_parameters()]
    return hf_variants._hub(named)


def test_every_factor_is_loaded(case):
    """PEFT passes over keys that it does not know without a word: so all must be where we wrote them."""
    theirs = adapters.of_peft(
        ((n, p.detach()) for n, p in case.theirs.named_parameters()), case.model
    )
    assert theirs.keys() == case.ours.factors.keys()
    for name, (a, b) in theirs.items():
        np.testing.assert_array_equal(a, case.ours.factors[name].a, err_msg=name)
        np.testing.assert_array_equal(b, case.ours.factors[name].b, err_msg=name)


def gradients_of_peft(theirs, case):
    """(loss, logits, {hub name: gradients of A and B}) of PEFT's model: in the form that it makes of experts
    for transformers 5, gate and up fused with a block-diagonal B and twice the rank and alpha."""
    ids = torch.as_tensor(case.ids)
    theirs.zero_grad()
    out = theirs(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = ((name, p.grad) for name, p in theirs.named_parameters() if p.grad is not None)
    return out.loss.item(), out.logits.detach().numpy(), adapters.of_peft(grads, case.model)


def keep_apart(theirs, model):
    """Zeros again where PEFT's B of gate and up together is not block-diagonal: an update of the fused form
    would let each of them learn of the other's A, which no adapter of one entry per expert can."""
    width, experts = model.moe_intermediate_size, model.n_routed_experts
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "experts.base_layer.lora_B" in name:
                blocks = p.view(2, width, 2, R, experts)
                blocks[0, :, 1] = 0
                blocks[1, :, 0] = 0


def test_logits_and_gradients_over_a_step(case):
    """Of the model with the adapter beside its weights, before and after an update by each side's AdamW.

    eps is large: where a gradient is nearly 0, the first update of Adam is its sign otherwise, and so the
    rounding error of either side.
    """
    o = OptimizerConfig(
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.1,
        eps=1e-3,
        grad_clip=0.0,
    )
    config = dataclasses.replace(
        case.config, model=conversion.smaller(case.model, aux_loss_alpha=0.0), optimizer=o
    )
    theirs, ours = copy.deepcopy(case.theirs), hf.load(str(case.folder))
    factors = [p for name, p in theirs.named_parameters() if "lora_" in name]
    adamw = torch.optim.AdamW(factors, o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay)

    def run(params, bias, batch):
        def loss_of(factors):
            merged = nnx.merge_state(params, factors)
            net = conversion.Recorder(conversion.model_of(config)(merged, bias))
            loss = conversion.loss_of(net, batch, config)
            return loss, net.logits(net.out.hidden_BSD)

        return jax.value_and_grad(loss_of, has_aux=True)(lora.factors_of(params))

    def updated(params, grads):
        factors = lora.factors_of(params)
        optimizer = make_optimizer(config, factors)
        updates, _ = optimizer.update(grads, optimizer.init(factors), factors)
        return nnx.merge_state(params, optax.apply_updates(factors, updates))

    with conversion.on_mesh(config):
        params = adapters.with_factors(ours.params, case.arrays, config)
        params = conversion.place(params, config)
        rows = conversion.batch_of(case.ids.astype(np.int32))
        batch = {k: conversion.put(np.asarray(a)) for k, a in rows.items()}
        compiled = jax.jit(run)
        for is_last in (False, True):
            wanted_loss, wanted_logits, wanted = gradients_of_peft(theirs, case)
            (loss, logits), grads = compiled(params, ours.bias, batch)
            conversion.assert_close(logits, wanted_logits, RTOL, "logits")
            assert abs(loss - wanted_loss) < RTOL * wanted_loss
            flat = {
                conversion.path_of(path): np.asarray(g)
                for path, g in jax.tree_util.tree_leaves_with_path(grads)
            }
            found = adapter.of_run(flat, config.lora, case.model, case.family)
            assert found.factors.keys() == wanted.keys()
            for name, (a, b) in wanted.items():
                conversion.assert_close(found.factors[name].a, a, RTOL, f"A of {name}")
                conversion.assert_close(found.factors[name].b, b, RTOL, f"B of {name}")
            if is_last:
                break
            adamw.step()
            keep_apart(theirs, case.model)
            params = jax.jit(updated)(params, grads)


def test_merged_weights(case):
    import peft

    theirs = peft.PeftModel.from_pretrained(base_of(case.folder), case.written).merge_and_unload()
    wanted = hub_of(theirs)
    given = files.read(str(case.written), case.model, case.family)
    for name, a in merged(case.folder, case.model, case.family, given).items():
        conversion.assert_close(a, wanted[name], RTOL, name)


def test_what_peft_saves_of_ours_is_ours(case, tmp_path):
    """PEFT saves the fused form, whose blocks are taken apart again: rank, scale and numbers are the same."""
    case.theirs.save_pretrained(tmp_path)
    back = files.read(str(tmp_path), case.model, case.family)
    assert (back.lora.r, back.lora.scale) == (R, ALPHA / R)
    assert back.factors.keys() == case.ours.factors.keys()
    for name, factors in back.factors.items():
        assert factors.scale == ALPHA / R
        np.testing.assert_array_equal(factors.a, case.ours.factors[name].a)
        np.testing.assert_array_equal(factors.b, case.ours.factors[name].b)
    again = adapter.for_run(back, case.model, case.family, "")
    assert again.keys() == case.arrays.keys()
    for path, a in again.items():
        np.testing.assert_array_equal(a, case.arrays[path], err_msg=path)


def test_param_wrapper(case, tmp_path):
    """An adapter that PEFT made for transformers 5: gate and up share A; patterns of rank and alpha."""
    import peft

    options = peft.LoraConfig(
        r=R,
        lora_alpha=7,
        target_modules=["q_proj", "o_proj", "q_b_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"o_proj": 2, r".*\.down_proj": 3},
        alpha_pattern={"model.layers.1.self_attn.o_proj": 5},
        modules_to_save=["lm_head"],
    )
    theirs = peft.get_peft_model(base_of(case.folder), options)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    given = files.read(str(tmp_path), case.model, case.family)
    wanted = hub_of(theirs.merge_and_unload())
    for name, a in merged(case.folder, case.model, case.family, given).items():
        conversion.assert_close(a, wanted[name], RTOL, name)
    with pytest.raises(UserError, match="in one array"):
        adapter.for_run(given, case.model, case.family, "it")


def test_param_wrapper_of_an_old_peft(case, tmp_path):
    """Up to 0.18 a parameter [E, out, in] was taken for [E, in, out]: in and out change places."""
    m = case.model
    e, d, f = m.n_routed_experts, m.hidden_size, m.moe_intermediate_size
    rng = np.random.default_rng(0)
    tensors, deltas = {}, {}
    module = "base_model.model.model.layers.1.mlp.experts"
    for key, shape in {f"{module}.base_layer": (2 * f, d), module: (d, f)}.items():
        a = rng.standard_normal((R * e, shape[0])).astype(np.float32)
        b = rng.standard_normal((shape[1], R * e)).astype(np.float32)
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        parts = a.reshape(e, R, -1), b.reshape(shape[1], R, e)
        deltas[key] = np.einsum("ore,eri->eio", parts[1], parts[0]) * 2.0
    given = files.read(write(tmp_path, tensors, r=R, lora_alpha=2 * R), m, case.family)
    gate_up, down = deltas.values()
    for i in range(e):
        for name, delta in {
            "gate_proj": gate_up[i, :f],
            "up_proj": gate_up[i, f:],
            "down_proj": down[i],
        }.items():
            factors = given.factors[f"model.layers.1.mlp.experts.{i}.{name}.weight"]
            ours = factors.scale * factors.b @ factors.a
            conversion.assert_close(ours, delta, RTOL, name)


def test_rank_stabilised_is_written_without(case, tmp_path):
    """PEFT makes sqrt(2 r) of the rank of gate and up together, and so another scale."""
    import peft

    lora = LoraConfig(r=R, alpha=ALPHA, use_rslora=True)
    given = adapter.of_run(case.arrays, lora, case.model, case.family)
    files.write(str(tmp_path), given, case.model)
    theirs = peft.PeftModel.from_pretrained(base_of(case.folder), tmp_path)
    layers = (m for m in theirs.modules() if isinstance(getattr(m, "scaling", None), dict))
    scales = {scale for m in layers for scale in m.scaling.values()}
    assert all(abs(s - ALPHA / R**0.5) < 1e-6 for s in scales) and scales


def test_modules_to_save(case, tmp_path):
    """Embedding and head go into the file whole, and PEFT takes them from there."""
    import peft

    rng = np.random.default_rng(1)
    shape = case.model.vocab_size, case.model.hidden_size
    embed, head = (rng.standard_normal(s).astype(np.float32) for s in (shape, shape[::-1]))
    whole = {"embed_tokens/weight": embed, "lm_head/kernel": head}
    lora = dataclasses.replace(case.config.lora, modules_to_save="embed_tokens,lm_head")
    given = adapter.of_run(case.arrays | whole, lora, case.model, case.family)
    files.write(str(tmp_path), given, case.model)
    wanted = hub_of(
        peft.PeftModel.from_pretrained(base_of(case.folder), tmp_path).merge_and_unload()
    )
    np.testing.assert_array_equal(wanted["model.embed_tokens.weight"], embed)
    np.testing.assert_array_equal(wanted["lm_head.weight"], head.T)
    back = files.read(str(tmp_path), case.model, case.family)
    assert set(back.lora.saved) == {"embed_tokens", "lm_head"}
    again = adapter.for_run(back, case.model, case.family, "")
    assert all(np.array_equal(again[path], a) for path, a in whole.items())


def write(folder, tensors, **config):
    """An adapter's folder, by the library of safetensors."""
    safetensors.numpy.save_file(tensors, folder / files.WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return str(folder)


Q = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(bias="all"), "bias='all'"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (dict(layer_replication=[[0, 2]]), "layer_replication=.* is not known"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(r=0), "r=0 is no number"),
        (dict(lora_alpha="8"), "lora_alpha='8'"),
        (dict(rank_pattern={"(a+)+": 4}), "only names and"),
        (dict(rank_pattern={"o_proj": 8}), "has rank 4, and adapter_config.json says 8"),
    ],
)
def test_refused_configs(config, said, case, tmp_path):
    d, out = case.model.hidden_size, case.model.num_attention_heads * case.model.value_head_dim
    tensors = {
        f"{Q}.lora_A.weight": np.ones((R, out), np.float32),
        f"{Q}.lora_B.weight": np.ones((d, R), np.float32),
    }
    folder = write(tmp_path, tensors, **dict(r=R, lora_alpha=8) | config)
    with pytest.raises(UserError, match=said) as e:
        files.read(folder, case.model, case.family)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({f"{Q}.lora_A.weight": (R, 3), f"{Q}.lora_B.weight": (5, R)}, "which is .* in this model"),
        ({f"{Q}.lora_A.weight": (R, 3)}, "not two matrices"),
        ({f"{Q}.lora_A.weight": (R, 3), f"{Q}.lora_B.weight": (5, 2)}, "do not fit"),
        ({f"{Q}.lora_magnitude_vector": (3,)}, "is not known"),
        ({f"{Q}.{'a.' * 999}lora_A.weight": (R, 3)}, "is not known"),
        ({"base_model.model.model.layers.99.mlp.experts.lora_A.weight": (R, 3)}, "not two"),
    ],
)
def test_refused_tensors(tensors, said, case, tmp_path):
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    folder = write(tmp_path, arrays, r=R, lora_alpha=8)
    with pytest.raises(UserError, match=said):
        files.read(folder, case.model, case.family)


def test_a_head_with_factors_is_merged_and_not_trained(case, tmp_path):
    """Which training could only leave out."""
    d, v = case.model.hidden_size, case.model.vocab_size
    head = "base_model.model.lm_head"
    rng = np.random.default_rng(0)
    tensors = {
        f"{head}.lora_A.weight": rng.normal(size=(R, d)).astype(np.float32),
        f"{head}.lora_B.weight": rng.normal(size=(v, R)).astype(np.float32),
    }
    given = files.read(write(tmp_path, tensors, r=R, lora_alpha=8), case.model, case.family)
    a, b = tensors.values()
    before = merged(case.folder, case.model, case.family, None)["lm_head.weight"]
    after = merged(case.folder, case.model, case.family, given)["lm_head.weight"]
    np.testing.assert_allclose(after - before, 2 * b @ a, atol=1e-4)  # 8 / R; differences of ones
    with pytest.raises(UserError, match="HERE: it has a low-rank update of lm_head.weight"):
        adapter.for_run(given, case.model, case.family, "HERE")


def test_refused_files(case, tmp_path):
    """A pickle may run code: it is named, and not opened."""
    with pytest.raises(UserError, match="holds no adapter"):
        files.read(str(tmp_path), case.model, case.family)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="is a pickle"):
        files.read(str(tmp_path), case.model, case.family)
    nan = {f"{Q}.lora_A.weight": np.full((R, 4), np.nan, np.float32)}
    with pytest.raises(UserError, match="not finite"):
        files.read(write(tmp_path, nan, r=R, lora_alpha=8), case.model, case.family)
