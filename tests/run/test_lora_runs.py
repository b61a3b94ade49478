"""Runs with LoRA: from a Hugging Face checkpoint to an adapter, over restarts, and what reads them."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from deepseek_jax import hf
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    MoeConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.inference.opener import open_model
from deepseek_jax.run import init_from
from deepseek_jax.run.job import train
from tests.support import conversion, hf_variants

LORA = LoraConfig(r=4, alpha=8.0, base_dtype="float32", modules_to_save="lm_head")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A DeepSeek-V3 that reads bytes."""
    out = tmp_path_factory.mktemp("source")
    config = hf_variants.hub_config("deepseek_v3") | dict(vocab_size=257)
    _, _, weights = hf_variants.build("deepseek_v3")
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.standard_normal((257, config["hidden_size"])).astype(np.float32) * 0.1
    safetensors.numpy.save_file(weights, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return str(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "text.txt"
    out.write_text("".join(f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(400)))
    return str(out)


def options(source, corpus, steps=4, lora=LORA, **sections):
    """A run of one device without what a small test does not need."""
    small = dict(
        init_from=source,
        lora=lora,
        mesh=MeshConfig(fsdp=1),
        sharding=ShardingConfig(min_weight_size=0),
        moe=MoeConfig(bias_update_rate=0.0),
        data=DataConfig(path=corpus, tokenizer="bytes"),
        train=TrainConfig(
            steps=steps, batch_size=4, sequence_length=32, dtype="float32", mtp_loss_weight=0.0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        eval=EvalConfig(every_steps=0, sample_prompt="1 and", sample_tokens=4),
        log=LogConfig(every_steps=1, tensorboard=False),
    )
    return Config(**small | sections)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def run(source, corpus, tmp_path_factory):
    """(workdir, result) of four steps."""
    workdir = str(tmp_path_factory.mktemp("run") / "w")
    return workdir, train(options(source, corpus), workdir)


def test_checkpoints_hold_the_adapter_alone(run, source):
    """Neither the base nor moments of it: bytes, and names."""
    workdir, result = run
    size = sum(
        os.path.getsize(os.path.join(folder, file))
        for folder, _, files in os.walk(os.path.join(workdir, "checkpoints", "4"))
        for file in files
    )
    learns = sum(a.nbytes for a in jax.tree.leaves(result.state.params))
    assert 3 * learns <= size < 3.5 * learns + 100_000
    assert size < os.path.getsize(os.path.join(source, "model.safetensors")) * 2


def test_resumed_is_uninterrupted(run, source, corpus, tmp_path):
    """From step 2 on in another process's place: state and losses bit for bit, the base read anew."""
    workdir, result = run
    again = str(tmp_path / "again")
    shutil.copytree(workdir, again)
    shutil.rmtree(os.path.join(again, "checkpoints", "4"))
    resumed = train(options(source, corpus), again)
    assert resumed.losses == {step: result.losses[step] for step in (3, 4)}
    same(resumed.state, result.state)


def test_what_reads_the_run(run, source, tmp_path):
    """Its folder, its merged export and its adapter on the base are one model: W + scale A B in float32."""
    workdir, result = run
    model = open_model(workdir).model
    commands.export(workdir, str(tmp_path / "merged"))
    commands.export_adapter(workdir, str(tmp_path / "adapter"))
    merged = hf.load(str(tmp_path / "merged"))
    adapted = open_model(source, adapter=str(tmp_path / "adapter")).model
    same(merged.params, model.params)
    same(adapted.params, model.params)
    base = dict(nnx.to_flat_state(hf.load(source).params))
    ours = dict(nnx.to_flat_state(model.params))
    trained = {
        "/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(result.state.params)
    }
    for path, v in ours.items():
        name, w = "/".join(map(str, path)), np.asarray(base[path].get_value(), np.float64)
        before, _, last = name.rpartition("/")
        a, b = (trained.get(f"{before}/lora_{side}") for side in "AB")
        if last == "kernel" and a is not None:
            w = w + 2.0 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        elif last in ("gate_up_proj", "down_proj"):
            prefix = f"{before}/{last.removesuffix('proj')}lora_"
            form = "ledpr,leprf->ledpf" if last == "gate_up_proj" else "lefr,lerd->lefd"
            w = w + 2.0 * np.einsum(
                form, *(np.asarray(trained[prefix + s], np.float64) for s in "AB")
            )
        elif name in trained:
            w = trained[name]
        conversion.assert_close(v.get_value(), w, 1e-6, name)
    with pytest.raises(UserError, match="--adapter=.* is of a Hugging Face checkpoint"):
        open_model(workdir, adapter=str(tmp_path / "adapter"))


def test_going_on_with_an_adapter(run, source, corpus, tmp_path):
    """config.lora.adapter sets the options and the weights of step 0."""
    workdir, result = run
    commands.export_adapter(workdir, str(tmp_path / "adapter"), step=4)
    given = options(source, corpus, lora=LoraConfig(adapter=str(tmp_path / "adapter")))
    known = init_from.with_what_is_known(given, str(tmp_path / "next"))
    assert (known.lora.r, known.lora.scale, known.lora.saved) == (4, 2.0, ("lm_head",))
    assert set(known.lora.target_modules.split(",")) >= {
        "self_attn.kv_b_proj",
        "mlp.experts.up_proj",
    }
    wrong = dataclasses.replace(given, lora=dataclasses.replace(given.lora, r=8))
    with pytest.raises(UserError, match="config.lora.r=8 differs from r=4 of config.lora.adapter"):
        init_from.with_what_is_known(wrong, str(tmp_path / "next"))
    more = train(given, str(tmp_path / "next"))
    assert more.losses[1] < 0.9 * result.losses[1]


def test_the_base_is_gone_or_another(run, source, corpus, tmp_path):
    workdir, _ = run
    here, moved = str(tmp_path / "w"), str(tmp_path / "base")
    shutil.copytree(workdir, here)
    shutil.copytree(source, moved)
    longer = options(moved, corpus, steps=5)
    weights = safetensors.numpy.load_file(os.path.join(source, "model.safetensors"))
    weights["model.layers.1.mlp.experts.3.up_proj.weight"][0, 5] += 1e-3
    safetensors.numpy.save_file(weights, os.path.join(moved, "model.safetensors"))
    with pytest.raises(UserError, match="is another checkpoint than the one that this adapter"):
        train(longer, here)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="is not there.*config.lora.r=4"):
        train(longer, here)
    shutil.copytree(source, moved)
    assert train(longer, here).step == 5


def test_another_scale_is_refused(run, source, corpus):
    """Shapes would be the same."""
    workdir, _ = run
    other = dataclasses.replace(LORA, alpha=16.0)
    with pytest.raises(UserError, match="config.lora.alpha=16.0 differs from 8.0 of the run"):
        train(options(source, corpus, lora=other), workdir)


def test_without_a_base(corpus, tmp_path):
    with pytest.raises(UserError, match="config.lora.r=4 and config.init_from=''"):
        train(options("", corpus), str(tmp_path / "w"))


@pytest.mark.parametrize("base_dtype", ["int8"])
def test_a_base_in_few_bits(base_dtype, source, corpus, tmp_path):
    """It trains, samples without being merged, and goes on; merged, the base is the checkpoint's own."""
    few = dataclasses.replace(LORA, base_dtype=base_dtype)
    workdir = str(tmp_path / "w")
    result = train(options(source, corpus, steps=2, lora=few), workdir)
    assert np.isfinite(list(result.losses.values())).all() and result.sample
    assert train(options(source, corpus, steps=3, lora=few), workdir).step == 3
    base = hf.load(source).params["layers"]["mlp"]["gate"]["kernel"].get_value()
    ours = open_model(workdir).model.params["layers"]["mlp"]["gate"]["kernel"].get_value()
    np.testing.assert_array_equal(ours, base)
