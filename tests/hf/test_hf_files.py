"""Crafted checkpoints: each mistake is one line that names what is wrong, and nothing is left behind."""

import errno
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax import hf
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration, writer
from deepseek_jax.run import importer
from tests.support import hf_families as families

CONFIG = dict(
    families.SHAPES, model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=1
)


def weights():
    d, f, v, kv = 48, 80, 96, 24
    shapes = {
        "model.embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
        "model.norm.weight": (d,),
    }
    shapes |= {
        f"model.layers.0.{n}.weight": s
        for n, s in {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }.items()
    }
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write(folder, tensors, config=CONFIG, files=1):
    """A checkpoint in `files` files, with an index if more than one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(files):
        part = dict(list(tensors.items())[i::files])
        safetensors.numpy.save_file(part, folder / f"part-{i}.safetensors")
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def refused(folder):
    """The one line that load and the import command say; no workdir is made."""
    with pytest.raises(UserError) as error:
        hf.load(str(folder))
    workdir = folder.parent / "workdir"
    with pytest.raises(UserError) as again:
        importer.import_(str(folder), str(workdir))
    assert not workdir.exists()
    assert str(again.value) == str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_one_is_read(tmp_path):
    given = weights()
    one, many = (
        hf.load(str(write(tmp_path / "one", given))),
        hf.load(str(write(tmp_path / "many", given, files=3))),
    )
    for model in (one, many):
        np.testing.assert_array_equal(
            model.params["dense_layers"]["mlp"]["up_proj"]["kernel"][0],
            given["model.layers.0.mlp.up_proj.weight"].T,
        )


def test_truncated_file(tmp_path):
    folder = write(tmp_path / "a", weights())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: it has" in refused(folder)
    path.write_bytes(path.read_bytes()[:5])
    assert "model.safetensors: its head" in refused(folder)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "does not fit" in refused(folder)
    path.unlink()
    assert "model.safetensors is missing" in refused(folder)


def test_missing_and_extra_tensors(tmp_path):
    given = weights()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        del given[name]
    line = refused(write(tmp_path / "a", given))
    assert (
        "2 of 12 tensors are missing" in line
        and "model.norm.weight" in line
        and "model.layers.0.mlp.up_proj.weight" in line
    )
    given = weights() | {
        "model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32),
        "model.layers.1.mlp.up_proj.weight": np.zeros((80, 48), np.float32),
    }
    line = refused(write(tmp_path / "b", given))
    assert (
        "2 tensors are not of a model" in line
        and "q_proj.bias" in line
        and "model.layers.1.mlp.up_proj.weight" in line
    )


def test_wrong_shape_and_dtype(tmp_path):
    given = weights()
    given["model.layers.0.self_attn.k_proj.weight"] = np.zeros((48, 48), np.float32)
    assert "k_proj.weight has the shape [48, 48] and not [24, 48]" in refused(
        write(tmp_path / "a", given)
    )
    given = weights()
    given["lm_head.weight"] = given["lm_head.weight"].astype(np.int32)
    assert "lm_head.weight is of the dtype int32" in refused(write(tmp_path / "b", given))
    given = weights()
    given["lm_head.weight"] = given["lm_head.weight"].astype(np.float64)
    assert "lm_head.weight is of the dtype float64" in refused(write(tmp_path / "c", given))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite(name, value, dtype, tmp_path):
    given = {n: a.astype(getattr(ml_dtypes, dtype, dtype)) for n, a in weights().items()}
    given[name].reshape(-1)[-1] = value
    assert f"{name} in model.safetensors holds numbers that are not finite" in refused(
        write(tmp_path / "a", given)
    )


def test_index(tmp_path):
    folder = write(tmp_path / "a", weights(), files=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | changes}))
        return refused(folder)

    assert "1 of 3 files that are missing: part-9.safetensors" in with_map(
        **{"model.norm.weight": "part-9.safetensors"}
    )
    assert "'../a/part-0.safetensors'" in with_map(
        **{"model.norm.weight": "../a/part-0.safetensors"}
    )
    assert "'/etc/passwd'" in with_map(**{"model.norm.weight": "/etc/passwd"})
    assert "1 tensors are not in the files that it names: more" in with_map(
        more="part-0.safetensors"
    )
    other = (
        "part-1.safetensors"
        if good["weight_map"]["model.norm.weight"] == "part-0.safetensors"
        else "part-0.safetensors"
    )
    assert "the index says" in with_map(**{"model.norm.weight": other})
    index.write_text("{")
    assert "index.json: not the JSON" in refused(folder)


def test_fp8_without_its_scales(tmp_path):
    given, name = weights(), "model.layers.0.mlp.up_proj.weight"
    given[name] = given[name].astype(ml_dtypes.float8_e4m3fn)
    config = CONFIG | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}
    }
    raw = {n: a if a.dtype == np.float32 else a.view(np.uint8) for n, a in given.items()}

    def save(folder, extra):
        write(folder, raw | extra, config)
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        head = data[8 : 8 + length].replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"')
        path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])
        return folder

    assert f"1 scales of FP8 weights are missing: {name}_scale_inv" in refused(
        save(tmp_path / "a", {})
    )
    assert "not a float for each of [3, 2] blocks of 32x32" in refused(
        save(tmp_path / "b", {name + "_scale_inv": np.ones((2, 3), np.float32)})
    )
    assert "holds numbers that are not finite" in refused(
        save(tmp_path / "c", {name + "_scale_inv": np.full((3, 2), np.nan, np.float32)})
    )


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(attention_sinks=4), "attention_sinks=4 is not a key of llama"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not in this version"),
        (dict(mlp_bias=True), "mlp_bias=True is not in this version"),
        (dict(attention_dropout=0.1), "attention_dropout=0.1 is not in this version"),
        (
            dict(rope_scaling=dict(rope_type="longrope", factor=2.0)),
            "rope_scaling.rope_type='longrope'",
        ),
        (
            dict(rope_scaling=dict(rope_type="yarn", factor=2.0, fast_mode=1)),
            "rope_scaling.fast_mode=1",
        ),
        (dict(model_type="gpt2"), "model_type='gpt2' is not known"),
        (dict(hidden_size="48"), "hidden_size='48' has the type str"),
        (dict(vocab_size=None), "vocab_size is missing"),
        (
            dict(quantization_config={"quant_method": "gptq"}),
            "quant_method='gptq' is not in this version",
        ),
        (
            dict(
                model_type="qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0
            ),
            "sliding_window=16 is not in this version",
        ),
        (
            dict(
                model_type="qwen2",
                use_sliding_window=True,
                max_window_layers=0,
                max_position_embeddings=8192,
            ),
            "sliding_window=4096 (what qwen2 has where it is missing)",
        ),
        (
            dict(model_type="qwen3_moe", use_sliding_window=True, sliding_window=16, num_experts=4),
            "sliding_window=16 is not in this version",
        ),
        (
            dict(model_type="mistral", max_position_embeddings=8192),
            "sliding_window=4096 (what mistral has where it is missing)",
        ),
        (dict(sliding_window=16), "sliding_window=16 is not in this version"),
        (dict(model_type="mistral", sliding_window="16"), "sliding_window='16' has the type str"),
        (
            dict(model_type="dots1", max_window_layers=0, max_position_embeddings=8192),
            "sliding_window=4096 (what dots1 has where it is missing)",
        ),
        (dict(model_type="qwen3", layer_types=["sliding_attention"]), "layer_types"),
        (
            dict(model_type="mixtral", num_local_experts=4, sliding_window=16),
            "sliding_window=16 is not in this version",
        ),
        (
            dict(model_type="qwen3_moe", mlp_only_layers=[1], num_hidden_layers=3),
            "dense layers after layers with experts",
        ),
        (
            dict(model_type="deepseek_v3", scoring_func="softmax"),
            "scoring_func='softmax' is not in this version",
        ),
        (
            dict(model_type="deepseek_v3", attention_bias=True),
            "attention_bias=True is not in this version",
        ),
        (
            dict(model_type="deepseek_v2", moe_layer_freq=2),
            "moe_layer_freq=2 is not in this version",
        ),
        (
            dict(model_type="deepseek_v2", topk_method="group_limited_greedy", n_group=4),
            "needs n_group and topk_group",
        ),
        (dict(model_type="deepseek_v2"), "num_experts_per_tok is missing"),
        (
            dict(model_type="deepseek_v3", num_experts_per_tok=None),
            "num_experts_per_tok=null says nothing",
        ),
        (
            dict(model_type="deepseek_v3", n_routed_experts=16, num_local_experts=8),
            "n_routed_experts=16 and num_local_experts=8 are the same option",
        ),
        (
            dict(model_type="qwen3_moe", shared_expert_intermediate_size=64),
            "shared_expert_intermediate_size=64 is not in this version",
        ),
        (dict(model_type="qwen3_moe", qkv_bias=True), "qkv_bias=True is not in this version"),
        (
            dict(rope_scaling=dict(type="linear")),
            "rope_scaling.factor of rope_type='linear' is missing",
        ),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0)),
            "rope_scaling.high_freq_factor of rope_type='llama3' is missing",
        ),
    ],
)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(change, line, tmp_path):
    with pytest.raises(UserError, match="config.json: ") as error:
        configuration.to_model(CONFIG | change)
    assert any(part in str(error.value) for part in line.split("|")) and "\n" not in str(
        error.value
    )


def test_export_leaves_nothing_half_written(tmp_path):
    model = hf.load(str(write(tmp_path / "a", weights())))
    lm_head = model.params["lm_head"]["kernel"]
    lm_head.set_value(lm_head.get_value() * 1e6)
    with pytest.raises(
        UserError,
        match="lm_head.weight holds numbers that are not finite, or too large for float16",
    ):
        hf.save(model, str(tmp_path / "out"), dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["a"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        hf.save(model, str(tmp_path / "file" / "out"))


def test_what_the_disk_refuses_in_the_background_is_an_error(tmp_path, monkeypatch):
    """The system tells it to one fsync only, which may be the one while arrays are still written."""
    model = hf.load(str(write(tmp_path / "a", weights())))

    def refuse(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "fsync", refuse)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        hf.save(model, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["a"]
