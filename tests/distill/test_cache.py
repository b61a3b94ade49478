"""A cached teacher from a command line to the losses of a run that reads it."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import run
from deepseek_jax.config.options import (
    CheckpointConfig,
    CompileConfig,
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
from deepseek_jax.data.fields import INPUTS, OF_TEACHER, RECORD
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.distill import __main__, checks, commands
from deepseek_jax.distill import manifest as manifests
from deepseek_jax.distill.maker import Worker
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import caching, job
from deepseek_jax.run.processes import here
from deepseek_jax.run.teacher import open_teacher
from deepseek_jax.run.teacher_records import TeacherRecords
from deepseek_jax.train.batch import put_batch
from tests.support import ROOT, chat_folders, hf_folders, runs

TINY = ("--config=configs/tiny.py", "--config.data.path=deepseek_jax/errors.py")
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
            steps=0,
            epochs=3.0,
            batch_size=8,
            accumulation=2,
            sequence_length=80,
            dtype="float32",
            remat="none",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        eval=EvalConfig(every_steps=3, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=0, keep=0),
        log=LogConfig(every_steps=1),
        compile=CompileConfig(cache_dir=str(folder / "compiled")),
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
        known = "." in name or name == "seed"
        config = replaced(config, name if known else f"distill.{name}", value)
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


def test_a_cache_equals_the_teacher(config, made):
    """The fields of batches of three epochs and of held-out rows, in two micro-batches, bit for bit: a step
    cannot tell a cached teacher from one that is asked.
    """
    mesh = make_mesh(config, jax.devices()[:1])
    data = open_data(config, load_tokenizer(config.data.tokenizer), INPUTS | RECORD)
    with jax.set_mesh(mesh):
        asked = TeacherRecords(config, "nowhere", data, mesh, False)
        asked.load()
        cached, seen = opened(reading(config, made)), set()
        of_epochs = [data.train_rows(start, 8) for start in range(0, 48, 8)]
        for rows in (*of_epochs, data.eval_rows(0, 8)):
            batch = put_batch(rows, config.micro_batch, mesh)
            online = asked.add_to_batch(batch, 0)
            for name, a in cached.add_to(rows).items():
                given = np.asarray(online[name])
                np.testing.assert_array_equal(given, a.reshape(given.shape), err_msg=name)
            seen |= set(rows["record"].tolist())
    assert set(OF_TEACHER) < online.keys() and seen == {-1, *range(cached.manifest.rows)}


@pytest.mark.slow
def test_training_from_a_cache_equals_the_teacher(config, made, tmp_path):
    """Losses, held-out figures, parameters and moments, over three epochs of chats, bit for bit."""
    online = run.train(config, str(tmp_path / "online"))
    assert online.step == 6
    cached = run.train(reading(config, made), str(tmp_path / "cached"))
    assert_same_runs(online, cached)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chats", "text"])
def test_the_same_on_a_mesh(kind, config, on_text, tmp_path):
    """On 4 x 2 devices, all weights divided, experts exchanged: in training other rows meet than in the
    cache.
    """
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


def opened(config: Config):
    """What a run does with its cache before anything is compiled."""
    config = checks.with_cache(config)
    validate(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = make_mesh(config, jax.devices()[:1])
    teacher = open_teacher(config, "nowhere")
    named = teacher.identity if teacher else ""
    return checks.open_cache(config, open_data(config, tokenizer), mesh, named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train.sequence_length": 64},
            "config.train.sequence_length=64 differs from 80 of config.d",
        ),
        ({"seed": 3}, "config.seed=3 differs from 0 of config.distill.cache=.*Set config.seed=0"),
        ({"data.eval_fraction": 0.3}, "config.data.eval_fraction=0.3 differs from 0.2"),
        ({"sft.packing": "none"}, "config.sft.packing='none' differs from 'bfd'"),
        ({"sft.train_on_header": True}, "config.sft.train_on_header=True differs from False"),
        ({"data.path": "OTHER"}, "holds .* tokens in 41 documents .* and not .* in 40 documents"),
        ({"data.path": "TEXT"}, "config.distill.data='text' differs from 'examples'"),
        ({"data.tokenizer": "OTHER"}, "config.data.tokenizer=.* is sha256:.* are of sha256:"),
        ({"distill.top_k": TOP + 1}, f"top_k={TOP + 1} is above the {TOP} words"),
        ({"distill.temperature": 3.0}, "temperature=3 needs log-sum-exps at 3, .* at 1, 2"),
        (
            {"distill.temperature_schedule": "linear"},
            "config.distill.temperature_schedule=linear and config.distill.cache=",
        ),
        ({"distill.teacher": "OTHER"}, "distill.teacher=.*is another model than the one"),
        ({"distill.cache": "NOTHING"}, r"has no manifest\.json of a cached teacher"),
    ],
    ids=str,
)
def test_what_is_refused(options, message, config, on_text, made, tmp_path):
    known = {
        ("data.path", "OTHER"): lambda: chat_folders.chats(tmp_path / "other.jsonl", 41),
        ("data.path", "TEXT"): lambda: on_text.data.path,
        ("data.tokenizer", "OTHER"): lambda: other_tokenizer(config, tmp_path),
        ("distill.teacher", "OTHER"): lambda: hf_folders.source(tmp_path / "zeros"),
        ("distill.cache", "NOTHING"): lambda: str(tmp_path),
    }
    given = {name: known.get((name, value), lambda v=value: v)() for name, value in options.items()}
    with pytest.raises(UserError, match=message) as raised:
        opened(reading(config, made, **given))
    assert "\n" not in str(raised.value)


def other_tokenizer(config: Config, folder) -> str:
    """The same text in another file: what a tokenizer does is known by its bytes."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = os.path.join(os.path.dirname(config.data.tokenizer), name)
        (folder / name).write_text(open(source).read() + "\n")
    return str(folder / "tokenizer.json")


def test_a_part_of_a_cache_is_refused_with_the_command_that_goes_on(config, made, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(made, part)
    os.remove(part / "shard-00001.json")
    count = manifests.read(made, "DIR").shards
    with pytest.raises(
        UserError, match=rf"{count - 1} of {count} shards are there\. Go on with: make it"
    ):
        opened(reading(config, str(part)))


def test_what_is_free(config, made, tmp_path):
    """The mixture's order, batch size and fewer words change no row; the tail is that of all words."""
    free = {"top_k": 3, "temperature": 1.0, "train.batch_size": 4}
    free["teacher"] = config.distill.teacher  # that it was made of
    few, all_ = opened(reading(config, made, **free)), opened(reading(config, made))
    assert few is not None and all_ is not None
    for a, b in zip(few.row(1), all_.row(1), strict=True):
        columns = slice(3) if a.shape[-1] == 3 else [0, 0]
        np.testing.assert_array_equal(a, b[:, columns])


@pytest.mark.parametrize(
    ("request_", "top", "message"),
    [
        ({}, 321, "top_k=321 is above config.model.vocab_size=320"),
        ({"rows_per_call": 3}, TOP, "--rows-per-call=3 is not divisible by the 2 devices"),
        ({"rows_per_shard": 5}, TOP, "--rows-per-shard=5 is not a multiple of the 2 rows"),
        ({"out": "MADE"}, 5, "holds another cache: .* differs from .* of it"),
    ],
    ids=str,
)
def test_what_cannot_be_made(request_, top, message, config, made, tmp_path):
    config = replaced(replaced(config, "mesh.fsdp", 2), "distill.top_k", top)
    out = made if request_.pop("out", "") else tmp_path / "out"
    with pytest.raises(UserError, match=message):
        caching.cache_teacher(config, caching.Request(str(out), (1.0, 2.0), **request_), here())


@pytest.mark.slow
def test_workers_share_the_work(config, made, tmp_path, capsys):
    """Bytes do not depend on how many there are, nor on what was there."""
    folder = tmp_path / "workers"
    for i in (1, 2, 0):
        cache(config, folder, worker=Worker(i, 3), rows_per_shard=2)
        assert ("which is complete" in capsys.readouterr().out) == (i == 0)
    assert files(str(folder)) == files(made)
    os.remove(folder / "shard-00002.json")
    cache(config, folder, rows_per_shard=2)
    said = capsys.readouterr().out
    count = manifests.read(made, "DIR").shards
    assert f"{count} shards, {count - 1} of them there already" in said
    assert files(str(folder)) == files(made)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cache", "--teacher=T"], "--out"),
        (["cache", "--teacher=T", "--out=O", "--worker=4/4"], "'4/4' is not one of some workers"),
        (
            ["cache", "--teacher=T", "--out=O", "--temperatures=0,1"],
            "not a list of numbers above 0",
        ),
        (["cache", "--teacher=T", "--out=O"], "--config and --workdir are missing"),
        (["cache", "--teacher=T", "--out=O", "--top-k=0"], "--top-k: '0' is not a whole number of"),
        (
            ["cache", "--teacher=T", "--out=O", "--top-k=400", *TINY],
            "^--top-k=400 is above config.model.vocab_size=320. Set it to 320 or less.$",
        ),
        (["cache", "--teacher=nowhere", "--out=O", *TINY], "^--teacher: nowhere is not a folder"),
        (["verify", "nowhere"], "nowhere has no manifest.json"),
        (["show", "nowhere", "--more"], "unrecognized arguments: --more"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        __main__.main(argv)


@pytest.mark.slow
def test_the_command_killed_20_times(config, on_text, tmp_path):
    """The program as a user runs it, killed at random instants after it has written something: the bytes of
    one that nobody disturbed. Then verify and show.
    """
    text = tmp_path / "text.jsonl"  # long enough that work is left after 20 rounds of it
    text.write_bytes(Path(on_text.data.path).read_bytes() * 6)

    def command(out, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "deepseek_jax.distill", "cache", "--config=configs/tiny.py"),
            f"--teacher={config.distill.teacher}",
            f"--out={out}",
            *("--top-k=4", "--temperatures=2", "--rows-per-shard=1"),
            f"--config.data.path={text}",
            f"--config.data.tokenizer={config.data.tokenizer}",
            *("--config.model.vocab_size=320", "--config.train.sequence_length=16"),
            *("--config.train.dtype=float32", "--config.mesh.fsdp=1", *more),
        ]

    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    start = functools.partial(
        subprocess.Popen, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def count() -> int:
        return len(os.listdir(killed)) if killed.exists() else 0

    draw, calm, killed, stopped = random.Random(0), tmp_path / "calm", tmp_path / "killed", 0
    undisturbed = start(command(calm))
    assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
    for i in range(20):
        before = count()
        process = start(command(killed, f"--worker={i % 2}/2" if i % 3 else "--worker=0/1"))
        while process.poll() is None and count() <= before + 1:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        stopped += process.wait(60) == -signal.SIGKILL
        process.stdout.close(), process.stderr.close()
    assert stopped >= 15
    last = start(command(killed))
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert b"which is complete" in out and b"tokens per second" in out
    names = set(os.listdir(calm)) - {"manifest.json"}
    assert set(os.listdir(killed)) == names | {"manifest.json"}
    assert all((calm / name).read_bytes() == (killed / name).read_bytes() for name in names)
    assert not manifests.read(str(calm), "").difference(manifests.read(str(killed), ""))
    assert commands.verify(str(killed))[0] == 0
    shown = commands.show(str(killed))[1]
    assert (
        shown["complete"] == shown["shards"] == shown["rows"] and "--worker" not in shown["command"]
    )


@pytest.mark.slow
def test_two_processes(config, on_text, tmp_path):
    """They make the bytes of one process with as many devices, and each reads the records of its own rows:
    the losses are those of one.
    """
    common = [
        f"--config.data.path={on_text.data.path}",
        f"--config.data.tokenizer={config.data.tokenizer}",
        *runs.SMALL,
        *("--config.model.vocab_size=320", "--config.train.accumulation=2"),
        *("--config.train.steps=3", "--config.train.dtype=float32", "--config.mesh.fsdp=2"),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    launch = ("-m", "deepseek_jax.launch", "--nproc_per_node=2")
    for folder, devices, before in ((one, 2, ()), (two, 1, launch)):
        args = ["cache", "--config=configs/tiny.py", f"--teacher={config.distill.teacher}"]
        args += [*common, f"--out={folder}", "--top-k=4", "--rows-per-shard=10"]
        done = runs.run(args, devices, (*before, "-m", "deepseek_jax.distill"))
        assert done.returncode == 0, done.stderr
    shards = sorted(path.name for path in one.glob("shard-*"))
    assert shards and all((one / n).read_bytes() == (two / n).read_bytes() for n in shards)
    for devices, before in ((2, ()), (1, launch)):
        args = ["--config=configs/tiny.py", f"--workdir={tmp_path / f'run{devices}'}", *common]
        args += ["--config.objective=distill", f"--config.distill.cache={one}"]
        done = runs.run(args, devices, (*before, "train.py"))
        assert done.returncode == 0, done.stderr
    found = [runs.losses(tmp_path / f"run{devices}") for devices in (1, 2)]
    # Gloo and one process add up gradients in another order.
    assert found[0].keys() == found[1].keys() == {1, 2, 3}
    np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), rtol=1e-5)
