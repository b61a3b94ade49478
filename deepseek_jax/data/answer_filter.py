"""Keeps the good rows of a file of answers: those that ended, that a verifier accepts, the best of a prompt.

In: rows of messages or of prompt and completion, as `generate --samples` writes them. Out: rows of the same
form, for fine-tuning. Two passes: the first keeps a score and two hashes of every row, the second copies.
"""

import argparse
import collections
import heapq
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.cli import arguments
from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import clean
from deepseek_jax.config.paths import check_output, temporary
from deepseek_jax.data import verifiers
from deepseek_jax.data.answers import Answer, lines, read, size
from deepseek_jax.errors import UserError

ROWS = 256  # that a verifier judges at once, and then the rest of a prompt's
# Of a row, what is no column of the verifier.
_NOT_COLUMNS = {"messages", "prompt", "completion", "prompts", "completions", "score", "scores"}


class Judged(NamedTuple):
    """What the first pass keeps of a row."""

    number: int
    prompt: bytes  # hashes
    answer: bytes
    scores: tuple[float, ...] | None  # of each verifier; None: one of them could not say

    @property
    def total(self) -> float:
        return sum(self.scores or ())


class Counts(NamedTuple):
    """What became of the rows."""

    rows: int
    prompts: int
    unfinished: int
    not_judged: int
    below: int
    duplicates: int
    beyond_best: int
    kept: int
    kept_prompts: int

    def lines(self, threshold: float, best_of: int | None) -> list[str]:
        """For people. Reasons in the order in which they are looked at: a row has the first that holds."""
        out = [f"read           {self.rows:,} rows of {self.prompts:,} prompts"]
        for name, count, why in (
            ("unfinished", self.unfinished, "ended at the limit of tokens"),
            ("not judged", self.not_judged, "a verifier gave None"),
            ("below", self.below, f"a score under --threshold={threshold:g}"),
            ("duplicates", self.duplicates, "an answer that its prompt has already"),
            ("beyond best", self.beyond_best, f"not among the best {best_of} of its prompt"),
        ):
            if count:
                out.append(f"{name:<15}{count:,} rows: {why}")
        without = self.prompts - self.kept_prompts
        out.append(
            f"kept           {self.kept:,} rows of {self.kept_prompts:,} prompts; {without:,} have none"
        )
        return out


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m deepseek_jax.data`."""
    p = commands.add_parser(
        "filter",
        help="keep the good answers of generate --samples",
        description="Keeps rows by what a verifier says of their answers.\n"
        "A verifier is FILE.py:FUNCTION, Python code of yours that this command runs, or one of\n"
        "accuracy (the last \\boxed{}, <answer>, #### or number equals that of the row's\n"
        f"{', '.join(verifiers.GOLD)}) and format (<think>..</think><answer>..</answer>).\n"
        "It has the signature of TRL's reward functions: (prompts, completions, **columns) -> a number or\n"
        "None for each row.",
        epilog="example: python -m deepseek_jax.data filter answers.jsonl train.jsonl --verifier=accuracy "
        "--best-of=1",
    )
    p.add_argument("source", type=arguments.path, metavar="IN", help="JSONL of answers")
    p.add_argument("target", type=arguments.path, metavar="OUT", help="JSONL to write")
    p.add_argument(
        "--verifier",
        action="append",
        default=[],
        metavar="NAME",
        help="FILE.py:FUNCTION or a name; several must all accept a row",
    )
    p.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        help="least score of each verifier (default %(default)g)",
    )
    p.add_argument(
        "--best-of",
        "--best_of",
        type=int,
        metavar="N",
        help="of a prompt's rows keep the N with the highest sum of scores; of equal ones the first",
    )
    p.add_argument(
        "--deduplicate",
        action="store_true",
        help="of rows with the same prompt and answer keep the first",
    )
    p.add_argument(
        "--keep-unfinished",
        "--keep_unfinished",
        action="store_true",
        help="also rows whose finish_reason is length: fine-tuning on these teaches to stop in the middle",
    )
    p.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      UserError: about an option, a row, or what a verifier gives.
    """
    if args.best_of is not None and (args.best_of < 1 or not args.verifier):
        raise UserError(
            f"--best-of={args.best_of} is 1 or more, and by scores: give a --verifier, or leave it out."
        )
    files = [v.rpartition(":")[0] for v in args.verifier if v not in verifiers.BUILT_IN]
    check_output("OUT", args.target, [args.source, *files])
    judges = {}
    for given in args.verifier:
        if given not in verifiers.BUILT_IN:
            print(f"verifier       {given}: your code, which this command runs")
        judges[given] = verifiers.load(given)
    counts = filter_rows(
        args.source,
        args.target,
        judges,
        threshold=args.threshold,
        best_of=args.best_of,
        deduplicate=args.deduplicate,
        keep_unfinished=args.keep_unfinished,
    )
    print("\n".join(counts.lines(args.threshold, args.best_of)))
    if counts.kept:
        print(f"wrote          {args.target}")


def filter_rows(
    source: str,
    target: str,
    judges: Mapping[str, verifiers.Verifier],
    *,
    threshold: float = 1.0,
    best_of: int | None = None,
    deduplicate: bool = False,
    keep_unfinished: bool = False,
) -> Counts:
    """Copies the rows that stay, with `score`, the sum of what the verifiers gave.

    Args:
      source, target: JSONL files; the target appears whole.
      judges: verifiers by name.
      threshold: least score of each.
      best_of: rows of a prompt at most.
      deduplicate: keep an answer to a prompt once.
      keep_unfinished: also answers that ended at the limit of tokens.

    Raises:
      UserError: a row is none, a verifier fails, no row stays, or a file cannot be read or written.
    """
    why: collections.Counter[str] = collections.Counter()
    prompts: set[bytes] = set()
    judged: list[Judged] = []
    with Bar("Judging", size(source), True) as bar:
        for batch in _batches(read(source, bar)):
            prompts.update(a.prompt_key for _, a in batch)
            why["rows"] += len(batch)
            left = [(n, a) for n, a in batch if keep_unfinished or a.is_finished]
            why["unfinished"] += len(batch) - len(left)
            judged += _judge(left, judges)
    stay: list[Judged] = []
    seen: set[tuple[bytes, bytes]] = set()
    for one in judged:
        if one.scores is None:
            why["not_judged"] += 1
        elif any(s < threshold for s in one.scores):
            why["below"] += 1
        elif deduplicate and (one.prompt, one.answer) in seen:
            why["duplicates"] += 1
        else:
            seen.add((one.prompt, one.answer))
            stay.append(one)
    if best_of is not None:
        stay, before = _best(stay, best_of), len(stay)
        why["beyond_best"] = before - len(stay)
    counts = Counts(
        rows=why["rows"],
        prompts=len(prompts),
        unfinished=why["unfinished"],
        not_judged=why["not_judged"],
        below=why["below"],
        duplicates=why["duplicates"],
        beyond_best=why["beyond_best"],
        kept=len(stay),
        kept_prompts=len({one.prompt for one in stay}),
    )
    if not stay:
        print("\n".join(counts.lines(threshold, best_of)))
        raise UserError(
            f"{source}: no row stays, and {target} is not written. Ask for less, or make more answers."
        )
    _write(source, target, {one.number: one for one in stay}, list(judges))
    return counts


def _batches(rows: Iterator[tuple[int, Answer]]) -> Iterator[list[tuple[int, Answer]]]:
    """About ROWS at a time. A prompt's rows, where they follow each other, are judged together."""
    batch: list[tuple[int, Answer]] = []
    for number, answer in rows:
        if len(batch) >= ROWS and answer.prompt != batch[-1][1].prompt:
            yield batch
            batch = []
        batch.append((number, answer))
    if batch:
        yield batch


def _judge(
    batch: Sequence[tuple[int, Answer]], judges: Mapping[str, verifiers.Verifier]
) -> list[Judged]:
    rows = [a for _, a in batch]
    names = sorted({key for a in rows for key in a.row} - _NOT_COLUMNS)
    columns = {name: [a.row.get(name) for a in rows] for name in names}
    found = [
        verifiers.score(
            judge, name, [a.prompt for a in rows], [a.completion for a in rows], columns
        )
        for name, judge in judges.items()
        if rows
    ]
    out = []
    for i, (number, answer) in enumerate(batch):
        given = [scores[i] for scores in found]
        known = tuple(s for s in given if s is not None)
        scores = known if len(known) == len(given) else None
        out.append(Judged(number, answer.prompt_key, answer.completion_key, scores))
    return out


def _best(rows: Sequence[Judged], count: int) -> list[Judged]:
    """Of each prompt the `count` with the highest total, in the order of the file."""
    groups: dict[bytes, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    best = (heapq.nlargest(count, group, key=lambda r: r.total) for group in groups.values())
    return sorted(row for group in best for row in group)


def _write(source: str, target: str, stay: Mapping[int, Judged], names: Sequence[str]) -> None:
    name = temporary(target)
    try:
        try:
            with open(name, "x", encoding="utf-8") as f:
                for number, line in lines(source):
                    if number not in stay:
                        continue
                    row, scores = clean(json.loads(line)), stay[number].scores
                    if names:
                        row["score"] = stay[number].total
                    if len(names) > 1:
                        row["scores"] = dict(zip(names, scores or (), strict=True))
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, target)
        finally:
            if os.path.exists(name):
                os.unlink(name)
    except OSError as e:
        raise UserError(
            f"OUT={target} cannot be written ({e.strerror or e}). Name a file that you may write to."
        ) from None
