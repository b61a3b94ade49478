"""Checkpoints evaluated as they appear, beside the process that writes and deletes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from deepseek_jax import evaluate
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config.options import Config, TrainConfig
from deepseek_jax.inference import opener
from deepseek_jax.inference.evaluation import measurement, perplexity, watch
from deepseek_jax.inference.evaluation.scorer import Scorer
from deepseek_jax.run import importer
from deepseek_jax.train.state import to_tree
from tests.support import ROOT

STEPS = (2, 4, 6)
# Puts whole checkpoints into a run's folder as a run does, by rename, and deletes old ones.
WRITER = """
import os, shutil, sys, time
source, target, keep, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
for step in sorted(map(int, os.listdir(source))):
    shutil.copytree(f"{source}/{step}", f"{target}/{step}.tmp")
    os.rename(f"{target}/{step}.tmp", f"{target}/{step}")
    old = sorted(int(n) for n in os.listdir(target) if n.isdigit())
    for o in old[:-keep]:
        os.rename(f"{target}/{o}", f"{target}/{o}.old.tmp")
        shutil.rmtree(f"{target}/{o}.old.tmp")
    time.sleep(pause)
"""


@pytest.fixture(autouse=True)
def without_a_cache(monkeypatch):
    monkeypatch.setattr(evaluate.compile_cache, "use_cache", lambda *_, **__: None)


@pytest.fixture(scope="module")
def made_run(made, tmp_path_factory):
    """(workdir of a run of 6 steps without checkpoints, folder with those of STEPS, the text)."""
    top = tmp_path_factory.mktemp("watched")
    text, work, stored = top / "text.jsonl", top / "work", top / "stored"
    text.write_text(
        "".join(json.dumps({"text": f"{i:02d}: hello world, be kind"}) + "\n" for i in range(40))
    )
    importer.import_(str(made[1]), str(work))
    config = json.loads((work / "config.json").read_text())
    config["data"] |= {"path": str(text), "eval_fraction": 0.25}
    config["train"] |= {"steps": STEPS[-1]}
    config["last_step"] = STEPS[-1]
    (work / "config.json").write_text(json.dumps(config))
    opened = opener.open_model(str(made[1]))
    checkpoints = Checkpointer(str(stored))
    with jax.set_mesh(opened.model.mesh):
        nothing = {n: None for n in opened.model.layout.abstract._fields}
        for step in STEPS:
            params = jax.tree.map(lambda a, step=step: a * (1 - step / 20), opened.model.params)
            state = opened.model.layout.abstract._replace(**nothing)._replace(
                params=params, bias=opened.model.bias
            )
            checkpoints.save(step, to_tree(state), {})
    checkpoints.close()
    return work, stored, text


def copied(made, tmp_path):
    """A copy of a run, with an empty folder for its checkpoints."""
    work, *rest = made
    shutil.copytree(work, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    return tmp_path / "run", *rest


@pytest.fixture
def real_run(made_run, tmp_path):
    return copied(made_run, tmp_path)


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory):
    """As made_run, of whole checkpoints with nothing of a model in them, and without a text."""
    top = tmp_path_factory.mktemp("bare")
    (top / "work" / "hf").mkdir(parents=True)
    (top / "work" / "hf" / "model.safetensors").write_text("a baseline")
    config = Config(train=TrainConfig(steps=STEPS[-1]))
    (top / "work" / "config.json").write_text(json.dumps(config.to_json()))
    checkpoints = Checkpointer(str(top / "stored"))
    for step in STEPS:
        checkpoints.save(step, {"params": {"a": jax.numpy.arange(4096.0)}}, {})
    checkpoints.close()
    return top / "work", top / "stored"


@pytest.fixture
def run(bare_run, tmp_path):
    return copied(bare_run, tmp_path)


@pytest.fixture
def stub(monkeypatch):
    """Checkpoints are read and checked, and nothing is computed with them."""

    def of_path(self, path, step, run=""):
        if step is not None:
            Checkpointer(f"{path}/checkpoints", read_only=True).read_extra(step)
        names = ("perplexity", "nats_per_token", "documents", "tokens", "bytes", "window", "stride")
        return dict.fromkeys(names, step or 0) | {"bits_per_byte": None, "seconds": 0.0}

    monkeypatch.setattr(evaluate.Measurement, "of_path", of_path)


def start_writer(stored, run, keep=9, pause=0.0):
    argv = [
        sys.executable,
        "-c",
        WRITER,
        str(stored),
        str(run / "checkpoints"),
        str(keep),
        str(pause),
    ]
    return subprocess.Popen(argv)


def command(run, *options):
    window = () if any("--tasks" in o for o in options) else ("--window=32",)
    argv = [
        str(run), "--watch", "--watch-interval=0.05", "--watch-timeout=20", *window,
        "--batch-size=4", *options,
    ]  # fmt: skip
    return exit_code("evaluate", lambda: evaluate.main(argv))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def direct(run, step, text):
    opened = opener.open_model(str(run), step)
    return perplexity.of_text(opened, str(text), Scorer(opened.model, 32, 4), 16)["perplexity"]


def test_a_run_in_another_process(run, stub, capsys):
    """The baseline first, then every checkpoint once and in order; done when the last step is reached."""
    folder, stored = run
    writer = start_writer(stored, folder, pause=0.3)
    assert command(folder) == 0
    assert writer.wait(20) == 0
    out, err = capsys.readouterr()
    rows = rows_of(folder / watch.ROWS)
    assert [(r["step"], r["perplexity"]) for r in rows] == [(0, 0), (2, 2), (4, 4), (6, 6)]
    assert rows[0]["model"] == str(folder / "hf") and rows[1]["model"] == str(folder)
    assert out.count("perplexity") == 4 and "the run has come to its last step, 6" in err
    # a second watcher has nothing to do
    assert command(folder) == 0 and rows_of(folder / watch.ROWS) == rows


def test_killed_and_started_again(run, stub, capsys, monkeypatch):
    """After each number of rows, with half a row at the end."""
    folder, stored = run
    assert start_writer(stored, folder).wait(20) == 0
    real = watch.RowFile.append
    for kills in range(3):
        (folder / watch.ROWS).unlink(missing_ok=True)
        count = 0

        def dies(self, rows, kills=kills):
            nonlocal count
            if count > kills:
                raise KeyboardInterrupt
            count += 1
            real(self, rows)

        monkeypatch.setattr(watch.RowFile, "append", dies)
        assert command(folder) == 130
        kept = rows_of(folder / watch.ROWS)
        assert [r["step"] for r in kept] == [0, *STEPS][: kills + 1]
        with open(folder / watch.ROWS, "a") as f:
            f.write('{"step": 6, "perp')
        monkeypatch.setattr(watch.RowFile, "append", real)
        assert command(folder) == 0
        rows = rows_of(folder / watch.ROWS)
        assert [r["step"] for r in rows] == [0, *STEPS] and rows[: kills + 1] == kept


def test_deleted_and_damaged_checkpoints(run, stub, capsys, monkeypatch):
    """One that goes while it is about to be read, and one with other bytes, are passed over in a line."""
    folder, stored = run
    assert start_writer(stored, folder).wait(20) == 0
    damaged = max(
        (folder / "checkpoints" / "4").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    damaged.write_bytes(bytes(damaged.stat().st_size))
    real = evaluate.Measurement.of_path

    def gone(self, path, step, *more):
        if step == 2:
            shutil.rmtree(folder / "checkpoints" / "2")
        return real(self, path, step, *more)

    monkeypatch.setattr(evaluate.Measurement, "of_path", gone)
    assert command(folder) == 0
    err = capsys.readouterr().err
    assert "step 2         skipped: it was deleted before it was read" in err
    assert "step 4         skipped: it is damaged" in err
    assert [r["step"] for r in rows_of(folder / watch.ROWS)] == [0, 6]


def test_a_run_that_keeps_two(run, stub, capsys):
    """Whatever is gone by the time it is looked at: no step twice, in order, and the last one is there."""
    folder, stored = run
    writer = start_writer(stored, folder, keep=1, pause=0.2)
    assert command(folder) == 0
    assert writer.wait(20) == 0
    steps = [r["step"] for r in rows_of(folder / watch.ROWS)]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 6


def test_timeout_and_a_run_that_has_not_begun(tmp_path, run, stub, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = time.monotonic()
    assert command(empty, "--watch-timeout=0.3") == 0
    err = capsys.readouterr().err
    assert (
        "waiting        for" in err and "nothing new for" in err and time.monotonic() - begun < 10
    )
    folder, stored = run
    shutil.copytree(stored / "2", folder / "checkpoints" / "2")
    assert command(folder, "--watch-timeout=0.3") == 0
    assert "nothing new for" in capsys.readouterr().err
    assert [r["step"] for r in rows_of(folder / watch.ROWS)] == [0, 2]


def test_tasks_of_the_harness(run, capsys, monkeypatch):
    """Each checkpoint goes to lm-evaluation-harness by its step; without the harness one line says so."""
    folder, stored = run
    assert start_writer(stored, folder).wait(20) == 0
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "deepseek_jax.inference.lm_eval", raising=False)
    assert command(folder, "--tasks=a,b") == 2
    err = capsys.readouterr().err
    assert "--tasks=a,b: lm-evaluation-harness cannot be imported" in err and err.count("\n") == 1
    asked = []

    def simple_evaluate(model, tasks, limit):
        asked.append((*model[:2], tasks, limit))
        return {"results": {t: {"acc,none": 0.25, "alias": t} for t in tasks}}

    harness = types.SimpleNamespace(
        DeepseekJaxLM=lambda *given: given,
        lm_eval=types.SimpleNamespace(simple_evaluate=simple_evaluate),
    )
    monkeypatch.setattr(measurement, "_harness", lambda tasks: harness)
    argv = [str(folder), "--watch", "--watch-interval=0.05", "--tasks=a,b", "--limit=7"]
    assert exit_code("evaluate", lambda: evaluate.main(argv)) == 0
    paths = [str(folder / "hf"), *[str(folder)] * 3]
    steps = [None, *STEPS]
    assert asked == [(p, s, ["a", "b"], 7) for p, s in zip(paths, steps, strict=True)]
    assert "acc,none 0.2500" in capsys.readouterr().out
    assert rows_of(folder / watch.ROWS)[3]["results"]["b"]["acc,none"] == 0.25


def test_two_watchers_of_one_file(run, stub, capsys):
    folder, _ = run
    with watch.RowFile(str(folder / watch.ROWS), "--output"):
        assert command(folder) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_mistakes_are_one_line(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    names = "text questions tasks window stride limit dtype".split()
    measured = dict.fromkeys(names) | {"dtype": "float32"}

    def watched(line: str) -> list[str]:
        path = tmp_path / f"{abs(hash(line))}.jsonl"
        path.write_text(line + "\n")
        return [str(folder), "--watch", f"--output={path}"]

    for argv, message in (
        ([f"{tmp_path}/model", "--watch"], "--watch is for the folder of a run"),
        ([f"{tmp_path}/nothing", "--watch"], "there is no folder"),
        ([str(folder), "--watch", "--step=2"], "--step=2 does not go with --watch"),
        ([str(folder), "--watch", "--adapter=x"], "does not go with --watch"),
        ([str(folder), "--watch-interval=3"], "--watch-interval=3 has no effect without --watch"),
        ([str(folder), "--watch", "--watch-interval=0"], "must be above 0"),
        ([str(folder), "--watch", "--watch-timeout=-1"], "--watch-timeout=-1 must be above 0"),
        ([str(folder), "--tasks=a", "--window=3"], "--window=3 is for text, and --tasks has none"),
        (watched("nonsense"), "is not a row ("),
        (watched("[" * 100_000), "is not a row ("),
        (watched('{"step": 1}'), "holds rows of other figures, None and not"),
        (watched(json.dumps({"measured": measured})), "line 1 has the step None, which is no num"),
    ):
        code = exit_code("evaluate", lambda: evaluate.main(argv))  # noqa: B023
        err = capsys.readouterr().err
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_what_a_run_held_out(real_run, capsys):
    """The baseline first, then every checkpoint once and in order; done when the last step is reached. What
    it held out is read for all of them."""
    folder, stored, text = real_run
    before = os.stat(folder / "config.json").st_mtime_ns
    writer = start_writer(stored, folder, pause=0.5)
    assert command(folder) == 0
    assert writer.wait(20) == 0
    out, err = capsys.readouterr()
    rows = rows_of(folder / watch.ROWS)
    assert [r["step"] for r in rows] == [0, *STEPS]
    assert all(r["documents"] == 10 and r["measured"]["window"] == 32 for r in rows)
    assert len({r["perplexity"] for r in rows}) == 4
    assert out.count("perplexity") == 4 and "the run has come to its last step, 6" in err
    assert os.stat(folder / "config.json").st_mtime_ns == before
    assert sorted(os.listdir(folder / "checkpoints")) == ["2", "4", "6"]
    # a second watcher has nothing to do
    assert command(folder) == 0 and rows_of(folder / watch.ROWS) == rows


@pytest.mark.slow
def test_of_text_as_evaluated_directly(real_run, capsys):
    folder, stored, text = real_run
    assert start_writer(stored, folder).wait(20) == 0
    assert command(folder, f"--text={text}", f"--output={folder}/rows") == 0
    rows = rows_of(folder / "rows")
    assert [r["step"] for r in rows] == [0, *STEPS]
    np.testing.assert_allclose(rows[2]["perplexity"], direct(folder, 4, text), rtol=1e-6)
    # rows of other figures
    assert command(folder, f"--output={folder}/rows") == 2
    err = capsys.readouterr().err
    assert "holds rows of other figures" in err.splitlines()[-1]


@pytest.mark.slow
def test_beside_a_training_process(tmp_path):
    """train.py writes checkpoints and keeps two; the watcher is killed once and started again."""
    from tests.support import runs

    text, work = tmp_path / "text.txt", tmp_path / "work"
    text.write_text("\n".join(f"{i}: hello world, be kind and sunny" for i in range(4000)))
    argv = runs.command(
        work, text, "--config.train.steps=30", "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep=2", "--config.eval.every_steps=0",
    )  # fmt: skip
    work.mkdir()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    watcher = [
        sys.executable, "-m", "deepseek_jax.evaluate", str(work), "--watch", "--watch-interval=0.2",
        "--watch-timeout=600", "--limit=20", "--window=64",
    ]  # fmt: skip
    training = subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    first = subprocess.Popen(watcher, cwd=ROOT, env=env)
    timer = threading.Timer(1200, training.kill)
    timer.start()
    try:
        rows = work / watch.ROWS
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
        found = subprocess.run(
            watcher, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
        )
        assert training.wait(10) == 0 and found.returncode == 0, found.stderr
    finally:
        timer.cancel()
        training.kill()
        first.kill()
    steps = [r["step"] for r in rows_of(rows)]
    assert steps == sorted(set(steps)) and steps[-1] == 30 and set(steps) <= set(range(5, 35, 5))
    losses = {r["step"]: r["nats_per_token"] for r in rows_of(rows)}
    assert all(np.isfinite(list(losses.values())))
    assert sorted(os.listdir(work / "checkpoints"), key=str)[-2:] == ["25", "30"]
