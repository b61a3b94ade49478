"""Runs with LoRA: from a Hugging Face checkpoint to an adapter, over restarts, and what reads them."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from deepseek_jax import hf
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    MoeConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.inference.opener import open_model
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import init_from
from deepseek_jax.run.call import train
from deepseek_jax.tensorfile.arrays import flatten
from deepseek_jax.train.state import make_layout
from tests.support import chat_folders, conversion, hf_folders
from tests.support.stopped_runs import StopAfter

LORA = LoraConfig(
    r=4,
    alpha=8.0,
    dropout=0.1,
    target_modules="kv_b_proj,down_proj,experts",
    modules_to_save="lm_head",
    base_dtype="int8",
)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A run takes all devices that there are. With one it compiles in a third of the time; that meshes make
    no difference is shown in tests/model/test_lora.py."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One layer of experts: a dense one beside it would be half of every program. Adapters of dense layers
    are of tests/model/test_lora.py and tests/hf/test_peft.py."""
    small = dataclasses.replace(hf_folders.MODEL, num_hidden_layers=1, first_k_dense_replace=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_folders, "MODEL", small)
        return chat_folders.model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return chat_folders.chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


def options(source, corpus, lora=LORA):
    """Packed chats, each of them twice."""
    return Config(
        objective="sft",
        init_from=source,
        lora=lora,
        sharding=ShardingConfig(min_weight_size=0),
        moe=MoeConfig(bias_update_rate=0.0),
        data=DataConfig(path=corpus, eval_fraction=0.0),
        train=TrainConfig(
            steps=0, epochs=2.0, batch_size=8, sequence_length=80, dtype="float32", remat="none"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        eval=EvalConfig(every_steps=0, batches=1, sample_prompt="1+1", sample_tokens=3),
        log=LogConfig(every_steps=1, trackers=""),
    )


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def run(source, corpus, tmp_path_factory):
    """(workdir, result) of a run that nobody disturbed."""
    workdir = str(tmp_path_factory.mktemp("run") / "w")
    result = train(options(source, corpus), workdir)
    assert result.step >= 4 and result.sample and np.isfinite(list(result.losses.values())).all()
    return workdir, result


def test_checkpoints_hold_the_adapter_alone(run):
    """Neither the base nor moments of it."""
    workdir, result = run
    checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), read_only=True)
    held, extra = flatten(checkpoints.shapes()), checkpoints.read_extra()
    checkpoints.close()
    learns = {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(result.state.params)}
    assert {name.removeprefix("params/") for name in held if name.startswith("params/")} == learns
    moments = [name for name in held if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * len(learns) and "lm_head/kernel" in learns
    assert len(extra["base"]) == 64


@pytest.mark.slow
def test_resumed_is_uninterrupted(run, source, corpus, tmp_path):
    """From step 2 on, with packing, epochs and dropout: all bit for bit; the base is read anew."""
    workdir, result = run
    again = str(tmp_path / "again")
    shutil.copytree(workdir, again)
    for step in os.listdir(os.path.join(again, "checkpoints")):
        if int(step) > 2:
            shutil.rmtree(os.path.join(again, "checkpoints", step))
    resumed = train(options(source, corpus), again)
    assert resumed.losses == {step: loss for step, loss in result.losses.items() if step > 2}
    same(resumed.state, result.state)


@pytest.mark.slow
def test_frozen_factors_are_of_the_checkpoint(source, corpus, tmp_path):
    """With A frozen, as LoRA-FA has it (arXiv:2308.03303): A is where it began, in the checkpoint, in what
    reads the run and after a restart, which goes on to the last bit."""
    config = options(source, corpus, LORA)
    o = dataclasses.replace(config.optimizer, lr_multipliers="lora_A=0")
    config = dataclasses.replace(config, optimizer=o)
    whole = train(config, str(tmp_path / "whole"))
    parts = str(tmp_path / "parts")
    train(config, parts, stopper=StopAfter(2))
    again = train(config, parts)
    same(again.state, whole.state)
    checkpoints = Checkpointer(str(tmp_path / "whole" / "checkpoints"), read_only=True)
    held = flatten(checkpoints.shapes())
    checkpoints.close()
    frozen = {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(whole.state.frozen)}
    factors = {name for name in frozen if name.endswith("lora_A")}
    assert factors and {f"params/{name}" for name in factors} <= held.keys()
    assert not {f"params/{name}" for name in frozen - factors} & held.keys()
    commands.export_adapter(str(tmp_path / "whole"), str(tmp_path / "adapter"))
    written = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".lora_A." in name and np.any(a) for name, a in written.items())


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
    """config.lora.adapter sets the options, and the weights of step 0."""
    workdir, result = run
    folder = str(tmp_path / "adapter")
    commands.export_adapter(workdir, folder)
    given = options(source, corpus, lora=LoraConfig(adapter=folder))
    known = init_from.with_what_is_known(given, str(tmp_path / "next"))
    assert (known.lora.r, known.lora.scale, known.lora.saved) == (4, 2.0, ("lm_head",))
    maps = set(known.lora.target_modules.split(","))
    experts = {f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert maps == experts | {"self_attn.kv_b_proj", "mlp.shared_experts.down_proj"}
    wrong = dataclasses.replace(given, lora=dataclasses.replace(given.lora, r=8))
    with pytest.raises(UserError, match="config.lora.r=8 differs from r=4 of config.lora.adapter"):
        init_from.with_what_is_known(wrong, str(tmp_path / "next"))
    for name, value in (
        ("alpha", 16.0),
        ("target_modules", "experts"),
        ("modules_to_save", "embed_tokens"),
    ):
        wrong = dataclasses.replace(given, lora=dataclasses.replace(given.lora, **{name: value}))
        with pytest.raises(UserError, match=f"config.lora.{name}={value} differs from "):
            init_from.with_what_is_known(wrong, str(tmp_path / "next"))
    said = dataclasses.replace(
        known.lora, target_modules="self_attn.kv_b_proj," + known.lora.target_modules
    )
    assert (
        init_from.with_what_is_known(dataclasses.replace(given, lora=said), None).lora == known.lora
    )
    mesh = make_mesh(known)
    with jax.set_mesh(mesh):
        layout = make_layout(known, mesh)
        opened = init_from.open_for_training(known, str(tmp_path / "next"))
        start = init_from.initial_state(opened, known, layout, str(tmp_path / "next"))
    same(start.params, result.state.params)


def test_the_base_is_gone_or_another(run, source, corpus, tmp_path):
    """Found before anything is compiled."""
    workdir, _ = run
    here, moved = str(tmp_path / "w"), str(tmp_path / "base")
    shutil.copytree(workdir, here)
    shutil.copytree(source, moved)
    weights = safetensors.numpy.load_file(os.path.join(source, "model.safetensors"))
    weights["model.layers.0.mlp.experts.3.up_proj.weight"][0, 5] += 1e-3
    safetensors.numpy.save_file(weights, os.path.join(moved, "model.safetensors"))
    with pytest.raises(UserError, match="is another checkpoint than the one that this adapter"):
        train(options(moved, corpus), here)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="is not there.*config.lora.r=4"):
        train(options(moved, corpus), here)


def test_another_scale_is_refused(run, source, corpus):
    """Shapes would be the same."""
    workdir, _ = run
    other = dataclasses.replace(LORA, alpha=16.0)
    with pytest.raises(UserError, match="config.lora.alpha=16.0 differs from 8.0 of the run"):
        train(options(source, corpus, lora=other), workdir)


def test_without_a_base(source, corpus, tmp_path):
    config = dataclasses.replace(options("", corpus), model=hf_folders.MODEL)
    tokenizer = dataclasses.replace(config.data, tokenizer=os.path.join(source, "tokenizer.json"))
    with pytest.raises(UserError, match="config.lora.r=4 and config.init_from=''"):
        train(dataclasses.replace(config, data=tokenizer), str(tmp_path / "w"))
