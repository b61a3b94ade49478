"""Runs that begin with a Hugging Face checkpoint, and their export."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax import hf
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    Config,
    MeshConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.hf import provenance, reader
from deepseek_jax.inference.opener import open_model
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import commandline, importer, init_from
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import init_state, make_layout, to_tree
from tests.support import FILES, ROOT
from tests.support import hf_families as families
from tests.support import hf_variants as deepseek

TRAIN = TrainConfig(dtype="float32", steps=10, batch_size=8, sequence_length=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    _, _, weights = deepseek.build("deepseek_v3")
    safetensors.numpy.save_file(weights, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(deepseek.hub_config("deepseek_v3")))
    (out / "generation_config.json").write_text("{}")
    return str(out)


def resolved(workdir, *overrides):
    """The options as train.py reads them, from a config file that has another model."""
    argv = [
        "train.py",
        f"--config={str(ROOT)}/configs/tiny.py",
        f"--workdir={workdir}",
        "--config.train.sequence_length=64",
        *overrides,
    ]
    return commandline.read_config(commandline.parse(argv))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_init_from_sets_the_model(source, tmp_path):
    expected = hf.load(source).config
    assert resolved(tmp_path / "w", f"--config.init_from={source}").model == expected
    changed = resolved(
        tmp_path / "w",
        f"--config.init_from={source}",
        "--config.model.aux_loss_alpha=0.5",
        "--config.model.rope_scaling.factor=2.0",
        f"--config.model.hidden_size={expected.hidden_size}",
    )
    assert changed.model == dataclasses.replace(
        expected,
        aux_loss_alpha=0.5,
        rope_scaling=dataclasses.replace(expected.rope_scaling, factor=2.0),
    )
    with pytest.raises(
        UserError, match=r"config.model.hidden_size=64 differs from 48 of config.init_from"
    ):
        resolved(tmp_path / "w", f"--config.init_from={source}", "--config.model.hidden_size=64")
    with pytest.raises(UserError, match="is not a folder"):
        resolved(tmp_path / "w", "--config.init_from=/nowhere")


def test_what_is_known_wins_over_defaults(source, tmp_path):
    """The tokenizer and the checkpoint that a run began with, where the command does not name them."""
    tokenizers = [os.path.join(FILES, "resume", f"tokenizer_{x}.json") for x in "ab"]
    w, given = str(tmp_path / "w"), tmp_path / "given"
    shutil.copytree(source, given)
    # it came with none
    assert (
        resolved(w).data.tokenizer
        == resolved(w, f"--config.init_from={given}").data.tokenizer
        == "bytes"
    )
    (given / "tokenizer.model").write_text("")
    with pytest.raises(
        UserError,
        match="config.data.tokenizer is not set, and .*given has tokenizer.model "
        "but no tokenizer.json",
    ):
        resolved(w, f"--config.init_from={given}")
    shutil.copy(tokenizers[0], given / "tokenizer.json")
    assert resolved(w, f"--config.init_from={given}").data.tokenizer == str(
        given / "tokenizer.json"
    )
    cache = tmp_path / "models--org--name"  # of the hub, with the repository in it
    os.makedirs(cache / "snapshots")
    os.symlink(given, cache / "snapshots" / "0123abc")
    kept = os.path.join(cache, "snapshots", "0123abc", "tokenizer.json")
    assert resolved(w, f"--config.init_from={cache}").data.tokenizer == kept
    assert hf.Chat(str(cache)).tokenizer.get_vocab_size() > 100
    # asked for
    assert (
        resolved(w, f"--config.init_from={given}", "--config.data.tokenizer=bytes").data.tokenizer
        == "bytes"
    )

    importer.import_(str(given), w)
    kept = os.path.join(w, "hf", "tokenizer.json")
    config = resolved(w)
    assert config.data.tokenizer == kept
    workdirs.write_config(
        w, dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bytes"))
    )
    # what an earlier version wrote over it, before it saved anything
    assert resolved(w).data.tokenizer == kept

    os.makedirs(os.path.join(w, "checkpoints", "3"))
    assert resolved(w).data.tokenizer == "bytes"  # and here it trained on bytes
    other = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=tokenizers[1])
    )
    workdirs.write_config(w, other)
    assert resolved(w).data.tokenizer == tokenizers[1]
    relative = os.path.relpath(tokenizers[1])  # as earlier versions kept it
    workdirs.write_config(
        w, dataclasses.replace(other, data=dataclasses.replace(config.data, tokenizer=relative))
    )
    assert resolved(w).data.tokenizer == tokenizers[1]
    workdirs.write_config(
        w,
        dataclasses.replace(
            other, data=dataclasses.replace(config.data, tokenizer=str(tmp_path / "gone.json"))
        ),
    )
    assert resolved(w).data.tokenizer == kept

    # with init_from, and killed before its first checkpoint: not random weights when it goes on
    begun = tmp_path / "begun"
    os.makedirs(begun / "hf")
    opened, model, family = reader.open_source(str(given))
    provenance.write_notes(opened, model, family, str(begun / "hf"))
    workdirs.write_config(str(begun), resolved(str(begun), f"--config.init_from={given}"))
    again = resolved(str(begun))
    assert (
        again.init_from == str(given)
        and again.model == model
        and again.data.tokenizer == str(given / "tokenizer.json")
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        "muon",
        "adafactor",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("adamw", "lion", "sgd")),
    ],
)
def test_the_state_that_training_begins_with(optimizer, source, tmp_path):
    """On a mesh: the checkpoint's weights; moments and counters are zero."""
    model = hf.load(source)
    config = Config(
        model=model.config,
        init_from=source,
        mesh=MeshConfig(fsdp=2, expert=2, tensor=2),
        train=TRAIN,
        optimizer=OptimizerConfig(optimizer),
        sharding=ShardingConfig(min_weight_size=0),
    )
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = make_layout(config, mesh)
        state = init_from.initial_state(
            init_from.open_for_training(config, str(tmp_path)), config, layout, str(tmp_path)
        )
    for a, shape, sharding in zip(
        *map(jax.tree.leaves, (state, layout.abstract, layout.shardings)), strict=True
    ):
        assert (a.shape, a.dtype) == (shape.shape, shape.dtype) and a.sharding.is_equivalent_to(
            sharding, a.ndim
        )
    same((state.params, state.bias), (model.params, model.bias))
    assert not any(
        np.any(np.asarray(a)) for a in jax.tree.leaves(state._replace(params=None, bias=None))
    )  # as all of them begin


def test_imported_run(source, tmp_path):
    """The workdir sets the model, generate reads it, export gives the checkpoint back.

    Then the same of a later step.
    """
    workdir, model = str(tmp_path / "w"), hf.load(source)
    theirs = [
        tmp_path / "w" / "hf.tmp" / "mine",
        tmp_path / "out.tmp" / "mine",
    ]  # names that nobody gave us
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    importer.import_(source, workdir)
    with pytest.raises(UserError, match="holds a run already"):
        importer.import_(source, workdir)
    config = resolved(workdir)
    assert config.model == model.config and config.init_from == os.path.join(workdir, "hf")
    assert init_from.open_for_training(config, workdir) is not None
    again = open_model(workdir).model
    same((again.params, again.bias), (model.params, model.bias))
    commands.export(workdir, str(tmp_path / "out"))
    given = safetensors.numpy.load_file(f"{source}/model.safetensors")
    same(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), given)
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert all(path.read_text() == "mine" for path in theirs) and not list(tmp_path.glob(".*"))
    commands.export(
        workdir, str(tmp_path / "low"), dtype="bfloat16"
    )  # some are copied as they are, others not

    def kept(name):
        return name.endswith("e_score_correction_bias")

    same(
        safetensors.numpy.load_file(tmp_path / "low" / "model.safetensors"),
        {n: a if kept(n) else a.astype("bfloat16") for n, a in given.items()},
    )

    run = Config(
        model=model.config, init_from=config.init_from, mesh=MeshConfig(fsdp=2), train=TRAIN
    )
    mesh = make_mesh(run, jax.devices()[:2])
    with jax.set_mesh(mesh):
        layout = make_layout(run, mesh)
        state = init_from.initial_state(
            init_from.open_for_training(run, workdir), run, layout, workdir
        )
        doubled = state._replace(
            params=jax.jit(lambda p: jax.tree.map(lambda a: a * 2, p))(state.params)
        )
        checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"))
        checkpoints.save(3, to_tree(doubled), {"tokens_seen": 0})
        checkpoints.close()
    workdirs.write_config(workdir, run)
    same(jax.tree.map(lambda a: a / 2, open_model(workdir).model.params), model.params)
    commands.export(workdir, str(tmp_path / "trained"), gigabytes=2e-4)
    files = [f for f in os.listdir(tmp_path / "trained") if f.endswith(".safetensors")]
    trained = {
        n: a
        for f in files
        for n, a in safetensors.numpy.load_file(tmp_path / "trained" / f).items()
    }
    assert len(files) > 1 and trained.keys() == given.keys()
    for name, a in given.items():
        np.testing.assert_array_equal(
            trained[name], a if name.endswith("e_score_correction_bias") else 2 * a
        )


def test_a_run_that_never_was_a_hugging_face_model(tmp_path):
    """Its family is found by its options."""
    families.build("qwen3_moe").save_pretrained(tmp_path / "weights")
    before = hf.load(str(tmp_path / "weights"))
    checkpoints = Checkpointer(str(tmp_path / "w" / "checkpoints"))
    checkpoints.save(1, to_tree({"params": before.params, "bias": before.bias}), {})
    checkpoints.close()
    workdirs.write_config(
        str(tmp_path / "w"), Config(model=before.config, mesh=MeshConfig(fsdp=1), train=TRAIN)
    )
    commands.export(str(tmp_path / "w"), str(tmp_path / "out"), dtype="float32")
    again = hf.load(str(tmp_path / "out"))
    assert again.family == "qwen3_moe" and again.config == dataclasses.replace(
        before.config, aux_loss_alpha=again.config.aux_loss_alpha
    )
    same(again.params, before.params)


@pytest.mark.slow
def test_init_from_in_two_processes(source, tmp_path):
    """Each process reads its own shards: losses and exported weights are those of one device, to rounding."""
    model = dataclasses.replace(
        hf.load(source).config, vocab_size=257
    )  # the bytes, and the end of a document
    config = Config(model=model, mesh=MeshConfig(fsdp=1), train=TRAIN)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(config, make_layout(config, mesh))
        checkpoints = Checkpointer(str(tmp_path / "made" / "checkpoints"))
        checkpoints.save(1, to_tree(state), {})
        checkpoints.close()
    workdirs.write_config(str(tmp_path / "made"), config)
    commands.export(str(tmp_path / "made"), str(tmp_path / "start"))

    losses, weights = {}, {}
    for name, start_, experts in (
        ("one", [], 1),
        ("two", ["-m", "deepseek_jax.launch", "--nproc_per_node=2"], 2),
    ):
        options = {
            "init_from": tmp_path / "start",
            "mesh.fsdp": 1,
            "mesh.expert": experts,
            "train.steps": 3,
            "train.batch_size": 4,
            "train.sequence_length": 16,
            "log.every_steps": 1,
            "eval.every_steps": 0,
            "checkpoint.every_steps": 3,
            "compile.cache_dir": "off",
        }
        command = [
            sys.executable,
            *start_,
            "train.py",
            "--config=configs/tiny.py",
            f"--workdir={tmp_path / name}",
            *(f"--config.{key}={value}" for key, value in options.items()),
        ]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, cwd=str(ROOT), env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if "loss" in row]
        commands.export(str(tmp_path / name), str(tmp_path / f"{name}-out"))
        weights[name] = safetensors.numpy.load_file(tmp_path / f"{name}-out" / "model.safetensors")
    assert len(losses["one"]) == 3
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-6)
    assert (
        weights["one"].keys()
        == safetensors.numpy.load_file(tmp_path / "start" / "model.safetensors").keys()
    )
    for name, a in weights["one"].items():
        np.testing.assert_allclose(
            weights["two"][name], a, rtol=0, atol=2e-5, err_msg=name
        )  # three updates of Adam: signs of the smallest gradients
