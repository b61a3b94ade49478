"""The job of train.py, called from Python: in a thread, again, among processes joined elsewhere."""

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

import train as train_py
from deepseek_jax import run
from deepseek_jax.config.configdict import base_config
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    TrainConfig,
)
from deepseek_jax.errors import BadNumbers, ExitCode, UserError, stopped_by
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import call, job, metrics
from tests.support import ROOT
from tests.support.small_runs import ADAMW, TINY
from tests.support.stopped_runs import StopAfter


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["route", "expert", "token", "mesh"], 4000)
    (folder / "text.txt").write_text(" ".join(words))
    return Config(
        model=dataclasses.replace(TINY, vocab_size=320),
        mesh=MeshConfig(fsdp=-1),
        train=TrainConfig(steps=4, batch_size=8, sequence_length=32, dtype="float32", remat="none"),
        optimizer=ADAMW,
        data=DataConfig(path=str(folder)),
        eval=EvalConfig(every_steps=0, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        log=LogConfig(every_steps=1),
    )


def in_a_thread(call):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result(300)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


@pytest.mark.slow
def test_in_a_thread_and_again(config, tmp_path, monkeypatch, capsys):
    """A run that is stopped and goes on, in other threads, is the run that was not stopped.

    The program's own arguments and mesh are left alone.
    """
    monkeypatch.setattr(sys, "argv", ["notebook", "--config=nonsense"])
    whole = in_a_thread(lambda: run.train(config, str(tmp_path / "whole")))
    assert (whole.step, whole.stopped_by, whole.exit_code) == (4, None, 0)
    assert whole.checkpoint == str(tmp_path / "whole" / "checkpoints" / "4")
    assert os.path.isdir(whole.checkpoint)
    assert whole.losses == losses(tmp_path / "whole") and sorted(whole.losses) == [1, 2, 3, 4]
    assert whole.evaluation["step"] == 4 and whole.evaluation["eval_loss"] > 0
    assert int(whole.state.step) == 4
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    names = {name: metrics.METRICS[name].row for row in rows for name in json.loads(row)}
    assert set(names.values()) == {"step", "evaluation"}, "a row without a name in the table"

    parts = tmp_path / "parts"
    first = in_a_thread(lambda: run.train(config, str(parts), stopper=StopAfter(3)))
    assert (first.step, first.stopped_by, first.exit_code) == (3, 15, stopped_by(15))
    assert os.path.isdir(first.checkpoint) and first.checkpoint.endswith("/3")
    second = run.train(config, str(parts))  # in the main thread
    assert sorted(second.losses) == [4] and losses(parts) == whole.losses
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True)
    )
    nothing = run.train(config, str(parts))
    assert nothing.step == 4 and nothing.losses == {} and nothing.exit_code == ExitCode.DONE
    assert "is done already" in capsys.readouterr().out
    assert jax.sharding.get_abstract_mesh().empty, "the mesh of a run outlives it"


def test_mistakes_and_failures_are_raised(config, tmp_path, monkeypatch):
    """In one line, with the exit code that train.py would have; the workdir is free again afterwards.

    The failure is of one dense layer on one device: experts and a mesh are of test_bad_numbers.py.
    """
    workdir = str(tmp_path / "run")
    wrong = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=7))
    with pytest.raises(UserError, match="config.train.batch_size") as error:
        run.train(wrong, workdir)
    assert error.value.code == ExitCode.MISTAKE
    model = dataclasses.replace(config.model, num_hidden_layers=1, first_k_dense_replace=1)
    monkeypatch.setattr(job, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    bad = dataclasses.replace(
        config,
        model=model,
        train=dataclasses.replace(config.train, max_bad_steps=1),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e38, grad_clip=0.0),
    )
    with pytest.raises(BadNumbers, match="non-finite loss or gradient") as failure:
        in_a_thread(lambda: run.train(bad, workdir))
    assert failure.value.code == ExitCode.BAD_NUMBERS and failure.value.step > 1
    with pytest.raises(UserError, match="config.train.steps=0"):
        options = base_config()
        options.train.steps = 0
        run.train(options, workdir)


def test_train_py_goes_through_the_same_stages():
    """train.py is the job for the command line, run.train for Python: neither has a stage of its own."""

    def stages(function) -> list[str]:
        source = textwrap.dedent(pathlib.Path(function.__code__.co_filename).read_text())
        (body,) = (
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name == function.__name__
        )
        (inside,) = (
            node
            for node in ast.walk(body)
            if isinstance(node, ast.With) and "Job(" in ast.unparse(node.items[0])
        )
        calls = [ast.unparse(line) for line in inside.body]
        return [line.removeprefix("return ").removeprefix("result = ") for line in calls]

    ours = stages(train_py.main)
    assert ours == stages(call.train) and "job.loop(step, start)" in ours[-1]


@pytest.mark.slow
def test_processes_that_something_else_joined(config, tmp_path):
    """Two processes that called jax.distributed.initialize have the losses of one process.

    A mistake of one of them is raised in both.
    """
    alone = run.train(config, str(tmp_path / "alone")).losses
    program = """
        import json, os, sys
        import jax
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        from deepseek_jax import run
        from deepseek_jax.config.configdict import from_config_dict
        from deepseek_jax.errors import UserError
        options, me, folder = json.loads(sys.argv[3]), int(sys.argv[2]), sys.argv[4]
        options["data"]["path"] += "/absent" * (me == 1)
        try:
            run.train(from_config_dict(options), folder)
        except UserError as e:
            print("refused:", e, flush=True)
        options["data"]["path"] = options["data"]["path"].removesuffix("/absent")
        result = run.train(from_config_dict(options), folder)
        print(json.dumps(result.losses), flush=True)
    """
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(program), address]
    folder = str(tmp_path / "two")
    more = [json.dumps(config.to_json()), folder]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [*command, str(i), *more], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    deadline = time.monotonic() + 300
    outs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    for out in outs:
        assert "refused: " in out and "absent" in out
        found = {int(k): v for k, v in json.loads(out.splitlines()[-1]).items()}
        np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=1e-5)
