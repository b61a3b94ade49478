"""Several answers to each prompt: what is drawn, what a kill leaves, and rows that fine-tuning reads."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax import generate
from deepseek_jax.data.conversations import find_format, normalise
from deepseek_jax.inference.generation import answers, programs, samples
from tests.support import ROOT, chat_folders, conversion


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch):
    monkeypatch.setattr(programs, "jit", conversion.jit)
    monkeypatch.setattr(generate.compile_cache, "use_cache", lambda *_, **__: "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folders.model(tmp_path_factory.mktemp("model") / "m")


PROMPTS = [
    {"messages": [{"role": "user", "content": "1+2"}], "answer": "3"},
    {"prompt": "3+4=", "answer": "7"},
    {"messages": [{"role": "user", "content": "a much longer question than the others"}]},
    {"messages": [{"role": "user", "content": "5"}, {"role": "assistant", "content": "The answer"}],
     "continue_final_message": True},
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


def run(capsys, folder, prompts, out, *options):
    argv = [folder, f"--prompts={prompts}", f"--out={out}", "--max-tokens=12", "--temperature=1"]
    code = generate.main([*argv, *options])
    stdout, err = capsys.readouterr()
    return code, stdout, err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(row):
    return row["completion"] if "completion" in row else row["messages"][-1]["content"]


def test_draw_numbers():
    """All different for a million prompts and 64 samples, and the prompt's own for the first."""
    assert [samples.draw_number(p, 0) for p in (0, 7, 10**6)] == [0, 7, 10**6]
    starts = sorted(samples.draw_number(0, s) for s in range(64))
    assert -(2**31) <= starts[0] and starts[-1] < 2**31
    gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + 2**32], strict=True)]
    assert min(gaps) > 10**6
    np.array(starts, np.int32)  # raises where one does not fit


def test_rows_and_what_draws_depend_on(folder, prompts, tmp_path, capsys):
    """Samples do not depend on how many there are, on their neighbours or on the size of a batch; the first
    is the answer without samples. Rows are what fine-tuning reads, with all their columns."""
    out = tmp_path / "three.jsonl"
    code, stdout, err = run(capsys, folder, prompts, out, "--samples=3", "--batch-size=4")
    assert code == 0 and not stdout and "12 to 4 prompts" in err and "tokens per second" in err
    rows = rows_of(out)
    assert [(r["index"], r["sample"]) for r in rows] == [(p, s) for p in range(4) for s in range(3)]
    for row in rows:
        given = PROMPTS[row["index"]]
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 12
        assert row.get("answer") == given.get("answer")
        kind = find_format(row, "row")
        normalise(row, kind, "row")
        if "prompt" in given:
            assert kind == "prompt_completion" and row["prompt"] == given["prompt"]
        elif "continue_final_message" in given:
            assert len(row["messages"]) == 2 and "continue_final_message" not in row
            assert row["messages"][1]["content"].startswith("The answer")
        else:
            assert kind == "messages" and row["messages"][:-1] == given["messages"]
            assert row["messages"][-1]["role"] == "assistant"
    assert all(len({text_of(r) for r in rows if r["index"] == p}) > 1 for p in range(4))

    code, _, _ = run(
        capsys, folder, prompts, tmp_path / "two.jsonl", "--samples=2", "--batch-size=1"
    )
    assert code == 0 and rows_of(tmp_path / "two.jsonl") == [r for r in rows if r["sample"] < 2]
    code, _, _ = run(capsys, folder, prompts, tmp_path / "plain.jsonl")
    for one, row in zip(rows_of(tmp_path / "plain.jsonl"), rows[::3], strict=True):
        assert text_of(row).endswith(one["text"]) and one["finish_reason"] == row["finish_reason"]


def test_killed_and_resumed(folder, prompts, tmp_path, capsys, monkeypatch):
    """At every number of batches, with half a line at the end: the same bytes, and nothing made twice."""
    whole = tmp_path / "whole.jsonl"
    assert run(capsys, folder, prompts, whole, "--samples=3", "--batch-size=4")[0] == 0
    wanted = whole.read_bytes()
    real, out = answers.Answers.whole, tmp_path / "out.jsonl"
    calls = []
    for batches in (0, 1, 2):

        def dies(self, ids, draws, batches=batches):
            if len(calls) == batches:
                raise KeyboardInterrupt
            calls.append(draws)
            return real(self, ids, draws)

        for path in (out, tmp_path / "out.jsonl.part", tmp_path / "out.jsonl.run.json"):
            path.unlink(missing_ok=True)
        calls.clear()
        monkeypatch.setattr(answers.Answers, "whole", dies)
        assert run(capsys, folder, prompts, out, "--samples=3", "--batch-size=4")[0] == 130
        assert not out.exists()
        part = tmp_path / "out.jsonl.part"
        assert part.read_bytes() == b"".join(wanted.splitlines(keepends=True)[: 4 * batches])
        with open(part, "ab") as f:  # a kill in the middle of a batch
            f.write(
                b"".join(wanted.splitlines(keepends=True)[4 * batches :][:2]) + b'{"index": 1, "sam'
            )
        made = []

        def counts(self, ids, draws, made=made):
            made.append(len(ids))
            return real(self, ids, draws)

        monkeypatch.setattr(answers.Answers, "whole", counts)
        code, _, err = run(capsys, folder, prompts, out, "--samples=3", "--batch-size=4")
        assert code == 0 and out.read_bytes() == wanted and not part.exists()
        assert f"after {4 * batches + 2} of 12" in err and sum(made) == 12 - 4 * batches
    code, _, err = run(capsys, folder, prompts, out, "--samples=3", "--batch-size=4")
    assert code == 0 and "is complete" in err and out.read_bytes() == wanted


@pytest.mark.slow
def test_kill_9(folder, prompts, tmp_path, capsys):
    """A process that is killed while it works."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--samples=20", "--batch-size=4", "--max-tokens=12", "--temperature=1"]
    argv = [sys.executable, "-m", "deepseek_jax.generate", folder, f"--prompts={prompts}", *options]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([*argv, f"--out={whole}"], cwd=ROOT, env=env, check=True, timeout=300)
    for _ in range(2):
        process = subprocess.Popen([*argv, f"--out={out}"], cwd=ROOT, env=env)
        part = tmp_path / "out.jsonl.part"
        before = part.stat().st_size if part.exists() else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not out.exists():
            if part.exists() and part.stat().st_size > before:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*argv, f"--out={out}"], cwd=ROOT, env=env, check=True, timeout=300)
    assert out.read_bytes() == whole.read_bytes()


def test_an_answer_that_the_template_began(folder):
    """R1's template ends in <think>: the row has it, or its answer would lose where the thought begins."""

    class Encoder:
        class chat:
            @staticmethod
            def render(messages, **_):
                return "user: x assistant: <think>\n"

    row = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {}}
    made = samples.answered(row, "so</think>4", Encoder)
    assert made["messages"][-1] == {"role": "assistant", "content": "<think>\nso</think>4"}


def test_mistakes_are_one_line(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(capsys, folder, prompts, out, "--samples=1", "--max-tokens=2")[0] == 0
    (tmp_path / "taken.jsonl").write_text("mine\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    for argv, message in (
        ([folder, f"--prompts={prompts}", "--samples=2"], "--samples has no effect without --out"),
        ([folder, "--prompt=x", "--samples=2"], "--samples has no effect without --prompts"),
        ([folder, f"--prompts={prompts}", f"--out={out}", "--samples=0"], "--samples=0 with"),
        (
            [folder, f"--prompts={prompts}", f"--out={out}", "--samples=2", "--temperature=0"],
            "only with a temperature above 0",
        ),
        (
            [folder, f"--prompts={prompts}", f"--out={out}", "--samples=1", "--max-tokens=3",
             "--temperature=1"],
            "--max-tokens=3 is not 2 as when it was begun",
        ),
        (
            [folder, f"--prompts={prompts}", f"--out={tmp_path}/taken.jsonl", "--samples=1"],
            "says what it was made of",
        ),
        (
            [folder, f"--prompts={tmp_path}/other.jsonl", f"--out={out}", "--samples=1"],
            "has the key 'completion', which the result has too",
        ),
        (["--prompt=x"], "the model is the first argument or --model"),
        ([folder, f"--model={folder}", "--prompt=x"], "the model is the first argument or --model"),
    ):  # fmt: skip
        code = generate.main(argv)
        stdout, err = capsys.readouterr()
        assert code == 2 and message in err and err.count("\n") == err.count("nothing reads") + 1, (
            err
        )
    assert (tmp_path / "taken.jsonl").read_text() == "mine\n"


def test_other_weights_are_refused(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(capsys, folder, prompts, out, "--samples=1", "--max-tokens=2")[0] == 0
    os.rename(out, f"{out}.part")
    notes = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    (tmp_path / "out.jsonl.run.json").write_text(json.dumps(notes | {"weights": "0"}))
    code, _, err = run(capsys, folder, prompts, out, "--samples=1", "--max-tokens=2")
    assert code == 2 and "the model has other weights than when it was begun" in err
