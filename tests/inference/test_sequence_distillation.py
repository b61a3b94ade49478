"""docs/sequence_distillation.sh on a small model, from prompts to a fine-tuned student, killed in between."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT, chat_folders

# Even answers are right: an untrained model gives some of them.
JUDGE = '''
def judge(prompts, completions, answer, **columns):
    """As TRL calls it."""
    assert all(p[-1]["role"] == "user" for p in prompts) and all(a.isdigit() for a in answer)
    return [float(len(c[-1]["content"]) % 2 == 0) for c in completions]
'''
TRAIN = [
    "--config.train.epochs=1", "--config.train.batch_size=4", "--config.train.sequence_length=64",
    "--config.train.dtype=float32", "--config.log.every_steps=1", "--config.eval.every_steps=0",
    "--config.eval.sample_tokens=0", "--config.data.eval_fraction=0.1", "--config.train.remat=none",
]  # fmt: skip


def whole(argv, env):
    """The script to its end; what it began ends with it."""
    process = subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@pytest.mark.slow
def test_from_prompts_to_a_student(tmp_path):
    model = chat_folders.model(tmp_path / "model")
    (tmp_path / "judge.py").write_text(JUDGE)
    prompts = [
        {"messages": [{"role": "user", "content": f"{n}+{n}"}], "answer": str(2 * n)}
        for n in range(12)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    work = tmp_path / "work"
    env = os.environ | {
        "TEACHER": model, "STUDENT": model, "PROMPTS": str(tmp_path / "prompts.jsonl"),
        "WORK": str(work), "SAMPLES": "4", "MAX_TOKENS": "8", "PYTHON": sys.executable,
        "VERIFIER": f"{tmp_path}/judge.py:judge", "BEST_OF": "2", "FILTER": "--keep-unfinished",
        "TEACHER_OPTIONS": "--batch-size=4", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
    }  # fmt: skip
    argv = ["sh", "docs/sequence_distillation.sh", *TRAIN]

    # A kill while the teacher answers.
    first = subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True)
    part = work / "answers.jsonl.part"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    done = whole(argv, env)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    assert len(answers) == 48
    texts = {(r["index"], r["sample"]): r["messages"][-1]["content"] for r in answers}
    assert kept and all(len(texts[r["index"], r["sample"]]) % 2 == 0 for r in kept)
    assert max(sum(k["index"] == r["index"] for k in kept) for r in kept) <= 2
    assert "your code, which this command runs" in done.stdout
    losses = [
        json.loads(line) for line in (work / "student" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("loss" in row for row in losses)

    # Once more: nothing is made again.
    again = whole(argv, env)
    assert again.returncode == 0 and "is complete" in again.stderr
