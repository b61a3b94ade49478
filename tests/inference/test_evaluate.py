"""Perplexity and multiple choice against transformers, window by window and choice by choice, in float32."""

import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import transformers

from deepseek_jax import evaluate, hf
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import IGNORE
from deepseek_jax.errors import UserError
from deepseek_jax.inference import loaded, opener
from deepseek_jax.inference.evaluation import choices, perplexity, scorer
from deepseek_jax.inference.evaluation.scorer import Scorer, windows
from deepseek_jax.run import importer
from deepseek_jax.train.state import to_tree
from tests.support.evaluation import log_p, write_tokenizer

RTOL = (
    2e-6  # sums of some hundred float32 log-probabilities, computed in another order; measured 2e-7
)
WINDOW = 32

DOCUMENTS = [
    "Kind and sunny: hello world. " * 9,
    "",
    "b",
    "Grüße an 你好 😀, the world!",
    "be kind, " * 3 + "x",
]
QUESTIONS = [
    {"prompt": "hello", "choices": [" world", " sunny", " be kind and sunny"], "answer": 0},
    {"prompt": "be kind ", "choices": ["and sunny", "你好"], "answer": "你好"},
    {"prompt": "", "choices": ["hello world", "x"], "answer": 1},
    {"prompt": "kind and " * 40, "choices": ["sunny", "hello hello"], "answer": 0},
    {"prompt": "world, be", "choices": [" Grüße", " kind", "...", "d"], "answer": 1},
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Programs, for all that are of the same model."""
    with pytest.MonkeyPatch.context() as m:
        program, compiled = scorer._program, {}

        def once(layout):
            graphdef = layout.inference_graphdef
            if graphdef not in compiled:
                compiled[graphdef] = program(layout)
            return compiled[graphdef]

        m.setattr(scorer, "_program", once)
        yield


@pytest.fixture(scope="module")
def opened(made):
    return opener.open_model(str(made[1]))


@pytest.mark.parametrize(
    "window,stride", [(1, 1), (2, 1), (5, 5), (5, 3), (8, 1), (8, 7), (64, 32)]
)
def test_every_token_is_predicted_once_and_with_context(window, stride):
    rng = np.random.default_rng(0)
    for n in (
        0,
        1,
        2,
        window - 1,
        window,
        window + 1,
        window + 2,
        window + stride,
        window + stride + 1,
        41,
        130,
    ):
        document = rng.permutation(1000)[:n].astype(np.int32)
        cuts = np.sort(rng.integers(0, n + 1, 3))
        seen = []
        for span in windows(7, np.split(document, cuts), window, stride):
            assert span.key == 7 and 1 <= len(span.tokens) == len(span.targets) <= window
            first = int(np.flatnonzero(document == span.tokens[0])[0])
            np.testing.assert_array_equal(span.tokens, document[first : first + len(span.tokens)])
            counted = np.flatnonzero(span.targets != IGNORE)
            np.testing.assert_array_equal(span.targets[counted], document[first + 1 + counted])
            assert first == 0 or counted[0] >= window - stride
            seen += (first + 1 + counted).tolist()
        assert seen == list(range(1, n))


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity(bos, made, opened, tmp_path):
    theirs, folder = made
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    write_tokenizer(tmp_path, bos)
    ours = opener.Opened(opened.model, None, False, str(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    nats, tokens, size, stride = 0.0, 0, 0, 20
    for text in filter(None, DOCUMENTS):
        ids = tokenizer(text).input_ids
        size += len(text.encode()) - (
            0
            if bos
            else len(tokenizer.decode(ids[:1]).encode() if len(ids) > 1 or len(text) == 1 else b"")
        )
        counted = 0
        for begin in range(0, max(len(ids) - 1, 0), stride):
            part = ids[begin : begin + WINDOW + 1]
            new = range(max(1, counted + 1 - begin), len(part))
            ps = log_p(theirs, part[:-1]) if len(new) else None
            nats -= sum(ps[i - 1, part[i]] for i in new)
            counted += len(new)
        assert counted == len(ids) - 1
        tokens += counted
    r = perplexity.of_text(ours, str(path), Scorer(ours.model, WINDOW, 4), stride)
    assert (r["documents"], r["tokens"], r["bytes"]) == (4, tokens, size)
    np.testing.assert_allclose(r["nats_per_token"], nats / tokens, rtol=RTOL)
    np.testing.assert_allclose(r["bits_per_byte"], nats / math.log(2) / size, rtol=RTOL)
    np.testing.assert_allclose(r["perplexity"], math.exp(nats / tokens), rtol=10 * RTOL)
    assert (
        perplexity.of_text(ours, str(path), Scorer(ours.model, WINDOW, 4), stride, limit=2)[
            "documents"
        ]
        == 2
    )


def test_multiple_choice(made, opened, tmp_path):
    theirs, folder = made
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    result, details = choices.evaluate(opened, choices.read_questions(str(path)), sequences=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for q, d in zip(QUESTIONS, details, strict=True):
        lls = []
        for choice in q["choices"]:
            whole = tokenizer(q["prompt"] + choice).input_ids
            start = len(tokenizer(q["prompt"].rstrip()).input_ids)
            ids, count = whole[-65:], len(whole) - start  # the model reads 64
            ps = log_p(theirs, ids[:-1])
            lls.append(sum(ps[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))))
        np.testing.assert_allclose(d["loglikelihoods"], lls, rtol=1e-5)
        answer = q["answer"] if isinstance(q["answer"], int) else q["choices"].index(q["answer"])
        for name, length in (
            ("acc", lambda c: 1),
            ("acc_norm", len),
            ("acc_bytes", lambda c: len(c.encode())),
        ):
            right[name].append(
                np.argmax([ll / length(c) for ll, c in zip(lls, q["choices"], strict=True)])
                == answer
            )
            assert d[name] == right[name][-1]
    assert result["questions"] == 5 and result["truncated"] == 2
    for name, of in right.items():
        assert result[name] == np.mean(of) and result[name + "_stderr"] == pytest.approx(
            np.std(of, ddof=1) / 5**0.5
        )


def test_prompt_and_choice_are_cut_as_one_text():
    def chars(text):
        return [ord(c) for c in text]

    def tokenizer(text):
        return chars(text.replace("th", "þ"))  # merges across the cut, as BPE may

    def pair(*texts):
        return choices.encode_pair(tokenizer, 1, *texts)

    assert pair("a \n", "b") == (chars("a"), chars(" \nb"))
    assert pair("at", "he") == (chars("aþ"), chars("e"))
    assert pair("", "b") == pair("b"[:0], "b") == ([1], chars("b"))
    assert pair(" ", "b") == ([1], chars(" b"))
    with pytest.raises(UserError, match="prompt is empty"):
        choices.encode_pair(tokenizer, None, "", "b")


def test_a_mesh_computes_the_same(made, opened, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS))
    one = perplexity.of_text(opened, str(path), Scorer(opened.model, WINDOW, 4), 16)
    wide = opener.open_model(str(made[1]), mesh=opener.parse_mesh("fsdp=2,expert=2,tensor=-1"))
    assert wide.model.mesh.shape["tensor"] == 2
    other = perplexity.of_text(wide, str(path), Scorer(wide.model, WINDOW, 3), 16)
    np.testing.assert_allclose(other.pop("nats_per_token"), one.pop("nats_per_token"), rtol=RTOL)
    assert {k: other[k] for k in ("tokens", "bytes", "documents")} == {
        k: one[k] for k in ("tokens", "bytes", "documents")
    }


def test_runs(made, opened, tmp_path, capsys, monkeypatch):
    """An imported workdir, a checkpoint in it, and what it holds out; the command line."""
    text, work = tmp_path / "text.jsonl", str(tmp_path / "work")
    text.write_text(
        "".join(json.dumps({"text": f"{i:02d}: hello world, be kind"}) + "\n" for i in range(40))
    )
    importer.import_(str(made[1]), work)
    config = json.loads((tmp_path / "work" / "config.json").read_text())
    config["data"] |= {"path": str(text), "eval_fraction": 0.25}
    (tmp_path / "work" / "config.json").write_text(json.dumps(config))

    def command(*arguments):
        monkeypatch.setattr(
            "sys.argv", ["evaluate", f"--model={work}", "--window=32", "--batch-size=4", *arguments]
        )
        assert evaluate.main() == 0
        return capsys.readouterr().out

    monkeypatch.setattr(evaluate.compile_cache, "use_cache", lambda *_, **__: None)
    imported = json.loads(command("--json", f"--output={tmp_path / 'out.json'}"))
    assert (
        imported["documents"] == 10 and json.loads((tmp_path / "out.json").read_text()) == imported
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[1])
    assert imported["bytes"] == 10 * 23  # all but the first token, a digit
    assert opener.open_model(work).encoder().chat.encode("hello") == tokenizer("hello").input_ids

    ids = np.arange(20)[None]
    halved = jax.tree.map(
        lambda a: jax.device_put(np.asarray(a) / 2, a.sharding), opened.model.params
    )
    checkpoints = Checkpointer(os.path.join(work, "checkpoints"))
    with jax.set_mesh(opened.model.mesh):
        nothing = {n: None for n in opened.model.layout.abstract._fields}
        state = opened.model.layout.abstract._replace(**nothing)._replace(
            params=halved, bias=opened.model.bias
        )
        checkpoints.save(3, to_tree(state), {})
        checkpoints.wait()
    checkpoints.close()
    trained = opener.open_model(work)
    assert trained.trained and trained.folder and perplexity.default_window(trained) == 64
    halved_model = hf.LoadedModel(
        trained.model.full_config,
        opened.model.mesh,
        opened.model.layout,
        halved,
        opened.model.bias,
        loaded.Origin("", opened.model.notes),
    )
    np.testing.assert_array_equal(np.asarray(trained.model(ids)), np.asarray(halved_model(ids)))
    low = opener.open_model(work, 3, "bfloat16").model
    kinds = {str(a.dtype) for a in jax.tree.leaves(low.params)}
    assert (
        kinds == {"bfloat16", "float32"}
        and low.params["embed_tokens"]["weight"].dtype == "bfloat16"
    )
    said = command("--step=3", "--limit=2")
    assert "perplexity" in said and "2 documents" in said


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "is a list and not an object"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "has no 'answer'"),
        ('{"prompt": 1, "choices": ["b", "c"], "answer": 0}', "'prompt' that is not a text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "'choices' that are not two or more"),
        (
            '{"prompt": "a", "choices": ["b", ""], "answer": 0}',
            "'choices' that are not two or more",
        ),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            "neither a choice nor its number from 0 to 1",
        ),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": true}',
            "neither a choice nor its number",
        ),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": "d"}',
            "'d', which is none of its choices",
        ),
        (
            '{"prompt": "a", "choices": ["b", "b"], "answer": "b"}',
            "which is several of its choices",
        ),
        ("\xff", "line 2 is not UTF-8 at byte 0"),
    ],
)
def test_bad_questions(line, message, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes((json.dumps(QUESTIONS[0]) + "\n" + line).encode("latin-1"))
    with pytest.raises(UserError, match=message) as e:
        choices.read_questions(str(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert len(choices.read_questions(str(path), limit=1)) == 1


def test_bad_inputs(made, opened, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    scorer = Scorer(opened.model, WINDOW, 4)
    folder = str(made[1])
    for message, call in (
        ("has only blank lines. Write", lambda: choices.read_questions(os.devnull)),
        ("nope.jsonl cannot be read", lambda: choices.read_questions(str(tmp_path / "nope.jsonl"))),
        ("--limit=0", lambda: choices.read_questions(str(empty), 0)),
        ("--window=65 is not between 1 and .*=64", lambda: Scorer(opened.model, 65)),
        ("--batch-size=0", lambda: Scorer(opened.model, 8, 0)),
        (
            "--stride=33 is not between 1 and --window=32",
            lambda: perplexity.of_text(opened, folder + "/config.json", scorer, 33),
        ),
        (
            "no token that can be predicted",
            lambda: perplexity.of_text(opened, str(empty), scorer, 8),
        ),
        (
            "nothing does not exist|nothing' does not exist",
            lambda: perplexity.of_text(opened, str(tmp_path / "nothing"), scorer, 8),
        ),
        ("holds no model", lambda: opener.open_model(str(tmp_path))),
        ("is a checkpoint itself", lambda: opener.open_model(folder, step=3)),
        ("is not AXIS=SIZE", lambda: opener.parse_mesh("fsdp=2,fsdp=2")),
        ("is not AXIS=SIZE", lambda: opener.parse_mesh("experts=2")),
        ("does not fit 8 devices", lambda: opener.parse_mesh("fsdp=16")),
        ("does not fit", lambda: opener.parse_mesh("fsdp=-1,data=-1")),
        (
            "has 65 tokens, and the model reads 64",
            lambda: choices.score_pairs(opened.model, [choices.Pair([0], [5] * 65)]),
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()
