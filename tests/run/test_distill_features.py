"""A distillation of hidden states and routers from its folders on: a narrower student with half of the
teacher's experts, by a compression.json.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax import objectives, run
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    replaced,
)
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as hf_commands
from deepseek_jax.hf import compression_map
from deepseek_jax.hf.compression_map import CompressionMap, Document
from deepseek_jax.inference.opener import open_model
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import job, student_map
from deepseek_jax.run import teacher as teachers
from deepseek_jax.tensorfile.arrays import flatten
from deepseek_jax.train import projection
from tests.support import chat_folders, hf_folders
from tests.support.stopped_runs import StopAfter, rows

# One of the teacher's two layers, half of its experts.
STUDENT = dataclasses.replace(
    hf_folders.MODEL,
    hidden_size=12,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    n_routed_experts=2,
    num_experts_per_tok=1,
)
MAP = CompressionMap(
    layer_map=(1,), expert_map=(((0, 3), (2,)),), num_experts=4, num_hidden_layers=2
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("inside")
    teacher = chat_folders.model(folder / "teacher")
    where = folder / compression_map.FILE
    where.write_text(compression_map.dump(Document(MAP, ({"kind": "merge"},), "of a test")))
    return Config(
        objective="distill",
        model=STUDENT,
        data=DataConfig(
            path=chat_folders.chats(folder / "chats.jsonl"),
            tokenizer=os.path.join(teacher, "tokenizer.json"),
            eval_fraction=0.1,
        ),
        distill=DistillConfig(
            teacher=teacher, hidden_weight=0.5, router_weight=0.1, map=str(where)
        ),
        train=TrainConfig(steps=4, batch_size=8, sequence_length=80, dtype="float32", remat="none"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        eval=EvalConfig(every_steps=4, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        log=LogConfig(every_steps=1),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.mark.slow
def test_a_run_that_goes_on_and_is_exported(config, tmp_path, capsys):
    workdir, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    result = run.train(config, workdir)
    said = capsys.readouterr().out
    assert "hidden states x 0.5, cosine: 0:1, by 192 parameters that no export has" in said
    assert "router x 0.1: of 1 layers" in said
    steps = [r for r in rows(workdir) if "loss" in r]
    for row in steps:
        ce, kl = 0.5 * row["lm_loss"], 0.5 * 4 * row["kl"]
        inside = 0.5 * row["hidden_loss"] + 0.1 * row["router_loss"]
        balance = config.model.aux_loss_alpha * row["balance_loss"]
        assert row["loss"] == pytest.approx(ce + kl + inside + balance, rel=1e-5)
    assert steps[-1]["hidden_loss"] < steps[0]["hidden_loss"]
    _, own = projection.split(result.state.params)
    (kernel,) = jax.tree.leaves(own)
    assert kernel.shape == (1, 12, 16)

    # Stopped, it goes on bit for bit, the projection with it.
    run.train(config, parts, stopper=StopAfter(2))
    second = run.train(config, parts)
    assert second.losses.keys() == {3, 4}
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)

    # It is in the checkpoint, and not in what is evaluated, asked or exported.
    checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), read_only=True)
    stored = flatten(checkpoints.shapes())
    checkpoints.close()
    assert "params/projection/kernel" in stored
    out = str(tmp_path / "out")
    hf_commands.export(workdir, out)
    tensors = safetensors.numpy.load_file(os.path.join(out, "model.safetensors"))
    assert tensors and not any("projection" in name for name in tensors)
    tokens = np.arange(8, dtype=np.int32)[None]
    ours, theirs = (open_model(folder).model(tokens) for folder in (workdir, out))
    np.testing.assert_array_equal(ours, theirs)

    # With other pairs of layers the projection and the optimizer begin anew; without hidden states it goes.
    longer = replaced(config, "train.steps", 5)
    capsys.readouterr()
    third = run.train(replaced(longer, "distill.hidden_weight", 0.0), parts)
    assert third.step == 5 and projection.NAME not in third.state.params
    assert "optimizer        begins anew" in capsys.readouterr().out
    fourth = run.train(replaced(longer, "train.steps", 6), parts)
    assert fourth.step == 6 and projection.NAME in fourth.state.params


def made(config: Config, **distill):
    for name, value in distill.items():
        config = replaced(config, f"distill.{name}", value)
    return objectives.make(config, teachers.open_teacher(config, "nowhere"))


def test_bad_maps_are_refused_in_a_line(config, tmp_path):
    def refused(why: str, **distill) -> None:
        with pytest.raises(UserError, match=why) as e:
            made(config, **distill)
        assert "\n" not in str(e.value) and "config.distill." in str(e.value)

    refused("config.distill.map=.*cannot be read", map=str(tmp_path / "none.json"))
    other = tmp_path / "other.json"
    other.write_text(
        compression_map.dump(Document(MAP._replace(num_hidden_layers=8), (), "of a test"))
    )
    refused("is of 8 layers, and the teacher has 2", map=str(other))
    refused("n_routed_experts is 2, and 4 of the teacher", map="")
    refused("the teacher has 2 layers, 0 to 1, and no layer 2", hidden_layers="0:2")


def test_where_the_map_is_found(config, tmp_path):
    """The option, the folder that the weights come from, the notes of a run whose source is gone."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / compression_map.FILE).write_text(compression_map.dump(Document(MAP, (), "")))
    unnamed = replaced(config, "distill.map", "")
    assert student_map.map_of(config) == MAP
    assert student_map.map_of(unnamed, str(tmp_path / "run")) is None
    assert student_map.map_of(replaced(unnamed, "init_from", str(folder))) == MAP
    gone = replaced(unnamed, "init_from", str(tmp_path / "gone"))
    os.makedirs(tmp_path / "run")
    os.rename(folder, tmp_path / "run" / "hf")
    assert student_map.map_of(gone, str(tmp_path / "run")) == MAP
    nothing = replaced(replaced(gone, "distill.router_weight", 0.0), "distill.hidden_weight", 0.0)
    assert student_map.map_of(nothing, str(tmp_path / "run")) is None


def test_nothing_is_asked_where_the_weights_are_0(config):
    """The model has no taps, the teacher has none and no projection, and no sums are made for them."""
    objective = made(config, hidden_weight=0.0, router_weight=0.0, map="")
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        frozen = objective.frozen(mesh)
    assert objective.taps == () == frozen.taps and frozen.projection is None
    assert made(config).taps == (("hidden", (0,)), "router_logits")
