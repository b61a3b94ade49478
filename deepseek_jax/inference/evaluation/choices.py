"""Multiple choice: which of some texts a model finds likeliest after a prompt, scored as EleutherAI's lm-evaluation-harness does."""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.cli.progress import Bar
from deepseek_jax.config.options import IGNORE
from deepseek_jax.data import prompt_files
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation.scoring import Score, Scorer, Span
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.inference.opener import Opened

WIDTHS = 64  # rows are a multiple of this


class Question(NamedTuple):
    prompt: str
    choices: list[str]
    answer: int
    more: dict[str, Any] = {}  # keys that nothing reads


class Pair(NamedTuple):
    """Token ids of a prompt, at least one, and of what comes after it."""

    context: list[int]
    continuation: list[int]


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file: {"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX or TEXT} a line.

    Raises:
      UserError: the file cannot be read or has no question; the first line that is none, and why.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be 1 or more.")
    lines = prompt_files.read_lines(path, "--questions", f"Write {_FORM} a line.")
    out = [
        _question(line, f"--questions={path}: line {n}")
        for n, line in itertools.islice(lines, limit)
    ]
    if unread := sorted({key for question in out for key in question.more}):
        print(
            f"--questions={path}: nothing reads {', '.join(map(repr, unread))}; it comes back with the "
            f"results of --output.",
            file=sys.stderr,
        )
    return out


_FORM = '{"prompt": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}'
_OPTIONS = {
    key: "A question is a prompt with its choices: write all of it into the prompt."
    for key in ("messages", "tools", "system", "chat_template_kwargs", "few_shot", "context")
}
_RESULTS = {"loglikelihoods", "tokens", "acc", "acc_norm", "acc_bytes"}


def _question(line: str, where: str) -> Question:
    row = prompt_files.read_object(line, where, f"Write it as {_FORM}.")
    wrong = lambda what: UserError(f"{where} {what}. Write it as {_FORM}.")
    unread = prompt_files.unread_keys(
        row, where, {"prompt", "choices", "answer"}, _OPTIONS, _RESULTS
    )
    more = {key: value for key, value in row.items() if key in unread}
    if missing := [k for k in ("prompt", "choices", "answer") if k not in row]:
        raise wrong(f"has no {missing[0]!r}")
    prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
    if not isinstance(prompt, str):
        raise wrong("has a 'prompt' that is not a text")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise wrong("has 'choices' that are not two or more texts with something in them")
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise wrong(
                f"has the 'answer' {answer[:60]!r}, which is {'several' if answer in choices else 'none'} of its choices"
            )
        return Question(prompt, choices, choices.index(answer), more)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise wrong(
            f"has the 'answer' {str(answer)[:60]}, which is neither a choice nor its number from 0 to {len(choices) - 1}"
        )
    return Question(prompt, choices, answer, more)


def encode_pair(
    encode: Callable[[str], list[int]], start_id: int | None, context: str, continuation: str
) -> Pair:
    """Token ids of a prompt and of what follows, cut as the harness does.

    White space that ends the prompt goes to the continuation; both are encoded as one text, which is cut after as many tokens as the
    prompt alone has. Where that leaves nothing before the cut, start_id stands there.

    Raises:
      UserError: nothing can stand there.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole, first = encode(context + continuation), encode(context)
    before, after = whole[: len(first)], whole[len(first) :]
    if not before:
        if start_id is None:
            raise UserError(
                "a prompt is empty, and the tokenizer has no token that begins or ends a text. Give a prompt."
            )
        before = [start_id]
        if after[:1] == before:
            after = after[1:]
    return Pair(before, after)


def score_pairs(
    model: LoadedModel,
    pairs: Sequence[Pair],
    rows: int | None = None,
    longest: int | None = None,
    done: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The log-likelihood of each continuation, in order; a context that is too long loses its beginning.

    Args:
      rows: of a batch, as Scorer. longest: tokens that the model reads at most; None: its max_position_embeddings.

    Raises:
      UserError: a continuation is longer than that.
    """
    longest = min(
        longest or model.model.max_position_embeddings, model.model.max_position_embeddings
    )
    spans, out = [], [Score(i, 0.0, 0, True) for i in range(len(pairs))]
    for i, (context, continuation) in enumerate(pairs):
        if not continuation:
            continue
        if len(continuation) > longest:
            raise UserError(
                f"a text to score has {len(continuation)} tokens, and the model reads {longest} at once. Make it shorter."
            )
        ids = np.asarray([*context, *continuation][-(longest + 1) :], np.int32)
        targets = np.where(np.arange(1, len(ids)) >= len(ids) - len(continuation), ids[1:], IGNORE)
        spans.append(Span(i, ids[:-1], targets.astype(np.int32)))
    if not spans:
        return out
    spans.sort(key=lambda s: -len(s.tokens))  # long ones first: short ones fill the gaps
    width = min(longest, -(-len(spans[0].tokens) // WIDTHS) * WIDTHS)
    for score in Scorer(model, width, rows)(spans):
        out[score.key] = score
        done(score)
    return out


def evaluate(
    opened: Opened, questions: Sequence[Question], rows: int | None = None, progress: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracies over questions, and what became of each.

    Returns:
      acc: the share of questions whose answer is the likeliest choice; acc_norm, acc_bytes: likeliest for its length in characters (the
      harness's acc_norm) and in UTF-8 bytes (its acc_bytes); each with its standard error over questions, None of a single one.

    Raises:
      UserError: the tokenizer does not fit the model, or a prompt is empty and cannot be.
    """
    encoder = opened.encoder()
    encoder.say_prefix()
    pairs = [
        encode_pair(encoder.encode, encoder.start_id, q.prompt, choice)
        for q in questions
        for choice in q.choices
    ]
    longest = opened.model.model.max_position_embeddings
    with Bar(
        "Evaluating", sum(len(p.context) + len(p.continuation) for p in pairs), progress
    ) as bar:
        scores = iter(
            score_pairs(
                opened.model,
                pairs,
                rows,
                done=lambda s: bar.advance(len(pairs[s.key].context) + s.count),
            )
        )
    details = []
    for q in questions:
        of = [next(scores) for _ in q.choices]
        ll = np.array([-s.nll for s in of])
        picks = {
            "acc": int(np.argmax(ll)),
            "acc_norm": int(np.argmax(ll / [len(c) for c in q.choices])),
            "acc_bytes": int(np.argmax(ll / [len(c.encode()) for c in q.choices])),
        }
        details.append(
            {
                **q.more,
                "prompt": q.prompt,
                "choices": q.choices,
                "answer": q.answer,
                "loglikelihoods": ll.tolist(),
                "tokens": [s.count for s in of],
                **{name: int(pick == q.answer) for name, pick in picks.items()},
            }
        )
    result: dict[str, Any] = {"questions": len(questions)}
    for name in ("acc", "acc_norm", "acc_bytes"):
        right = np.array([d[name] for d in details], np.float64)
        result[name] = float(right.mean())
        result[f"{name}_stderr"] = (
            float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else None
        )
    result["truncated"] = sum(len(p.context) + len(p.continuation) > longest + 1 for p in pairs)
    return result, details
