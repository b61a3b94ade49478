"""The program as a user runs it: train, resume, stop by signal, generate; mistakes in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import train
from deepseek_jax import generate
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.report.markup import visible
from deepseek_jax.train import starts
from tests.support import ROOT
from tests.support.report_pages import Page
from tests.support.runs import command, environment, losses, run

# One stack of layers, on 2 x 2 devices: dense layers and prediction of further tokens would double the
# program. The slow runs have them.
DEVICES = 4
OPTIONS = [
    "--config.train.steps=12",
    "--config.checkpoint.every_steps=4",
    "--config.mesh.expert=2",
    "--config.model.first_k_dense_replace=0",
    "--config.model.num_nextn_predict_layers=0",
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, corpus):
    workdir = tmp_path_factory.mktemp("whole")
    done = run(command(workdir, corpus, *OPTIONS), DEVICES)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_main_job(whole_run):
    workdir, out = whole_run
    values = losses(workdir)
    assert sorted(values) == list(range(1, 13))
    assert values[12] < values[1] - 0.3, "the model did not learn"
    for words in (
        "parameters",
        "active",
        "fsdp 2",
        "expert 2",
        "full_shard",
        "bytes per device",
        "FLOPs per token",
        "held-out loss",
        "bits per byte",
        "checkpoint",
        "sample",
        "tokens/s",
        "max violation",
        "left",
    ):
        assert words in out, f"{words!r} is not in the output"
    assert sorted(os.listdir(workdir / "checkpoints")) == ["12", "4", "8"]
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["hidden_size"] == 32 and config["mesh"]["expert"] == 2
    assert any(f.startswith("events.out.tfevents") for f in os.listdir(workdir / "tensorboard"))
    evals = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" in line
    ]
    assert evals and evals[-1]["step"] == 12 and 0 < evals[-1]["eval_bits_per_byte"] < 9
    [start] = starts.read(str(workdir))
    assert starts.processes(start) == [0] * DEVICES and ["expert", 2] in start["mesh"]
    page = Page((workdir / "report.html").read_text(encoding="utf-8"))
    steps, loss = page.series("loss")
    assert dict(zip(steps.tolist(), loss.tolist(), strict=True)) == values
    assert "of 12: finished" in page.text and "device 3: fsdp 1, expert 1" in page.text
    assert [s for kind, s in page.marks() if kind == "checkpoint"] == [4, 8, 12]
    [sample] = map(json.loads, (workdir / "samples.jsonl").read_text().splitlines())
    assert sample["step"] == 12 and " ".join(visible(sample["text"]).split()) in page.text


def test_resume_is_bit_exact(whole_run, corpus, tmp_path, monkeypatch, capsys):
    """Stopped after 5 steps by a signal: the same losses as the run that was not stopped.

    Its stdout is ASCII only, and nobody reads it to the end.
    """
    first = command(tmp_path, corpus, *OPTIONS, "--config.eval.every_steps=0")
    env = environment(first, DEVICES) | {"PYTHONIOENCODING": "ascii"}
    p = subprocess.Popen(
        [sys.executable, "train.py", *first], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    for line in p.stdout:
        assert line.isascii()
        if line.startswith("step      3"):
            p.stdout.close()
            break
    deadline = time.monotonic() + 60
    while max(losses(tmp_path)) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    p.send_signal(signal.SIGUSR1)
    assert p.wait(timeout=120) == 128 + signal.SIGUSR1
    assert "of 12: stopped" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    again = run(first, DEVICES)
    assert again.returncode == 0 and "resuming after step" in again.stdout, again.stderr
    assert losses(tmp_path) == losses(whole_run[0])
    stopped = starts.read(str(tmp_path))[1]["step"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert stopped >= 5 and ("start", stopped) in page.marks() and "of 12: finished" in page.text
    monkeypatch.chdir(ROOT)
    assert train.main(["train.py", *first]) == 0
    assert "is done already" in capsys.readouterr().out


@pytest.mark.slow
def test_damage_costs_one_interval(whole_run, corpus, tmp_path):
    """The newest checkpoint has a bad byte: the run goes on from the one before, with the same losses.

    It also changes the kind of its checkpoints.
    """
    workdir = tmp_path / "run"
    shutil.copytree(whole_run[0], workdir)
    top = workdir / "checkpoints" / "12"
    file = max((p for p in top.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 16
    file.write_bytes(raw)
    again = run(
        command(
            workdir,
            corpus,
            *OPTIONS,
            "--config.checkpoint.kind=full",
            "--config.checkpoint.keep=1",
            "--config.checkpoint.keep_best=1",
        ),
        DEVICES,
    )
    assert again.returncode == 0 and "resuming after step 8" in again.stdout, again.stderr
    page = Page((workdir / "report.html").read_text(encoding="utf-8"))
    assert "goes on after step 8 on 4 devices, with sequence " in page.text
    assert "; 12 was reached before: 4 steps made again" in page.text
    assert "12.damaged" in page.text
    assert f"{file.relative_to(top)}: its bytes are not those that were written" in again.stderr
    assert "kept aside as 12.damaged" in again.stderr
    assert losses(workdir) == losses(whole_run[0])
    left = os.listdir(workdir / "checkpoints")
    assert {"12", "12.damaged"} <= set(left) and "4" not in left
    assert (workdir / "checkpoints" / "12" / "state" / "state.safetensors.index.json").exists()


ASKED = ("--prompt=token ", "--max-tokens=12", "--seed=3")
GENERATE = ("-m", "deepseek_jax.generate")


def test_generate(whole_run, capsys):
    """From the folder of a run; that a seed gives the same text: tests/inference/test_generation_text.py."""
    assert generate.main([f"--workdir={whole_run[0]}", *ASKED]) == 0
    assert capsys.readouterr().out.startswith("token ")
    assert generate.main(["--workdir=/nonexistent"]) == 2
    missing = capsys.readouterr().err
    assert missing.count("\n") == 1 and "/nonexistent is not a folder" in missing


@pytest.mark.slow
def test_generate_in_a_process(whole_run, capsys):
    """Twice the same text, which is also the text of this process."""
    args = [f"--workdir={whole_run[0]}", *ASKED]
    outs = [run(args, devices=1, module=GENERATE) for _ in range(2)]
    assert all(o.returncode == 0 and o.stdout.startswith("token ") for o in outs), outs[0].stderr
    assert generate.main(args) == 0
    assert outs[0].stdout == outs[1].stdout == capsys.readouterr().out
    assert generate.main([*args, "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("token ")


@pytest.mark.slow
def test_non_finite_updates_stop_the_run(corpus, tmp_path):
    """A learning rate that blows the weights up: updates are skipped and counted.

    Then the run stops and names a checkpoint.
    """
    done = run(
        command(
            tmp_path,
            corpus,
            "--config.train.steps=40",
            "--config.checkpoint.every_steps=1",
            "--config.optimizer.learning_rate=1e30",
            "--config.optimizer.grad_clip=0.0",
            "--config.train.max_bad_steps=3",
            "--config.mesh.fsdp=2",
        )
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "3 updates in a row had a non-finite loss or gradient" in done.stderr
    assert "last good checkpoint is step" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # No checkpoint of the bad stretch: it would push out those before it.
    assert max(int(s) for s in os.listdir(tmp_path / "checkpoints")) <= rows[-1]["step"] - 3
    assert rows[-1]["skipped_steps"] == 3 and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


TINY = "--config=configs/tiny.py"
OK = ["--config.train.batch_size=8", "--config.mesh.fsdp=8"]
BAD = [
    ([], "--config is missing"),
    ([TINY], "--workdir is missing"),
    (["--config=configs/nope.py"], "--config=configs/nope.py cannot be read"),
    (
        [TINY, "--config.train.stepz=3"],
        "--config.train.stepz=3: 'stepz' is not an option. Did you mean steps?",
    ),
    ([TINY, "--confg.train.steps=3"], "Unknown command line flag 'confg.train.steps'"),
    (
        [TINY, "--config.train.steps=many"],
        "flag --config.train.steps=many: invalid literal for int()",
    ),
    ([TINY, "--config.train.steps=1.5"], "--config.train.steps=1.5"),
    ([TINY, "steps=3"], "'steps=3' is not an option"),
    ([TINY, "--config.data.document_mask=perhaps"], "--config.data.document_mask=perhaps"),
    ([TINY, "--config.train.steps=-1"], "config.train.steps=-1 is below 0. Set it to 0 or more."),
    (
        [TINY, "--config.train.steps=0"],
        "config.train.steps=0 and config.train.epochs=0.0: a run needs an end.",
    ),
    (
        [TINY, "--config.optimizer.learning_rate=nan"],
        "config.optimizer.learning_rate=nan is not a finite number",
    ),
    (
        [TINY, "--config.optimizer.learning_rate=inf"],
        "config.optimizer.learning_rate=inf is not a finite number",
    ),
    (
        [
            TINY,
            "--config.model.n_routed_experts=9",
            "--config.mesh.expert=8",
            "--config.mesh.fsdp=1",
            "--workdir={tmp}/w",
        ],
        "n_routed_experts=9 is not divisible by the expert mesh axis (8 devices). "
        "Set config.mesh.expert to a divisor of 9.",
    ),
    ([TINY, "--config.mesh.fsdp=16", "--workdir={tmp}/w"], "has 16 devices, but there are 8"),
    ([TINY, "--config.mesh.fsdp=2", "--workdir={tmp}/w"], "has 2 devices, but there are 8"),
    ([TINY, "--config.mesh.context=2"], "config.mesh.context=2 is not in this version"),
    ([TINY, "--config.moe.drop_policy=random"], "config.moe.drop_policy='random' is not known"),
    (
        [TINY, *OK, "--workdir={tmp}/w", "--config.mesh.fsdp=2", "--config.mesh.stage=4"],
        "config.mesh.stage=4 is above the number of MoE layers to divide, 3",
    ),
    (
        [TINY, *OK, "--workdir={tmp}/w", "--config.mesh.fsdp=1", "--config.mesh.tensor=8"],
        "config.model.num_attention_heads=4 is not divisible",
    ),
    (
        [TINY, "--config.train.batch_size=12", "--config.mesh.fsdp=8", "--workdir={tmp}/w"],
        "Set config.train.batch_size to a multiple of 8",
    ),
    ([TINY, "--config.train.accumulation=3"], "is not divisible by config.train.accumulation=3"),
    ([TINY, "--config.model.n_group=3"], "is not divisible by config.model.n_group=3"),
    (
        [TINY, "--config.model.n_group=4", "--config.model.topk_group=5"],
        "config.model.topk_group=5 is above config.model.n_group=4",
    ),
    (
        [TINY, "--config.model.num_experts_per_tok=99"],
        "config.model.num_experts_per_tok=99 is above the",
    ),
    (
        [TINY, "--config.model.num_attention_heads=0"],
        "config.model.num_attention_heads=0 is below 1",
    ),
    ([TINY, "--config.model.qk_rope_head_dim=7"], "config.model.qk_rope_head_dim=7 is odd"),
    (
        [TINY, "--config.model.scoring_func=tanh"],
        "config.model.scoring_func='tanh' is not known. Set config.model.scoring_func to one of",
    ),
    (
        [TINY, "--config.model.rope_theta=1"],
        "config.model.rope_theta=1.0 is not above 1. Set it to a number above 1, for instance 10000.",
    ),
    (
        [TINY, "--config.model.rope_scaling.type=yarn", "--config.model.rope_scaling.beta_fast=0"],
        "config.model.rope_scaling.beta_fast=0.0",
    ),
    (
        [TINY, "--config.model.rope_scaling.type=yarn", "--config.model.rope_scaling.factor=nan"],
        "config.model.rope_scaling.factor=nan",
    ),
    (
        [TINY, "--config.model.routed_scaling_factor=nan"],
        "config.model.routed_scaling_factor=nan is not a finite number",
    ),
    (
        [TINY, "--config.seed=1000000000000000000000000"],
        "is above 4294967295. Set it to 0 up to 4294967295.",
    ),
    ([TINY, "--config.train.batch_ramp_start=4"], "config.train.batch_ramp_steps=0 go together"),
    (
        [TINY, "--config.train.batch_size=1000000000000000"],
        "config.train.batch_size=1000000000000000 is above 2147483647",
    ),
    ([TINY, "--process_id=1"], "--process_id=1 needs --num_processes"),
    (
        [TINY, "--num_processes=2", "--process_id=2"],
        "--process_id=2 is not below --num_processes=2",
    ),
    (
        [TINY, *OK, "--workdir={tmp}/w", "--config.eval.sample_prompt=" + "x" * 600],
        "config.eval.sample_prompt has 600 tokens, but the model ends at",
    ),
    ([TINY, "--config.train.remat=save:everything"], "'everything' is not known"),
    ([TINY, "--config.moe.dispatch=rign"], "config.moe.dispatch='rign' is not known"),
    ([TINY, *OK, "--workdir={tmp}/w", "--config.data.path={tmp}/absent.txt"], "absent.txt"),
    ([TINY, *OK, "--workdir={tmp}/w", "--config.data.path={tmp}/empty.txt"], "empty.txt"),
    ([TINY, *OK, "--workdir={tmp}/w", "--config.data.path={tmp}/latin1.txt"], "UTF-8"),
    ([TINY, *OK, "--workdir={tmp}/w", "--config.data.path={tmp}/short.txt"], "short.txt"),
    (
        [
            TINY,
            *OK,
            "--workdir={tmp}/w",
            "--config.data.path={tmp}/ids.npy",
            "--config.model.vocab_size=50304",
        ],
        "config.data.tokenizer='bytes' has 257 ids",
    ),
    (
        [TINY, *OK, "--workdir={tmp}/checkpoint"],
        "{tmp}/checkpoint/config.json cannot be read as the config of a run",
    ),
    (
        [TINY, *OK, "--workdir={tmp}/w", "--config.model.vocab_size=100"],
        "config.model.vocab_size=100",
    ),
    (
        [TINY, *OK, "--workdir={tmp}/w", "--config.data.tokenizer={tmp}/absent.json"],
        "config.data.tokenizer",
    ),
    ([TINY, *OK, "--workdir={tmp}/short.txt"], "--workdir={tmp}/short.txt cannot be written"),
    (
        [TINY, *OK, "--workdir={tmp}/other", "--config.data.path={tmp}/text.txt"],
        "config.model.hidden_size=",
    ),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(a)[-60:] for a, _ in BAD])
def test_bad_input(args, message, tmp_path, monkeypatch):
    import jax

    monkeypatch.chdir(ROOT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1") * 1000)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "text.txt").write_text("text " * 100_000)
    np.save(tmp_path / "ids.npy", np.arange(100_000) % 400)
    (tmp_path / "other" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({"model": {"vocab_size": 320, "hidden_size": 8}})
    )
    monkeypatch.setattr(
        jax,
        "jit",
        lambda *a, **k: pytest.fail("something was compiled before the mistake was found"),
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *(a.format(tmp=tmp_path) for a in args)])
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        train.main(sys.argv)
    text = str(error.value)
    assert message.format(tmp=tmp_path) in text, text
    assert "\n" not in text and len(text) < 700
    assert time.perf_counter() - started < 60


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    """As train.py ends; of processes that end so: tests/cli/test_terminal.py, test_installed.py."""

    def call(*args: str) -> tuple[int, str, str]:
        code = exit_code("train.py", lambda: train.main(["train.py", *args]), "log")
        return code, *capsys.readouterr()

    monkeypatch.chdir(ROOT)
    code, out, err = call(TINY, "--config.train.stepz=3")
    assert code == 2 and err.count("\n") == 1 and out == ""
    code, out, err = call("--help")
    assert code == 0 and "--config.model.kv_lora_rank" in out
    assert "--workdir" in out and "143 SIGTERM" in out
