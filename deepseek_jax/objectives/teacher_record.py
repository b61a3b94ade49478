"""What a teacher says of each token, as few numbers: a record.

A teacher that runs beside the student and one whose records lie on disk (distill/) go through the same
program, so that training with either is the same to the last bit. Shape letters: model/layers.py; K words of
a record, N temperatures.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.data.fields import OF_TEACHER
from deepseek_jax.model import head
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Batch, Frozen
from deepseek_jax.objectives.forward import run_frozen


def teacher_record(
    frozen: Frozen,
    top: int,
    words: int,
    weights: ModelWeights,
    batch: Batch,
    temperatures_N: jax.Array,
) -> Batch:
    """The record of each token, 0 for padding.

    Args:
      frozen: the teacher. top: K. words: of its vocabulary, without padding.
      batch: data/fields.py INPUTS, [B, S].
      temperatures_N: float32, what logits are divided by.

    Returns:
      data/fields.py OF_TEACHER: ids int32 [B, S, K]; logits float16 [B, S, K], not divided by a temperature,
      the largest at 0; log-sum-exp of all logits, with the same constant, at each temperature, float32 [B, S,
      N].
    """
    found = run_frozen(frozen, weights, batch)
    ids, values, lse = head.scan_vocab_top(
        found.out.hidden_BSD, found.head, top, words, temperatures_N
    )
    # Float16 would make it -inf; either leaves no probability.
    values = jnp.maximum(values, -float(jnp.finfo(jnp.float16).max))
    counts_BS1 = batch["segment_ids"][..., None] > 0
    made = ids, values.astype(jnp.float16), lse
    return {
        name: jnp.where(counts_BS1, a, jnp.zeros((), a.dtype))
        for name, a in zip(OF_TEACHER, made, strict=True)
    }
