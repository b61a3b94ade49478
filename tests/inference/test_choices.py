"""Multiple choice against transformers, choice by choice, in float32."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import transformers

from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation import choices
from tests.support import small_lm

RTOL = 2e-6  # sums of some hundred float32 log-probabilities in another order; measured 2e-7
QUESTIONS = [
    {"prompt": "hello", "choices": [" world", " sunny", " be kind and sunny"], "answer": 0},
    {"prompt": "be kind ", "choices": ["and sunny", "你好"], "answer": "你好"},
    {"prompt": "", "choices": ["hello world", "x"], "answer": 1},
    {"prompt": "kind and " * 40, "choices": ["sunny", "hello hello"], "answer": 0},
    {"prompt": "world, be", "choices": [" Grüße", " kind", "...", "d"], "answer": 1},
]


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
            ps = small_lm.log_p(theirs, ids[:-1])
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
