"""Runs that are stopped on the way, and what they wrote."""

import json
import os

from deepseek_jax.cluster.signals import Stopper


class StopAfter(Stopper):
    """As if a signal came during a step."""

    def __init__(self, step: int):
        super().__init__()
        self._step = step

    def after(self, step: int) -> int | None:
        return 15 if step == self._step else None


def rows(workdir) -> list[dict]:
    """Those of metrics.jsonl."""
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]
