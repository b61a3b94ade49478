"""Models with a shared core in and out, against the guide's own format in torch
(tests/support/checkpoint0.py): the same numbers read, written, differentiated, multiplied out."""

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from deepseek_jax import hf
from deepseek_jax.compress import __main__ as compress
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names
from tests.support import checkpoint0, conversion, evaluation

RANK = 3
# Of the largest logit: float32 sums of another order, through two layers.
RTOL = 1e-5
IDS = np.random.default_rng(0).integers(0, 300, (2, 16))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """(the torch model, its folder)."""
    folder = tmp_path_factory.mktemp("checkpoint-0")
    model = checkpoint0.build(evaluation.write_model(folder), RANK, 0)
    checkpoint0.write(model, folder)
    return model, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """As `student`, of the layer with experts alone: half of the program."""
    folder = tmp_path_factory.mktemp("alone")
    model = evaluation.write_model(folder)
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers, model.config.mlp_only_layers = 1, []
    model = checkpoint0.build(model, RANK, 0)
    model.config.save_pretrained(folder)
    checkpoint0.write(model, folder)
    return model, folder


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids), use_cache=False).logits.numpy()


@pytest.fixture(scope="module")
def loaded(student):
    return hf.load(str(student[1]))


@pytest.mark.slow
def test_a_mesh_computes_the_same(student, loaded):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    spread = hf.load(str(student[1]), mesh=mesh)
    core = spread.params["layers"]["mlp"]["experts"]["gate_shared_core"]["core"].get_value()
    assert core.sharding.shard_shape(core.shape) != core.shape
    conversion.assert_close(spread(IDS), loaded(IDS), RTOL, "logits")


def test_float16_is_read_to_the_same_numbers_and_written_back(student, tmp_path):
    """As the guide's program stores it: every number of the file, and the same file again."""
    model, folder = student
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    checkpoint0.write(model, tmp_path, torch.float16)
    half = hf.load(str(tmp_path), dtype="float16")
    wanted = safetensors.torch.load_file(tmp_path / "model.safetensors")
    found = hub_arrays(half)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(
            np.asarray(found[name], np.float32), tensor.float().numpy(), err_msg=name
        )
    hf.save(half, str(tmp_path / "out"))
    again = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in wanted.items())
    # The other side loads ours, and its model computes what it did.
    copy.deepcopy(model).half().load_state_dict(again, strict=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["compression_config"] == model.compression_config


def hub_arrays(model, params=None):
    """{hub name: array} of a loaded model's weights, or of a tree like its parameters."""
    out = {}
    for leaf, a in zip(
        names.leaves(model.params, model.family, model.config),
        map(np.asarray, jax.tree.leaves(model.params if params is None else params)),
        strict=True,
    ):
        whole = tuple(slice(0, n) for n in leaf.shape)
        out |= {p.name: names.view(a, leaf, p.at) for p in names.tensor_regions(leaf, whole)}
    return out


@pytest.mark.parametrize("name", ["alone", pytest.param("student", marks=pytest.mark.slow)])
def test_logits_and_gradients_are_those_of_the_formula_in_float64(name, request):
    """Core, U and V of every projection and expert, and all other weights."""
    model, folder = request.getfixturevalue(name)
    loaded = hf.load(str(folder))
    assert loaded.config.shared_core_rank == RANK
    exact = copy.deepcopy(model).double()
    ids = torch.as_tensor(IDS)
    out = exact(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    batch = {k: a.astype(np.int32) for k, a in conversion.batch_of(IDS).items()}
    with jax.set_mesh(loaded.mesh):

        @jax.jit
        def gradients(params, bias, batch):
            def loss_of(params):
                net = conversion.Recorder(loaded.layout.merge(params, bias))
                loss = conversion.loss_of(net, batch, loaded.full_config)
                return loss, net.logits(net.out.hidden_BSD)

            return jax.grad(loss_of, has_aux=True)(params)

        batch = {k: conversion.put(a) for k, a in batch.items()}
        found, logits = gradients(loaded.params, loaded.bias, batch)
    conversion.assert_close(logits, out.logits.detach().numpy(), RTOL, "logits")
    found = hub_arrays(loaded, found)
    factors = 0
    for name, p in exact.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        conversion.assert_close(found[name], wanted.numpy(), 1e-4, f"gradient of {name}")
        factors += "shared_core" in name
    assert factors == 3 * (1 + 4 * 4)  # one layer with experts: a core, and four factors of each


@pytest.mark.slow
def test_multiplied_out(student, loaded, tmp_path, capsys):
    """transformers loads it and gives the factors' logits; so do we."""
    out = tmp_path / "plain"
    assert compress.main(["multiply-out", str(student[1]), str(out)]) == 0
    capsys.readouterr()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert "compression_config" not in json.loads((out / "config.json").read_text())
    conversion.assert_close(logits_of(theirs), loaded(IDS), RTOL, "logits of transformers")
    plain = hf.load(str(out))
    assert plain.config.shared_core_rank == 0
    conversion.assert_close(plain(IDS), loaded(IDS), RTOL, "logits")
    # Decoding multiplies out by itself.
    prompt = [int(i) for i in IDS[0, :5]]
    assert loaded.generate(prompt, max_tokens=8) == plain.generate(prompt, max_tokens=8)


def test_wrong_files_are_refused(student, tmp_path):
    folder = student[1]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for given, said in (
        ({"rank": 4}, "has the shape"),
        ({"rank": 0}, "no whole number rank"),
        ({"steps": 3}, "no whole number rank"),
        ("rank 3", "no whole number rank"),
    ):
        changed = config | {"compression_config": given}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            hf.load(str(tmp_path))
    without = {k: v for k, v in config.items() if k != "compression_config"}
    (tmp_path / "config.json").write_text(json.dumps(without))
    with pytest.raises(UserError, match="are missing"):
        hf.load(str(tmp_path))


def test_random_weights_around_the_experts_are_not_taken_for_a_model(student, tmp_path):
    """The guide's program saves a fresh model with its experts filled in."""
    config = (student[1] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    tensors = safetensors.torch.load_file(student[1] / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="of a fresh model.*shared-core MODEL OUT --factors-from="):
        hf.load(str(tmp_path))
