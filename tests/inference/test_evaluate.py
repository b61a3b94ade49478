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
from deepseek_jax.inference.evaluation import choices, perplexity
from deepseek_jax.inference.evaluation.scorer import Scorer, windows
from deepseek_jax.run import importer
from deepseek_jax.train.state import to_tree
from tests.support import small_lm

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
    small_lm.write_tokenizer(tmp_path, bos)
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
            ps = small_lm.log_p(theirs, part[:-1]) if len(new) else None
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
    halved = jax.tree.map(lambda a: a / 2, opened.model.params)
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
    assert "perplexity" in command("--step=3", "--limit=2") and "2 documents" in command(
        "--step=3", "--limit=2"
    )


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
