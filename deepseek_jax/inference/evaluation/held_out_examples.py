"""Perplexity of the scored tokens of what a fine-tuning run holds out."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data import contents
from deepseek_jax.data.documents import split_paths
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import EXAMPLES
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation.scorer import Scorer, TokenSpan
from deepseek_jax.inference.opener import Opened


def evaluate(
    opened: Opened, scorer: Scorer, limit: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """As perplexity.of_held_out; examples in place of documents, each by itself up to scorer.width tokens, as
    the run's eval_loss has them.

    Args:
      opened: the run.
      scorer: of its model.
      limit: examples at most.
      progress: show a bar.

    Raises:
      UserError: the run holds nothing out, or its data cannot be read.
    """
    data = _open(opened, progress)
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be 1 or more.")
    examples = data.eval_examples(limit)
    known = data.tokenizer.token_bytes
    size = 0

    def spans() -> Iterator[TokenSpan]:
        nonlocal size
        for number, (ids, scored) in enumerate(examples):
            ids, scored = ids[: scorer.width], scored[: scorer.width]
            targets = np.where(scored[1:], ids[1:], IGNORE).astype(np.int32)
            if (targets != IGNORE).any():
                size += int(known[targets[targets != IGNORE]].sum()) if known is not None else 0
                yield TokenSpan(number, ids[:-1], targets)

    nll, tokens = 0.0, 0
    for score in scorer(spans()):
        nll, tokens = nll + score.nll, tokens + score.targets
    if not tokens:
        raise UserError(
            "--text is missing, and this run holds no examples out: config.data.eval_fraction="
            f"{opened.run.data.eval_fraction if opened.run else 0}. Name a text."
        )
    mean = nll / tokens
    return {
        "perplexity": math.exp(min(mean, 700)),
        "nats_per_token": mean,
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "documents": len(examples),
        "tokens": tokens,
        "bytes": size,
        "window": scorer.width,
        "stride": scorer.width,
    }


def _open(opened: Opened, progress: bool) -> ExampleLoader:
    run, workdir = opened.run, opened.model.source
    assert run is not None
    spec = opened.tokenizer or run.data.tokenizer
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=spec))
    kept = workdir if os.access(workdir, os.W_OK) else None
    data = open_data(run, load_tokenizer(spec), EXAMPLES, kept, progress)
    assert isinstance(data, ExampleLoader)
    paths = split_paths(run.data.path, "config.data.path")
    if what := contents.difference(opened.contents, data.contents, paths):
        raise UserError(
            f"{what}, that the run read: what it held out is no longer known. Put the data back, "
            "or name a text with --text."
        )
    return data
