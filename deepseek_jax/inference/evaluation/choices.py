"""Multiple choice: which of some texts a model finds likeliest after a prompt.

Scores are those of EleutherAI's lm-evaluation-harness.
"""

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
from deepseek_jax.inference.evaluation.scorer import Score, Scorer, TokenSpan
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.inference.opener import Opened

WIDTHS = 64  # packed sequences are a multiple of this


class Question(NamedTuple):
    """One line of a file of questions."""

    prompt: str
    choices: list[str]
    answer: int  # index of the right one
    more: dict[str, Any] = {}  # keys that nothing reads


class Pair(NamedTuple):
    """Token ids of a prompt, at least one, and of what comes after it."""

    context: list[int]
    continuation: list[int]


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file.

    A line is {"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX or TEXT}.

    Args:
      path: of the file.
      limit: questions at most.

    Raises:
      UserError: the file cannot be read or has no question; the first line that is none, and why.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be 1 or more.")
    lines = prompt_files.read_lines(path, "--questions", f"Write {_FORM} per line.")
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

    def wrong(what: str) -> UserError:
        return UserError(f"{where} {what}. Write it as {_FORM}.")

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
            which = "several" if answer in choices else "none"
            raise wrong(f"has the 'answer' {answer[:60]!r}, which is {which} of its choices")
        return Question(prompt, choices, choices.index(answer), more)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise wrong(
            f"has the 'answer' {str(answer)[:60]}, which is neither a choice nor its number from 0 to "
            f"{len(choices) - 1}"
        )
    return Question(prompt, choices, answer, more)


def encode_pair(
    encode: Callable[[str], list[int]], start_id: int | None, context: str, continuation: str
) -> Pair:
    """Token ids of a prompt and of what follows, cut as the harness does.

    White space that ends the prompt goes to the continuation; both are encoded as one text, which is cut
    after as many tokens as the prompt alone has. Where that leaves nothing before the cut, start_id stands
    there.

    Args:
      encode: text to token ids.
      start_id: token that begins a text, if there is one.
      context: the prompt.
      continuation: what follows it.

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
                "a prompt is empty, and the tokenizer has no token that begins or ends a text. Give a "
                "prompt."
            )
        before = [start_id]
        if after[:1] == before:
            after = after[1:]
    return Pair(before, after)


def _ignore(score: Score) -> None:
    """Nobody wants to know of it."""


def _number(score: Score) -> int:
    """Of the pair that was scored: the key of its span."""
    assert isinstance(score.key, int)
    return score.key


def score_pairs(
    model: LoadedModel,
    pairs: Sequence[Pair],
    sequences: int | None = None,
    longest: int | None = None,
    done: Callable[[Score], None] = _ignore,
) -> list[Score]:
    """The log-likelihood of each continuation, in order; a context that is too long loses its beginning.

    Args:
      model: that scores.
      pairs: prompts and what follows them.
      sequences: of a batch, as Scorer.
      longest: tokens that the model reads at most; None: its max_position_embeddings.
      done: is told each score as soon as it is known.

    Raises:
      UserError: a continuation is longer than that.
    """
    limit = model.config.max_position_embeddings
    longest = min(longest or limit, limit)
    spans, out = [], [Score(i, 0.0, 0, True) for i in range(len(pairs))]
    for i, (context, continuation) in enumerate(pairs):
        if not continuation:
            continue
        if len(continuation) > longest:
            raise UserError(
                f"a text to score has {len(continuation)} tokens, and the model reads {longest} at once. "
                f"Make it shorter."
            )
        ids = np.asarray([*context, *continuation][-(longest + 1) :], np.int32)
        targets = np.where(np.arange(1, len(ids)) >= len(ids) - len(continuation), ids[1:], IGNORE)
        spans.append(TokenSpan(i, ids[:-1], targets.astype(np.int32)))
    if not spans:
        return out
    spans.sort(key=lambda s: -len(s.tokens))  # long ones first: short ones fill the gaps
    width = min(longest, -(-len(spans[0].tokens) // WIDTHS) * WIDTHS)
    for score in Scorer(model, width, sequences)(spans):
        out[_number(score)] = score
        done(score)
    return out


def evaluate(
    opened: Opened,
    questions: Sequence[Question],
    sequences: int | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracies over questions, and what became of each.

    Args:
      opened: the model and its tokenizer.
      questions: to be answered.
      sequences: of a batch, as Scorer.
      progress: show a bar.

    Returns:
      acc: the share of questions whose answer is the likeliest choice; acc_norm, acc_bytes: likeliest for its
      length in characters (the harness's acc_norm) and in UTF-8 bytes (its acc_bytes); each with its standard
      error over questions, None of a single one. Then a dict for each question.

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
    longest = opened.model.config.max_position_embeddings
    lengths = [len(pair.context) + len(pair.continuation) for pair in pairs]
    with Bar("Evaluating", sum(lengths), progress) as bar:

        def advance(score: Score) -> None:
            bar.advance(len(pairs[_number(score)].context) + score.targets)

        scores = iter(score_pairs(opened.model, pairs, sequences, done=advance))
    details = [_details(q, [next(scores) for _ in q.choices]) for q in questions]
    result: dict[str, Any] = {"questions": len(questions)}
    for name in ("acc", "acc_norm", "acc_bytes"):
        right = np.array([d[name] for d in details], np.float64)
        error = float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else None
        result[name] = float(right.mean())
        result[f"{name}_stderr"] = error
    result["truncated"] = sum(length > longest + 1 for length in lengths)
    return result, details


def _details(question: Question, scores: list[Score]) -> dict[str, Any]:
    """What became of a question, by the scores of its choices."""
    likelihoods = np.array([-score.nll for score in scores])
    characters = [len(choice) for choice in question.choices]
    utf8 = [len(choice.encode()) for choice in question.choices]
    picks = {
        "acc": int(np.argmax(likelihoods)),
        "acc_norm": int(np.argmax(likelihoods / characters)),
        "acc_bytes": int(np.argmax(likelihoods / utf8)),
    }
    return {
        **question.more,
        "prompt": question.prompt,
        "choices": question.choices,
        "answer": question.answer,
        "loglikelihoods": likelihoods.tolist(),
        "tokens": [score.targets for score in scores],
        **{name: int(pick == question.answer) for name, pick in picks.items()},
    }
