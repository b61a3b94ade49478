"""The documents and examples that a step of a run was trained on, or will be: python -m deepseek_jax.data
show.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.data import contents
from deepseek_jax.data.contents import Contents, check_tokenizer
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader, Span
from deepseek_jax.data.open import open_data
from deepseek_jax.data.sources import split_paths
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.data.windows import Window, Windows
from deepseek_jax.errors import UserError
from deepseek_jax.train.history import History
from deepseek_jax.train.workdir import read_config, read_history

FIRST_ROWS = 2  # that are shown where none are named
TRAINED = Style(color="green", bold=True)
MARKS = "⟦", "⟧"  # around trained tokens where there is no colour


def rows_of(workdir: str, history: History, step: int) -> list[Window]:
    """The ranges of the data order that a step read, after the run's rollbacks up to it."""
    begun, _ = history.order(step - 1)
    skipped = Windows()
    path = os.path.join(workdir, "metrics.jsonl")
    for line in open(path, encoding="utf-8", errors="replace") if os.path.exists(path) else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written, or cut short
        if "rollback" in row and begun < row["step"] <= step:
            skipped = Windows.of(row["skipped_rows"])
    return skipped.rows(history.first_row(step - 1), history.count(step - 1))


def show(workdir: str, step: int | None, rows: str | None, characters: int) -> None:
    """Prints what the sequences of a step, or rows "FIRST-LAST" of the data order, were made of.

    Args:
      step, rows: one of them; neither: the first rows.
      characters: of each piece of a document at most; 0: all.

    Raises:
      UserError: both are given, or they are not of this run.
    """
    if step is not None and rows is not None:
        raise UserError("--step and --rows: give one of them, for instance --step=310.")
    config = from_config_dict(read_config(workdir))
    history, written = read_history(workdir)
    if step is not None:
        if not 1 <= step <= config.train.steps:
            raise UserError(
                f"--step={step} is not a step of this run. Give one from 1 to {config.train.steps}."
            )
        ranges = rows_of(workdir, history, step)
    else:
        ranges = [range_of(rows)]
    if not written:
        print(
            "data: this run is of an earlier version, which did not write down with which options its steps "
            "read the data. Taken are those of config.json for all of them.",
            file=sys.stderr,
        )
    _, stretch = history.order(config.train.steps if step is None else step - 1)
    then = stretch.options
    config = dataclasses.replace(
        config,
        seed=then.seed,
        objective=then.objective,
        data=then.data,
        train=then.train,
        sft=then.sft,
        distill=dataclasses.replace(config.distill, data=then.distill.data),
    )
    loader = opened(config, workdir if os.access(workdir, os.W_OK) else None, stretch.contents)
    if what := contents.difference(
        stretch.contents, loader.contents, split_paths(config.data.path, "config.data.path")
    ):
        raise UserError(
            f"{what}, that the run read: what it was trained on is no longer there. Put it back "
            "to have it shown."
        )
    print_rows(loader, ranges, characters)


def show_config(config: Config, rows: str | None, characters: int) -> None:
    """Prints what a run with these options would be trained on, before there is one.

    Raises:
      UserError: about the data.
    """
    loader = opened(config, None, None)
    for line in (loader.description, *getattr(loader, "summary", ())):
        print(line)
    print()
    print_rows(loader, [range_of(rows)], characters)


def range_of(rows: str | None) -> Window:
    """ "FIRST-LAST" or "ROW", or else the first rows.

    Raises:
      UserError: it is neither.
    """
    if rows is None:
        return 0, FIRST_ROWS
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", rows)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise UserError(
            f"--rows={rows} is not FIRST-LAST. Give two row numbers, for instance --rows=800-807."
        )
    return int(found[1]), int(found[2] or found[1]) + 1


def opened(config: Config, workdir: str | None, trained: Contents | None) -> Loader | ExampleLoader:
    """The data of a run with these options.

    Args:
      workdir: where tokenised examples are kept.
      trained: what the run read, as far as it is known.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    check_tokenizer(trained, tokenizer.name, config.data.tokenizer)
    loader = open_data(config, tokenizer, workdir=workdir, progress=True)
    for line in loader.notes:
        print(line, file=sys.stderr)
    return loader


def print_rows(loader: Loader | ExampleLoader, ranges: Iterable[Window], characters: int) -> None:
    """Prints rows piece by piece; trained tokens of examples in colour, or between marks where there is
    none.
    """
    console = Console()  # it knows what the terminal can, and NO_COLOR
    mark = _coloured if console.color_system and not console.no_color else _bracketed
    if isinstance(loader, ExampleLoader):
        print(f"{mark('Trained tokens')} are shown like this.\n")
    for first, last in ranges:
        for index in range(first, last):
            for span in loader.origin(index):
                kind, trained = "document", ""
                if span.trained is not None:
                    kind, trained = "example", f", {span.trained} trained"
                print(
                    f"row {index}: {span.source}, {kind} {span.document}, "
                    f"{span.tokens} tokens from {span.first_token}{trained}\n"
                    f"{_text(span, characters, mark)}\n"
                )


def _coloured(text: str) -> str:
    return TRAINED.render(text, color_system=ColorSystem.STANDARD)


def _bracketed(text: str) -> str:
    return f"{MARKS[0]}{text}{MARKS[1]}"


def _text(span: Span, characters: int, mark: Callable[[str], str]) -> str:
    """The text of a piece, cut after so many characters, with what of it is trained marked."""
    out, left = "", characters or len(span.text)
    for text, trained in span.parts or ((span.text, False),):
        some = text[:left]
        out += mark(some) if trained and some else some
        left -= len(text)
        if left < 0:
            return f"{out} ..."
    return out
