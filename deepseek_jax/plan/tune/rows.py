"""Rows of tokens where no data is read: random, but as uneven as words are."""

from typing import Any

import numpy as np

from deepseek_jax.config.options import IGNORE, Config
from deepseek_jax.data.fields import Fields, Rows


def packed(
    sequences: int, length: int, vocab: int, documents: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch of rows as the loader gives them: tokens drawn by Zipf's law (1 / rank), as words are, so that
    experts are loaded unevenly.

    Args:
      documents: packed documents of random lengths, a fifth of a row on average; else one a row.

    Returns:
      tokens, targets, segment_ids, positions: int32 [sequences, length]. A document's last token predicts
      nothing.
    """
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, vocab + 1)
    tokens = rng.permutation(vocab)[rng.choice(vocab, (sequences, length), p=weight / weight.sum())]
    begins = rng.random((sequences, length)) < (5 / length if documents else 0)
    begins[:, 0] = True
    places = np.arange(length)
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    ends = np.concatenate([begins[:, 1:], np.ones((sequences, 1), bool)], axis=1)
    targets = np.where(ends, IGNORE, np.roll(tokens, -1, axis=1))
    return {
        name: a.astype(np.int32)
        for name, a in {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": np.cumsum(begins, axis=1),
            "positions": places - first,
        }.items()
    }


def of_a_step(config: Config, fields: Fields) -> Rows:
    """A step's sequences with the fields that an objective reads, [batch_size, ...]."""
    t = config.train
    found: dict[str, Any] = packed(t.batch_size, t.sequence_length, config.model.vocab_size)
    found["next_tokens"] = np.where(found["targets"] == IGNORE, -1, found["targets"])
    found["row"] = np.arange(t.batch_size, dtype=np.int32)
    return {name: found[name] for name in fields}
