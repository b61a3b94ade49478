"""The documents that a step of a run was trained on: python -m deepseek_jax.data show."""

import dataclasses
import json
import os
import re
import sys

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.data import contents
from deepseek_jax.data.contents import check_tokenizer
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.sources import split_paths
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.data.windows import Window, Windows
from deepseek_jax.errors import UserError
from deepseek_jax.train.history import History
from deepseek_jax.train.workdir import read_config, read_history


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
      step, rows: one of them.
      characters: of each piece of a document at most; 0: all.

    Raises:
      UserError: neither or both are given, or they are not of this run.
    """
    if (step is None) == (rows is None):
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
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", rows or "")
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(
                f"--rows={rows} is not FIRST-LAST. Give two row numbers, for instance --rows=800-807."
            )
        ranges = [(int(found[1]), int(found[2] or found[1]) + 1)]
    if not written:
        print(
            "data: this run is of an earlier version, which did not write down with which options its steps "
            "read the data. Taken are those of config.json for all of them.",
            file=sys.stderr,
        )
    _, stretch = history.order(config.train.steps if step is None else step - 1)
    then = stretch.options
    config = dataclasses.replace(config, seed=then.seed, data=then.data, train=then.train)
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    check_tokenizer(stretch.contents, tokenizer.name, config.data.tokenizer)
    loader = Loader(config, tokenizer, progress=True)
    for line in loader.notes:
        print(line, file=sys.stderr)
    if what := contents.difference(
        stretch.contents, loader.contents, split_paths(config.data.path, "config.data.path")
    ):
        raise UserError(
            f"{what}, that the run read: what it was trained on is no longer there. Put it back "
            "to have it shown."
        )
    for first, last in ranges:
        for index in range(first, last):
            for span in loader.origin(index):
                cut = characters and len(span.text) > characters
                text = span.text[:characters] + " ..." if cut else span.text
                print(
                    f"row {index}: {span.source}, document {span.document}, "
                    f"{span.tokens} tokens from {span.first_token}\n{text}\n"
                )
