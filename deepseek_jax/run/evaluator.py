"""Held-out figures during a run."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Objective
from deepseek_jax.run.answers import Answering
from deepseek_jax.run.teacher_records import TeacherRecords
from deepseek_jax.run.watchdog import Watchdog
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import TrainState


class Evaluator:
    """The objective's figures on held-out data.

    Args:
      loader: has the held-out sequences.
      eval_step: of train/step.py, (params, bias, batch [b, S], frozen weights) -> sums by name.
      objective: makes figures of these sums.
      frozen: weights of its frozen model, None without one.

    Attributes:
      answering: answers held-out prompts besides; None: nothing does.
      records: adds to batches what a teacher says; None: nothing does.
    """

    answering: Answering | None = None
    records: TeacherRecords | None = None

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        loader: Loader | ExampleLoader,
        eval_step: Callable,
        objective: Objective,
        frozen: ModelWeights | None = None,
    ):
        self._loader = loader
        self._mesh = mesh
        self._step = jax.jit(eval_step)
        self._micro_batch = config.micro_batch
        self._rows = min(loader.num_eval_rows, config.eval.batches * config.train.batch_size)
        self._bytes = loader.tokenizer.token_bytes
        self._compiled = False
        self._objective = objective
        self._frozen = frozen

    def __call__(self, state: TrainState, watchdog: Watchdog) -> dict[str, Any]:
        """The figures; {} without held-out text.

        Args:
          watchdog: is told of every batch; the first, which compiles, may take any time.
        """
        sums = {"targets": 0.0, "text_bytes": 0.0}
        for start in range(0, self._rows, self._micro_batch):
            rows = self._loader.eval_rows(start, self._micro_batch)
            if self.records is not None:
                rows = self.records.add_to_rows(rows)
            batch = put_batch(rows, self._micro_batch, self._mesh)
            if self.records is not None:
                batch = self.records.add_to_batch(batch, int(state.step))
            batch = jax.tree.map(lambda a: a[0], batch)
            with contextlib.nullcontext() if self._compiled else watchdog.paused():
                found = self._step(*state.weights(), batch, self._frozen)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            self._compiled = True
            watchdog.beat(int(state.step))
            scored = rows["targets"][rows["targets"] >= 0]
            sums["targets"] += scored.size
            if self._bytes is not None:
                sums["text_bytes"] += self._bytes[scored].sum()
        if self.answering is not None:
            with watchdog.paused():
                self.answering.write(int(state.step), state.weights())
        return self._objective.figures(sums) if sums["targets"] else {}
