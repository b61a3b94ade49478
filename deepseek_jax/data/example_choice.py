"""Which examples are trained on, which are held out, which are left out, and what is said of them."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.cli.texts import human, plural
from deepseek_jax.config.options import Config
from deepseek_jax.data.example_files import ExampleSet
from deepseek_jax.data.example_packing import kept_tokens
from deepseek_jax.data.sources import held_out_of
from deepseek_jax.data.token_marks import token_text
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

# Formats of rows in which something answers: it has to end.
ANSWERS = ("messages", "conversations", "prompt_completion", "instruction_output")
# What has to be there for a token to be scored, in the other formats.
NEEDED = {"text": "texts of two tokens or more", "tokenized": "labels other than -100"}
BLOCK = 1 << 18  # tokens that are looked at together


class Choice(NamedTuple):
    """Of every example of a set. An example that is left out has kept = 0."""

    kept: np.ndarray  # int64 [n], tokens that rows hold, from the first
    trained: np.ndarray  # int64 [n], of these the scored ones
    stops: np.ndarray  # bool [n], whether a scored one is a stop token
    held_out: np.ndarray  # bool [n]
    too_long: int  # left out by config.sft.truncation=drop
    unscored: int  # left out because nothing of what would be kept is scored
    cut: int  # not left out, but cut off

    def numbers(self, held_out: bool, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The examples of one side, int64, in their order: from `start` to before `stop`."""
        here = (self.kept[start:stop] > 0) & (self.held_out[start:stop] == held_out)
        return np.flatnonzero(here) + start


def choose(examples: ExampleSet, config: Config, stop_ids: Collection[int]) -> Choice:
    """Truncates, leaves out and holds out, by config.sft, train.sequence_length and data.eval_fraction.

    An example is held out by its place among the examples of its source, as a document is (sources.split):
    whatever else of the options changes, it stays on its side. An example of which nothing is scored is left
    out also where rows are packed; TRL keeps it there.
    """
    length, s = config.train.sequence_length, config.sft
    lengths = examples.lengths
    too_long = (lengths > length) & (s.truncation == "drop")
    kept = np.where(too_long, 0, kept_tokens(lengths, length, s.packing_strategy))
    trained, stops = count_scored(examples, kept, stop_ids)
    unscored = (trained == 0) & ~too_long
    kept[unscored] = 0
    sides = [
        held_out_of(int(last - first), config.data.eval_fraction)
        for first, last in zip(examples.sources[:-1], examples.sources[1:], strict=True)
    ]
    return Choice(
        kept,
        trained,
        stops,
        np.concatenate(sides),
        too_long=int(too_long.sum()),
        unscored=int(unscored.sum()),
        cut=int(((kept > 0) & (kept < lengths)).sum()),
    )


def count_scored(
    examples: ExampleSet, kept: np.ndarray, stop_ids: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each example's first `kept` tokens [n]: how many are scored, int64 [n], and whether one of these is
    a stop token, bool [n]. A block at a time: as much memory whatever there is.
    """
    n = len(kept)
    trained, stops = np.zeros(n, np.int64), np.zeros(n, bool)
    ends = np.array(sorted(stop_ids), np.int64)
    for first, last in _blocks(examples.offsets):
        begin, end = int(examples.offsets[first]), int(examples.offsets[last])
        at = np.flatnonzero(examples.scored[begin:end]) + begin
        example = np.searchsorted(examples.offsets, at, "right") - 1
        inside = at - examples.offsets[example] < kept[example]
        at, example = at[inside], example[inside]
        trained[first:last] = np.bincount(example - first, minlength=last - first)
        stops[example[np.isin(examples.tokens[at], ends)]] = True
    return trained, stops


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of examples of about BLOCK tokens, or of one example."""
    first, n = 0, len(offsets) - 1
    while first < n:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, "right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def check(
    choice: Choice,
    examples: ExampleSet,
    config: Config,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
) -> None:
    """Raises UserError: there is nothing to train on, or an answer's end is not."""
    where, n = f"config.data.path={config.data.path!r}", len(choice.kept)
    length = config.train.sequence_length
    if choice.too_long == n:
        raise UserError(
            f"{where}: each of the {plural(n, 'example')} is longer than config.train.sequence_length="
            f"{length}, and config.sft.truncation=drop leaves such out. Raise the length, or set "
            "config.sft.truncation=keep_start."
        )
    if not choice.trained.any():
        if (examples.lengths > length).any():
            why = (
                f"in the first config.train.sequence_length={length} of any. Raise the length if the answers "
                "lie behind it"
            )
        else:
            why = f"in any. Give examples with {NEEDED.get(examples.facts.format, 'answers')}"
        if examples.facts.format in ANSWERS:
            why += (
                ", or set config.sft.assistant_only_loss or completion_only_loss to false to train on all "
                "of it"
            )
        raise UserError(f"{where} has {plural(n, 'example')} and no trained token {why}.")
    if examples.facts.format not in ANSWERS or choice.stops.any():
        return
    first = int(np.flatnonzero(choice.trained)[0])
    start = int(examples.offsets[first])
    last = start + int(np.flatnonzero(examples.scored[start : start + int(choice.kept[first])])[-1])
    names = " or ".join(token_text(tokenizer, i) for i in sorted(stop_ids))
    raise UserError(
        f"{where}: the stop token {names} is never trained, so that answers would not end; the last trained "
        f"token of the first example is {token_text(tokenizer, int(examples.tokens[last]))!r}. Set "
        "config.sft.eos_token to the token that ends an answer, or raise config.train.sequence_length."
    )


def summary(
    choice: Choice,
    examples: ExampleSet,
    config: Config,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
) -> list[str]:
    """What is known of the examples before the first step, a line each."""
    length, facts = config.train.sequence_length, examples.facts
    train = choice.numbers(held_out=False)
    held = choice.numbers(held_out=True)
    first = (
        f"{plural(len(choice.kept), 'example')}: {len(train):,} to train on, {len(held):,} held out"
    )
    if choice.too_long:
        first += (
            f", {choice.too_long:,} left out as longer than {length} (config.sft.truncation=drop)"
        )
    if choice.unscored:
        first += f", {choice.unscored:,} left out without a trained token"
        if config.sft.packing != "none":
            first += " (TRL keeps such where it packs)"
    if choice.cut:
        first += f"; {choice.cut:,} cut off at {length} tokens"
    if config.sft.packing_strategy == "bfd_split" and (n := int((choice.kept > length).sum())):
        first += f"; {n:,} longer than {length} tokens are split"
    kept, trained = int(choice.kept[train].sum()), int(choice.trained[train].sum())
    share = trained / max(kept, 1)
    lines = [first, f"{human(trained)} of {human(kept)} tokens are trained on ({share:.0%})"]
    if stop_ids:
        names = " or ".join(token_text(tokenizer, i) for i in sorted(stop_ids))
        ends = int(choice.stops[train].sum())
        lines.append(f"the stop token {names} is trained in {ends:,} of {len(train):,} examples")
    if facts.dropped_reasoning:
        messages = plural(facts.dropped_reasoning, "message")
        lines.append(f"the chat template leaves out the reasoning of {messages}")
    if facts.prompts_differ:
        lines.append(
            f"the prompts of {plural(facts.prompts_differ, 'example')} by themselves are rendered otherwise "
            "than in the whole chat: a model is asked in other words than it learnt from"
        )
    return [*lines, *facts.about]
