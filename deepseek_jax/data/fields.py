"""The fields of a batch: what each array of it is called, what it belongs to, and what it holds where there
is nothing.

An objective names the fields it reads (objectives/base.py); loader, step, pipeline and plan follow. Shape
letters: B sequences, S positions, M documents of a sequence.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config.options import IGNORE

Rows = dict[str, np.ndarray]  # arrays [n, ...] of n sequences


class Field(NamedTuple):
    """One array of a batch.

    Attributes:
      dtype: of its elements.
      per: what has one element (of shape `trailing`): "token" [B, S, ...], "sequence" [B, ...] or "document"
        [B, M, ...], where the document with segment id i is at i - 1.
      trailing: sizes of the axes of one element, () for a number.
      padding: the value where there is no token, sequence or document. What has it must count for nothing.
      documents: M, only for per="document".
    """

    dtype: Any
    per: str = "token"
    trailing: tuple[int, ...] = ()
    padding: int | float = 0
    documents: int = 0

    def shape(self, length: int) -> tuple[int, ...]:
        """Of one sequence of `length` tokens: without the batch axis."""
        return {"token": (length,), "sequence": (), "document": (self.documents,)}[
            self.per
        ] + self.trailing


Fields = Mapping[str, Field]

# What a model reads. segment_ids: 1, 2, ... by document, 0 for padding. positions: from 0 in each document.
INPUTS = {name: Field(np.int32) for name in ("tokens", "segment_ids", "positions")}
# What packed text has besides. targets: what is scored at each position, -100 where nothing is. next_tokens:
# the token that follows in the same document, scored or not, -1 where there is none: what multi-token
# prediction reads.
TEXT = INPUTS | {
    "targets": Field(np.int32, padding=IGNORE),
    "next_tokens": Field(np.int32, padding=-1),
}

# Of examples for fine-tuning (example_loader.py). row: the row's number in the infinite global order of
# training, by which noise can be drawn; -1 for held-out rows and padding.
EXAMPLES = TEXT | {"row": Field(np.int32, per="sequence", padding=-1)}

# Which row of all that there are a sequence is, in whatever order it comes: training rows as they are packed,
# then held-out ones. A cached teacher is read by it (distill/). -1 for padding.
RECORD = {"record": Field(np.int32, per="sequence", padding=-1)}

# Of a teacher of which the K likeliest words are known; no data hold them, they are made for each batch
# (objectives/distill.py). teacher_ids: these words. teacher_values: their logits, but for a constant of the
# token (with the largest at 0 float16 loses the least). teacher_lse: log-sum-exp of all logits, with the same
# constant, at temperature 1 and of all logits / temperature at the temperature of the step.
OF_TEACHER = ("teacher_ids", "teacher_values", "teacher_lse")


def of_teacher(k: int) -> dict[str, Field]:
    """The fields of OF_TEACHER for lists of k words."""
    kinds = (np.int32, k), (np.float16, k), (np.float32, 2)
    return {
        name: Field(dtype, trailing=(n,))
        for name, (dtype, n) in zip(OF_TEACHER, kinds, strict=True)
    }


def padding_row(fields: Fields, length: int) -> Rows:
    """A sequence that counts for nothing."""
    return {k: np.full(f.shape(length), f.padding, f.dtype) for k, f in fields.items()}


def stack_rows(rows: list[Rows], fields: Fields, length: int) -> Rows:
    """Sequences to arrays [n, ...], with exactly these fields.

    Raises:
      ValueError: a sequence lacks a field, or has it in another shape.
    """
    out = {}
    for name, field in fields.items():
        shape = field.shape(length)
        for row in rows:
            if name not in row:
                raise ValueError(f"the data have no field {name!r}, which the objective reads")
            if row[name].shape != shape:
                raise ValueError(f"field {name!r} has shape {row[name].shape} and not {shape}")
        arrays = [row[name] for row in rows]
        out[name] = np.stack(arrays) if rows else np.zeros((0, *shape), field.dtype)
    return out


def join_rows(first: Rows, second: Rows) -> Rows:
    """Sequences after sequences, of the same fields."""
    return {name: np.concatenate([a, second[name]]) for name, a in first.items()}


def check_batch(batch: Mapping[str, Any], fields: Fields) -> None:
    """Checks the shapes and dtypes of a batch with any axes before those of a sequence, the same for all
    fields.

    Raises:
      ValueError: a field is missing, or of another shape or dtype.
    """
    *leading, length = batch["tokens"].shape
    for name, field in fields.items():
        if name not in batch:
            raise ValueError(f"the batch has no field {name!r}, which the objective reads")
        a, shape = batch[name], (*leading, *field.shape(length))
        if a.shape != shape or a.dtype != field.dtype:
            raise ValueError(
                f"field {name!r} of the batch is {a.dtype}{list(a.shape)} and not "
                f"{np.dtype(field.dtype)}{list(shape)}"
            )
