"""A cached teacher from a command line to the losses of a run that reads it."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax import run
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
    replaced,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.distill import commands, shards
from deepseek_jax.distill import manifest as manifests
from deepseek_jax.distill.maker import Worker
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import caching, job
from deepseek_jax.run.processes import here
from tests.support import ROOT, chat_folders, hf_folders

STUDENT = dataclasses.replace(hf_folders.MODEL, num_hidden_layers=1)
TOP = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Of training on chats, several epochs of them, two micro-batches a step."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = chat_folders.model(folder / "teacher")
    chat_folders.chats(folder / "chats.jsonl", 40)
    text = [f"{a} and {b} are {a + b}. " * 3 for a in range(9) for b in range(9)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    return Config(
        objective="distill",
        model=STUDENT,
        data=DataConfig(
            path=str(folder / "chats.jsonl"),
            tokenizer=os.path.join(teacher, "tokenizer.json"),
            eval_fraction=0.2,
        ),
        distill=DistillConfig(teacher=teacher, alpha=0.7, top_k=TOP),
        train=TrainConfig(
            steps=6, batch_size=8, accumulation=2, sequence_length=80, dtype="float32", remat="none"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        eval=EvalConfig(every_steps=3, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=0, keep=0),
        log=LogConfig(every_steps=1),
    )


@pytest.fixture(scope="module")
def on_text(config) -> Config:
    folder = os.path.dirname(config.data.path)
    return replaced(config, "data.path", os.path.join(folder, "text.jsonl"))


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """As many devices as the mesh has."""

    def some(config, devices=None):
        count = config.mesh.fsdp * config.mesh.expert
        return make_mesh(config, jax.devices()[: abs(count)])

    for module in (job, caching):
        monkeypatch.setattr(module, "make_mesh", some)


def cache(config: Config, out, **request) -> str:
    known = {"temperatures": (1.0, 2.0), "command": "make it"}
    validate(config)
    caching.cache_teacher(config, caching.Request(str(out), **(known | request)), here())
    return str(out)


def reading(config: Config, folder: str, **options) -> Config:
    """The options of a run that reads a cache."""
    for name, value in ({"teacher": "", "top_k": 0, "cache": folder} | options).items():
        config = replaced(config, name if "." in name else f"distill.{name}", value)
    return config


def files(folder: str) -> dict[str, bytes]:
    return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A cache that nobody disturbed, made on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        return cache(config, tmp_path_factory.mktemp("made") / "cache", rows_per_shard=2)


def assert_same_runs(a: run.Result, b: run.Result) -> None:
    assert a.losses == b.losses and len(a.losses) > 1
    assert a.evaluation == b.evaluation and "eval_kl" in a.evaluation
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_training_from_a_cache_equals_the_teacher(config, made, tmp_path):
    """Losses, held-out figures, parameters and moments, over three epochs of chats, bit for bit."""
    online = run.train(config, str(tmp_path / "online"))
    assert commands.show(made)[1]["rows"] * 2 < 6 * 8 + commands.show(made)[1]["rows"]
    cached = run.train(reading(config, made), str(tmp_path / "cached"))
    assert_same_runs(online, cached)
    again = reading(config, made, teacher=config.distill.teacher)
    assert run.train(again, str(tmp_path / "both")).losses == cached.losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chats", "text"])
def test_the_same_on_a_mesh(kind, config, on_text, tmp_path):
    """On 4 x 2 devices, all weights divided, experts exchanged: other rows meet in the cache and in training."""
    config = dataclasses.replace(
        config if kind == "chats" else on_text,
        mesh=MeshConfig(fsdp=4, expert=2),
        sharding=ShardingConfig(min_weight_size=0),
        train=dataclasses.replace(config.train, batch_size=16, steps=5),
    )
    folder = cache(config, tmp_path / "cache")
    online = run.train(config, str(tmp_path / "online"))
    cached = run.train(reading(config, folder), str(tmp_path / "cached"))
    assert_same_runs(online, cached)
