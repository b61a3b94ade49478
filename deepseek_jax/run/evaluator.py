"""Held-out figures during a run."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.run.watchdog import Watchdog
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import put_batch


class Evaluator:
    """Cross-entropy on held-out text: nats per token, bits per byte where a token's bytes are known.

    Args:
      loader: has the held-out rows.
      eval_step: (params, bias, batch [b, S]) -> the sum of -log p over the batch's targets.
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, loader: Loader, eval_step: Callable
    ):
        self._loader = loader
        self._mesh = mesh
        self._step = jax.jit(eval_step)
        self._micro_batch = config.micro_batch
        self._rows = min(loader.num_eval_rows, config.eval.batches * config.train.batch_size)
        self._bytes = loader.tokenizer.token_bytes
        self._compiled = False

    def __call__(self, state: TrainState, watchdog: Watchdog) -> dict[str, Any]:
        """The figures; {} without held-out text.

        Args:
          watchdog: is told of every batch; the first, which compiles, may take any time.
        """
        nll = targets = text_bytes = 0.0
        for start in range(0, self._rows, self._micro_batch):
            rows = self._loader.eval_rows(start, self._micro_batch)
            batch = jax.tree.map(lambda a: a[0], put_batch(rows, self._micro_batch, self._mesh))
            with contextlib.nullcontext() if self._compiled else watchdog.paused():
                nll += float(self._step(state.params, state.bias, batch))
            self._compiled = True
            watchdog.beat(int(state.step))
            scored = rows["targets"][rows["targets"] >= 0]
            targets += scored.size
            if self._bytes is not None:
                text_bytes += self._bytes[scored].sum()
        if not targets:
            return {}
        out = {"eval_loss": nll / targets, "eval_tokens": int(targets)}
        if text_bytes:
            out["eval_bits_per_byte"] = nll / math.log(2) / text_bytes
        return out
