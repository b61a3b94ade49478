"""Verifiers against examples, and the filter against a few lines of plain Python."""

import json
import random

import pytest

from deepseek_jax.data import __main__ as data
from deepseek_jax.data import verifiers
from deepseek_jax.errors import UserError

MESSAGES = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("42", "It is 42.", 1.0),
        ("42", "First 42, then 43", 0.0),
        ("#### 1,000", r"so \boxed{1000}", 1.0),
        ("Work: 3 * 4 = 12\n#### 12", "12 eggs", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\boxed{\frac{3}{4}}", "<answer>3/4</answer>", 1.0),
        ("x+1", r"\boxed{ x+1 }", 1.0),
        ("x+1", r"\boxed{x+2} and no 7", 0.0),
        ("Paris", r"\boxed{\text{paris}}", 1.0),
        ("5", "<think>maybe \\boxed{5}</think> 6", 0.0),
        ("-3", "$-3$", 1.0),
        ("7", "I do not know", 0.0),
        ("7", r"\boxed{7", 1.0),  # braces that never close: the last number
        (r"\boxed{a{b}c}", r"\boxed{a{b}c}", 1.0),
        ("12%", "about 12 %", 1.0),
        ("0.1", r"\boxed{.1}", 1.0),
        ("1/0", r"\boxed{1/0}", 1.0),  # no number: compared as text
        ("1e99999999999", r"\boxed{1e99999999999}", 1.0),  # nor this, which would take all memory
        ("1", r"\boxed{-1E-99999999999}", 0.0),
        ("", "1", None),
        (None, "1", None),
    ],
)
def test_accuracy(gold, answer, right):
    assert verifiers.accuracy([answer], answer=[gold]) == [right]
    as_messages = [[{"role": "assistant", "content": answer}]]
    assert verifiers.accuracy(as_messages, solution=[gold], answer=["wrong"]) == (
        [right] if gold is not None else [0.0]
    )


def test_scores_are_finite():
    """A number that JSON does not have would make a file that nothing reads."""

    def judge(completions):
        return [float("inf"), float("-inf"), float("nan"), 1]

    answers = ["a", "b", "c", "d"]
    assert verifiers.score(judge, "judge", answers, answers, {}) == [None, None, None, 1.0]
    with pytest.raises(UserError, match="--verifier=huge gave OverflowError"):
        verifiers.score(lambda completions: [10**400], "huge", ["a"], ["a"], {})


def test_accuracy_without_a_right_answer():
    assert verifiers.accuracy(["1", "2"], difficulty=["a", "b"]) == [None, None]


@pytest.mark.parametrize(
    "text, right",
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("<think>a</think><answer>b</answer>\n", 1.0),
        ("so <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> b", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> more", 0.0),
    ],
)
def test_format(text, right):
    assert verifiers.form([text]) == [right]


def rows_of(seed=0):
    rng = random.Random(seed)
    rows = []
    for prompt in range(40):
        for sample in range(6):
            text = f"answer {rng.randrange(4)}"
            row = {"index": prompt, "sample": sample, "gold": f"answer {rng.randrange(4)}"}
            question = {"role": "user", "content": f"question {prompt % 35}"}  # some come twice
            if prompt % 2:
                row |= {"messages": [question, {"role": "assistant", "content": text}]}
            else:
                row |= {"prompt": question["content"], "completion": text}
            row["finish_reason"] = rng.choice(["stop", "stop", "length"])
            rows.append(row)
    return rows


JUDGE = """
import helper

def judge(prompts, completions, gold, **columns):
    assert len(prompts) == len(completions) == len(gold) and "index" in columns
    return [helper.value(helper.text(c), g) for c, g in zip(completions, gold)]

def narrow(completions):
    return [1] * len(completions)

async def later(prompts, completions, **_):
    return [1.0 for _ in prompts]

def short(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good" for _ in completions]

def broken(completions, **_):
    raise KeyError("gold")

LIMIT = 3
"""
HELPER = """
def text(c):
    return c if isinstance(c, str) else c[-1]["content"]

def value(text, gold):
    if text == "answer 3":
        return None
    return 1.0 if text == gold else 0.5 if text == "answer 0" else float("nan") if text == "answer 1" else 0.0
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "helper.py").write_text(HELPER)  # a verifier may import what lies beside it
    rows = rows_of()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    return tmp_path, rows


def run(capsys, folder, *options):
    code = data.main(["filter", f"{folder}/in.jsonl", f"{folder}/out.jsonl", *options])
    return code, *capsys.readouterr()


def prompt_and_answer(row):
    if "messages" in row:
        return json.dumps(row["messages"][:-1]), row["messages"][-1]["content"]
    return row["prompt"], row["completion"]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("best", [None, 1, 2])
@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("unfinished", [False, True])
def test_against_plain_python(threshold, best, deduplicate, unfinished, files, capsys):
    folder, rows = files
    options = [f"--verifier={folder}/judge.py:judge", f"--threshold={threshold}"]
    options += [f"--best-of={best}"] * bool(best) + ["--deduplicate"] * deduplicate
    code, out, err = run(capsys, folder, *options, *["--keep-unfinished"] * unfinished)
    assert code == 0, err

    namespace = {}
    exec(HELPER, namespace)
    wanted, seen = [], set()
    for row in rows:
        if row["finish_reason"] == "length" and not unfinished:
            continue
        key = prompt_and_answer(row)
        score = namespace["value"](key[1], row["gold"])
        if score is None or not score >= threshold or deduplicate and key in seen:
            continue
        seen.add(key)
        wanted.append(row | {"score": score})
    if best:
        kept = []
        for prompt in {prompt_and_answer(r)[0] for r in wanted}:
            of_prompt = [r for r in wanted if prompt_and_answer(r)[0] == prompt]
            kept += sorted(of_prompt, key=lambda r: -r["score"])[:best]
        wanted = [r for r in wanted if r in kept]
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert found == wanted
    prompts = len({prompt_and_answer(r)[0] for r in wanted})
    assert f"kept           {len(wanted):,} rows of {prompts} prompts" in out
    assert "your code, which this command runs" in out
    assert ("unfinished" in out) == (not unfinished)
    counts = [int(line[15:].split(" rows")[0]) for line in out.splitlines() if " rows" in line]
    assert counts[0] == 240 == sum(counts[1:])  # every row has one fate


def test_several_verifiers_must_all_accept(files, capsys):
    folder, rows = files
    code, out, _ = run(
        capsys,
        folder,
        f"--verifier={folder}/judge.py:judge",
        f"--verifier={folder}/judge.py:narrow",
        f"--verifier={folder}/judge.py:later",
    )
    assert code == 0
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert found and all(r["score"] == 3.0 and len(r["scores"]) == 3 for r in found)


def test_without_a_verifier(files, capsys):
    folder, rows = files
    code, out, _ = run(capsys, folder)
    assert code == 0 and "score" not in (folder / "out.jsonl").read_text().splitlines()[0]
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert found == [r for r in rows if r["finish_reason"] == "stop"]


def test_mistakes_are_one_line(files, capsys):
    folder, _ = files
    (folder / "syntax.py").write_text("def (:\n")
    for options, message in (
        (["--verifier=nothing"], "is neither FILE.py:FUNCTION nor one of accuracy, format"),
        ([f"--verifier={folder}/none.py:f"], "there is no file"),
        ([f"--verifier={folder}/syntax.py:f"], "does not run (SyntaxError"),
        ([f"--verifier={folder}/judge.py:LIMIT"], "has no function LIMIT. It has judge, narrow"),
        ([f"--verifier={folder}/judge.py:short"], "gave 1 scores for"),
        ([f"--verifier={folder}/judge.py:words"], "not a list with a number or None"),
        ([f"--verifier={folder}/judge.py:broken"], "failed (KeyError"),
        (["--verifier=accuracy"], "no row stays"),
        (["--best-of=1"], "give a --verifier"),
        (["--verifier=format", "--best-of=0"], "--best-of=0 is 1 or more"),
    ):
        code, _, err = run(capsys, folder, *options)
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (folder / "out.jsonl").exists()
    for line, message in (
        ("{", "line 241 is not JSON"),
        ("[]", "line 241 is a list"),
        ('{"text": "x"}', "line 241 has the keys text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "do not end in an answer"),
        ('{"messages": "x"}', "not a list of objects"),
    ):
        lines = (folder / "in.jsonl").read_text().splitlines()[:240]
        (folder / "in.jsonl").write_text("\n".join([*lines, line]) + "\n")
        code, _, err = run(capsys, folder)
        assert code == 2 and message in err and err.count("\n") == 1, err
    code = data.main(["filter", f"{folder}/in.jsonl", f"{folder}/in.jsonl"])
    assert code == 2 and "would overwrite" in capsys.readouterr().err
    code = data.main(["filter", f"{folder}/nothing.jsonl", f"{folder}/out.jsonl"])
    assert code == 2 and "cannot be read (No such file" in capsys.readouterr().err
