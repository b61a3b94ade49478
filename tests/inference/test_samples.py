"""Several answers to each prompt: what is drawn, what a kill leaves, and rows that fine-tuning reads."""

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

from deepseek_jax import generate
from deepseek_jax.data.conversations import find_format, normalise
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import answers, samples
from deepseek_jax.inference.generation import prompts as prompts_
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.opener import open_model, parse_mesh
from tests.support import ROOT, chat_folders, hf_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one dense layer, which compiles quickly."""
    with pytest.MonkeyPatch.context() as m:
        small = dataclasses.replace(hf_folders.MODEL, num_hidden_layers=1, first_k_dense_replace=1)
        m.setattr(hf_folders, "MODEL", small)
        return chat_folders.model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module", autouse=True)
def without_a_cache():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(generate.compile_cache, "use_cache", lambda *_, **__: "")
        yield


@pytest.fixture(scope="module")
def answering(folder):
    """(what answers, the prompts' tokens), compiled once for all tests."""
    opened = open_model(folder)
    model, encoder = opened.model, opened.encoder()
    ids = prompts_.encode_all(encoder, PROMPTS, "prompts", model.config.max_position_embeddings)
    bound = BoundModel(model.layout, model.params, model.bias, model.mesh)
    engine = Engine(bound, vocab=encoder.vocab_size)
    return answers.Answers(engine, encoder, Sampling(1.0, 0, 0.95, 0), [], 12, 0), ids


PROMPTS = [
    {"messages": [{"role": "user", "content": "1+2"}], "answer": "3"},
    {"prompt": "3+4=", "answer": "7"},
    {"messages": [{"role": "user", "content": "two"}]},
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


@pytest.fixture(scope="module")
def wide(answering):
    """The same with a longer prompt in each batch."""
    made, ids = answering
    return made, [ids[0], ids[1], ids[2] * 3, ids[3]]


def written(answering, path, count, batch_size, made_of=()):
    output = samples.Output(str(path), dict(made_of))
    if not output.is_complete():
        output.begin("weights")
        samples.write(answering[0], PROMPTS, answering[1], count, batch_size, output)


@pytest.mark.parametrize(
    "given, batch", [("answering", 4), pytest.param("wide", 1, marks=pytest.mark.slow)]
)
def test_rows_and_what_draws_depend_on(given, batch, request, tmp_path, capsys):
    """Samples do not depend on how many there are, on their neighbours or on the size of a batch; the first
    is the answer without samples. Rows are what fine-tuning reads, with all their columns."""
    answering = request.getfixturevalue(given)
    out = tmp_path / "three.jsonl"
    written(answering, out, 3, 4)
    stdout, err = capsys.readouterr()
    assert not stdout and "12 to 4 prompts" in err and "tokens per second" in err
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

    written(answering, tmp_path / "two.jsonl", 2, batch)
    assert rows_of(tmp_path / "two.jsonl") == [r for r in rows if r["sample"] < 2]
    answering[0].write(PROMPTS, answering[1], 4, str(tmp_path / "plain.jsonl"))
    for one, row in zip(rows_of(tmp_path / "plain.jsonl"), rows[::3], strict=True):
        assert text_of(row).endswith(one["text"]) and one["finish_reason"] == row["finish_reason"]


def test_killed_and_resumed(answering, tmp_path, capsys, monkeypatch):
    """At every number of batches, with half a line at the end: the same bytes, and nothing made twice."""

    class Given:
        """An answer that tells of all that it depends on."""

        stopped = False

        def __init__(self, ids, draw):
            self.ids = [1] * (1 + draw % 5)
            self.text = f"answer to {ids[:4]} drawn by {draw}"

    made, most = [], 99

    def whole(self, ids, draws):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(len(ids))
        return [Given(*one) for one in zip(ids, draws, strict=True)]

    monkeypatch.setattr(answers.Answers, "whole", whole)
    written(answering, tmp_path / "whole.jsonl", 3, 4)
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    lines = wanted.splitlines(keepends=True)
    assert len(lines) == 12
    for batches in range(3):
        out, part = tmp_path / f"out{batches}.jsonl", tmp_path / f"out{batches}.jsonl.part"
        made, most = [], batches
        with pytest.raises(KeyboardInterrupt):
            written(answering, out, 3, 4)
        assert not out.exists() and part.read_bytes() == b"".join(lines[: 4 * batches])
        with open(part, "ab") as f:  # a kill in the middle of a batch
            f.write(b"".join(lines[4 * batches :][:2]) + b'{"index": 1, "sam')
        made, most = [], 99
        written(answering, out, 3, 4)
        assert out.read_bytes() == wanted and not part.exists()
        assert f"after {4 * batches + 2} of 12" in capsys.readouterr().err
        assert sum(made) == 12 - 4 * batches
        made = []
        written(answering, out, 3, 4)
        assert not made and out.read_bytes() == wanted


@pytest.mark.slow
def test_the_command(folder, prompts, tmp_path, capsys):
    """It goes on with what is there, and tells when all is."""
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        code, stdout, err = run(capsys, folder, prompts, out, "--samples=2", "--max-tokens=3")
        assert code == 0 and not stdout and not list(tmp_path.glob("*.part"))
    assert "is complete" in err
    rows = rows_of(out)
    assert len(rows) == 8
    # what a kill after five rows leaves
    (tmp_path / "out.jsonl.part").write_text("".join(out.read_text().splitlines(True)[:5]))
    out.unlink()
    code, _, err = run(capsys, folder, prompts, out, "--samples=2", "--max-tokens=3")
    assert code == 0 and "after 5 of 8" in err and rows_of(out) == rows


@pytest.mark.slow
def test_kill_9(folder, prompts, tmp_path, capsys):
    """A process that is killed while it works."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--samples=6", "--batch-size=4", "--max-tokens=12", "--temperature=1"]
    argv = [sys.executable, "-m", "deepseek_jax.generate", folder, f"--prompts={prompts}", *options]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = functools.partial(subprocess.run, cwd=ROOT, env=env, check=True, timeout=900)
    run([*argv, f"--out={whole}"])
    process = subprocess.Popen([*argv, f"--out={out}"], cwd=ROOT, env=env)
    part, deadline = tmp_path / "out.jsonl.part", time.monotonic() + 600
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and 0 < part.read_text().count("\n") < 24
    run([*argv, f"--out={out}"])
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


def test_mistakes_are_one_line(folder, prompts, answering, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    samples.Output(str(out), {}).begin("weights")
    (tmp_path / "taken.jsonl").write_text("mine\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    with_out = [folder, f"--prompts={prompts}", f"--out={out}"]
    for argv, message in (
        ([folder, f"--prompts={prompts}", "--samples=2"], "--samples has no effect without --out"),
        ([folder, "--prompt=x", "--samples=2"], "--samples has no effect without --prompts"),
        ([*with_out, "--samples=0"], "--samples=0 with"),
        ([*with_out, "--samples=2", "--temperature=0"], "only with a temperature above 0"),
        ([*with_out, "--samples=1"], "is not None as when it was begun"),
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
    ):
        code = generate.main(argv)
        stdout, err = capsys.readouterr()
        assert code == 2 and message in err, err
        assert err.count("\n") == err.count("nothing reads") + 1, err
    assert (tmp_path / "taken.jsonl").read_text() == "mine\n"


def test_what_was_begun_with_something_else_is_refused(tmp_path):
    path = str(tmp_path / "out.jsonl")
    samples.Output(path, {"prompts": "p", "seed": 1}).begin("w")
    again = samples.Output(path, {"prompts": "p", "seed": 1})
    assert not again.is_complete()
    again.begin("w")
    for made_of, weights, message in (
        (
            {"prompts": "p", "seed": 1},
            "other",
            "the model has other weights than when it was begun",
        ),
        ({"prompts": "q", "seed": 1}, "w", "--prompts holds other prompts than when"),
        ({"prompts": "p", "seed": 2}, "w", "--seed=2 is not 1 as when it was begun"),
    ):
        with pytest.raises(UserError, match=message):
            output = samples.Output(path, made_of)
            output.is_complete()
            output.begin(weights)
    (tmp_path / "out.jsonl.run.json").write_text("[")
    with pytest.raises(UserError, match="out.jsonl.run.json cannot be read"):
        samples.Output(path, {})


@pytest.mark.slow
def test_a_fingerprint_is_of_the_weights(folder):
    """The same on another mesh, another for other weights."""
    model = open_model(folder).model
    wide = open_model(folder, mesh=parse_mesh("fsdp=2,tensor=2")).model
    assert samples.fingerprint(model) == samples.fingerprint(wide)
    model.params = jax.tree.map(lambda a: a * 2, model.params)
    assert samples.fingerprint(model) != samples.fingerprint(wide)
