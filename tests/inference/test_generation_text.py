"""Sampling against NumPy, stop strings, and the command as a user runs it."""

import io
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from deepseek_jax import generate
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.inference.generation import answers, sampling, text
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.run import importer
from tests.support import hf_families as families


@pytest.fixture(scope="module")
def engine_again():
    """Engine, with the programs of an earlier one of the same model and mesh."""
    compiled: dict = {}

    def make(bound, **options):
        key = bound.model.inference_graphdef, bound.mesh, options["vocab"]
        engine = Engine(bound, programs=compiled.get(key), **options)
        compiled[key] = engine.programs
        return engine

    return make


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch, engine_again):
    monkeypatch.setattr(generate, "Engine", engine_again)
    monkeypatch.setattr(generate.compile_cache, "use_cache", lambda *_, **__: "")


DRAWS = 20_000


@jax.jit
def drawn(logits_V, drawing):
    """-> (tokens [DRAWS], the logits that they may be drawn from)."""
    logits_BSV = jnp.broadcast_to(logits_V, (1, DRAWS, len(logits_V)))
    tokens = sampling.choose(logits_BSV, jnp.arange(DRAWS)[None], drawing)[0]
    limits = drawing.temperature, drawing.top_k, drawing.top_p
    return tokens, sampling.allowed(logits_V[None], *limits)[0]


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        pytest.param(1.0, 0, 1.0, marks=pytest.mark.slow),
        (0.7, 5, 1.0),
        (1.3, 0, 0.6),
        (0.9, 12, 0.8),
        pytest.param(1.0, 1, 1.0, marks=pytest.mark.slow),
        (1.0, 0, 1e-6),
    ],
)
def test_distribution(temperature, top_k, top_p):
    """The tokens that may be drawn, and how often 20,000 draws take each: within 5 standard deviations."""
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2
    p = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-p)
    kept = order[: top_k or 40]
    share = p[kept] / p[kept].sum()
    kept = kept[np.cumsum(share) - share < top_p]
    wanted = np.zeros(40)
    wanted[kept] = p[kept] / p[kept].sum()
    options = sampling.Sampling(temperature, top_k, top_p, 7)
    drawing = sampling.drawing(options, np.zeros(1, np.int32))
    tokens, allowed = drawn(logits, drawing)
    counts, mean = np.bincount(tokens, minlength=40), DRAWS * wanted
    assert set(np.flatnonzero(counts)) <= set(kept)
    assert np.all(np.abs(counts - mean) <= 5 * np.sqrt(mean * (1 - wanted)) + 1e-9)
    np.testing.assert_array_equal(np.isfinite(allowed), wanted > 0)


def test_stop_strings_and_characters_over_tokens():
    """Byte tokens: a stop string spans as many, and of what may become one nothing is shown; nor
    half a character."""
    encoder = Encoder(ByteTokenizer(), "a model of bytes")

    def shown(data, stop):
        stream, out = text.Stream(encoder, stop), []
        for byte in data:
            out.append(stream.add(byte))
            if stream.stopped:
                break
        out.append(stream.end())
        assert "".join(out) == stream.text and not any("\ufffd" in piece for piece in out)
        return out, stream.stopped

    assert shown(b"one END two", ["END", "two"]) == (["o", "n", "e", " ", "", "", "", ""], True)
    assert shown(b"EEND", ["END"]) == (["", "E", "", "", ""], True)
    assert shown(b"abEN", ["END"]) == (["a", "b", "", "", "EN"], False)
    assert shown(b"aab", ["aab", "ab"]) == (["", "", "", ""], True)
    assert shown("aé€b".encode(), ["€"]) == (["a", "", "é", "", "", "", ""], True)
    assert shown("xé".encode(), []) == (["x", "", "é", ""], False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama of two layers with a byte-level tokenizer and a chat template; token 1 ends an answer."""
    out = tmp_path_factory.mktemp("model")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(alphabet))}, []
        )
    )
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    inner.add_special_tokens(["<s>", "</s>"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(families, "SHAPES", families.SHAPES | dict(vocab_size=300, num_hidden_layers=2))
        families.build("llama").save_pretrained(out)
        (out / "config.json").write_text(json.dumps(families.hub_config("llama")))
    inner.save(str(out / "tokenizer.json"))
    # Short: conversations fit the width of few programs.
    template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}a:"
    (out / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )
    return str(out)


def run(capsys, *argv):
    code = generate.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_prompt_stop_and_seed(folder, capsys):
    args = [f"--model={folder}", "--prompt=token ", "--max-tokens=24", "--seed=3", "--top-k=50"]
    code, out, err = run(capsys, *args)
    assert (
        code == 0
        and out.startswith("token ")
        and "cache: 48 numbers per token and layer, 2 layers, 24.6 kB for 1 x 64 tokens" in err
    )
    assert run(capsys, *args)[1] == out and run(capsys, *args, "--seed=4")[1] != out
    answer = out.removeprefix("token ").removesuffix("\n")
    stop = answer[len(answer) // 2 :][:2]
    assert (
        run(capsys, *args, f"--stop={stop}", "--stop=never")[1]
        == "token " + answer[: answer.index(stop)] + "\n"
    )


def test_prompts_of_a_file(folder, capsys, tmp_path):
    """Text and JSONL, several batches; each answer is that of the prompt with its number, whatever
    the batches are."""
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\ntwo and more\nthree\n")
    objects.write_text(
        "\n".join(json.dumps({"prompt": p, "id": p[0]}) for p in ("one", "two and more", "three"))
    )
    common = [f"--model={folder}", "--max-tokens=9", "--seed=1", "--top-k=50"]
    code, out, _ = run(capsys, *common, f"--prompts={lines}", "--batch-size=2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["index"], r["prompt"]) for r in rows] == [
        (0, "one"),
        (1, "two and more"),
        (2, "three"),
    ]
    assert all(
        r["finish_reason"] in ("stop", "length")
        and (r["tokens"] == 9) >= (r["finish_reason"] == "length")
        for r in rows
    )
    one_by_one = [f"--prompts={objects}", "--batch-size=1", f"--output={tmp_path / 'out'}"]
    code, out, _ = run(capsys, *common, *one_by_one)
    again = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert (
        code == 0 and not out and [r.pop("id") for r in again] == ["o", "t", "t"] and again == rows
    )
    stop = next(r["text"] for r in rows if len(r["text"]) > 2)[1:3]
    _, out, _ = run(capsys, *common, f"--prompts={lines}", "--batch-size=2", f"--stop={stop}")
    for row, cut in zip(rows, map(json.loads, out.splitlines()), strict=True):
        assert cut["text"] == row["text"].split(stop)[0]
        assert (cut["finish_reason"] == "stop") == (
            stop in row["text"] or row["finish_reason"] == "stop"
        )


def test_chat_through_a_pipe(folder, capsys, monkeypatch):
    """History and system message are in the second question's prompt."""
    seen, encode = [], Chat.encode
    monkeypatch.setattr(
        Chat,
        "encode",
        lambda self, messages: seen.append([dict(m) for m in messages]) or encode(self, messages),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nMore?\n"))
    options = ["--chat", "--system=Be kind.", "--max-tokens=5", "--top-k=50"]
    code, out, _ = run(capsys, f"--model={folder}", *options)
    assert code == 0
    system, user = (
        {"role": "system", "content": "Be kind."},
        lambda t: {"role": "user", "content": t},
    )
    answer = seen[-1][2]["content"]
    assert seen[1:] == [
        [system, user("Hello")],
        [system, user("Hello"), {"role": "assistant", "content": answer}, user("More?")],
    ]
    assert out.startswith(answer + "\n") and out.endswith("\n")


@pytest.mark.slow
def test_an_imported_run(folder, capsys, tmp_path):
    """A WORKDIR speaks as its checkpoint does, chat template and all, over two devices too."""
    importer.import_(folder, str(tmp_path / "w"))
    args = ["--prompt=token ", "--max-tokens=6", "--temperature=0"]
    wanted = run(capsys, f"--model={folder}", *args)[1]
    assert run(capsys, f"--workdir={tmp_path / 'w'}", *args)[1] == wanted
    code, out, err = run(capsys, f"--model={tmp_path / 'w'}", *args, "--mesh=fsdp=2")
    assert (code, out) == (0, wanted) and "for 2 x 64 tokens" in err


def test_interrupted(folder, capsys, monkeypatch):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answers.Stream, "add", interrupt)
    code, _, err = run(capsys, f"--model={folder}", "--prompt=x", "--max-tokens=9")
    assert code == 130 and err.endswith("\ngenerate: stopped by Ctrl-C.\n")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--prompt=" + "long " * 60],
            "--prompt has 300 tokens, but the model ends at max_position_embeddings=128",
        ),
        (["--prompt=x", "--mesh=fsdp=5"], "hidden_size=48"),
        (
            ["--prompt=x", "--mesh=stage=2"],
            "2 devices along stage, and generation uses data, fsdp, expert and tensor",
        ),
        (["--prompt=x", "--mesh=fsdp=16"], "--mesh=fsdp=16 does not fit 8 devices"),
        (["--prompt=x", "--stop="], "--stop is empty"),
        (["--prompt=x", "--draft-tokens=2"], "needs multi-token prediction layers"),
        (["--prompt=x", "--top-k=-1"], "--top-k=-1 must be 0 or more"),
        (["--prompt=x", "--step=3"], "is a checkpoint itself, and not a run that has some"),
        (["--prompt=x", "--system=y"], "--system has no effect without --chat"),
        (["--prompts=/nowhere"], "--prompts=/nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(options, message, folder, capsys):
    code, out, err = run(capsys, f"--model={folder}", *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_folders_that_lack_something(folder, capsys, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    os.remove(bare / "tokenizer_config.json")
    code, _, err = run(capsys, f"--model={bare}", "--chat")
    assert code == 2 and "no chat template" in err and err.count("\n") == 1
    os.remove(bare / "tokenizer.json")
    code, _, err = run(capsys, f"--model={bare}", "--prompt=x")
    assert code == 2 and "tokenizer.json cannot be read (missing)" in err and err.count("\n") == 1
    (tmp_path / "p.jsonl").write_text('{"text": 1}\n')
    code, _, err = run(capsys, f"--model={folder}", f"--prompts={tmp_path / 'p.jsonl'}")
    assert code == 2 and 'line 1 has neither "prompt"' in err
