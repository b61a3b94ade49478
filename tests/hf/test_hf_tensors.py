"""Tensors of Hugging Face checkpoints, read and written: every dtype, layout and mesh, to the last bit."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from deepseek_jax import hf
from deepseek_jax.errors import UserError
from deepseek_jax.hf import exporter, names
from deepseek_jax.hf.tokenizer_files import Companions
from tests.hf.test_hf_models import hub_arrays
from tests.support import hf_families as families


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
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
